//! Follows the guest's events as the proxy tells them, and looks at each again.

use kata_like_agent_protocol::MOST_EVENTS;
use kata_like_proxy::wire::Answer;
use kata_like_proxy::{Event, Pace, clean};
use tokio::sync::mpsc;

use crate::vm::launch::Proxy;

/// Asks for events until there can be no more; the answer is why.
pub(super) async fn follow(proxy: Proxy, events: mpsc::Sender<Event>) -> String {
    let mut pace = Pace::new();
    loop {
        pace.keep().await;
        let some = match proxy.events().await {
            Ok(Answer::Events(some)) => some,
            Ok(Answer::Broken { why }) => return clean(&why),
            Ok(_) => return "the proxy's answer is of another kind".to_owned(),
            Err(error) => return error.one_line(),
        };
        if some.len() > MOST_EVENTS || !some.iter().all(Event::can_be) {
            return "the proxy tells of what no guest can have said".to_owned();
        }
        for event in some {
            // Where many wait, the proxy waits too.
            if events.send(event).await.is_err() {
                return "nobody listens to the pod's events".to_owned();
            }
        }
    }
}
