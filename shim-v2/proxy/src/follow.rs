//! Follows the guest's events: asks for the next ones, checks them, hands them on.
//!
//! The guest can't make the host do more than this file allows. It waits while its events wait for
//! the shim; it is asked for more at the pace of [`Pace`]; one that sends what is no event is given
//! up after [`MOST_NONSENSE`] times.

use kata_like_agent_protocol::agent::NextEventsRequest;
use kata_like_agent_protocol::agent_ttrpc::AgentClient;
use kata_like_agent_protocol::{MOST_EVENTS, status as codes};
use tokio::sync::mpsc;
use ttrpc::context::Context;

use crate::event::{self, Event, clean};
use crate::gate::Offence;
use crate::pace::Pace;

/// How much that is no event the guest may send. An honest agent sends none.
const MOST_NONSENSE: u32 = 100;

/// Asks for events until there can be no more; the answer is why.
pub(super) async fn follow(
    client: AgentClient,
    offence: Offence,
    events: mpsc::Sender<Event>,
) -> String {
    let (mut received, mut nonsense) = (0_u64, 0_u32);
    let mut pace = Pace::new();
    loop {
        pace.keep().await;
        let answer = match next(&client, received).await {
            Ok(answer) => answer,
            Err(error) => return why_none(error, &offence),
        };
        if answer.len() > MOST_EVENTS {
            return format!("the guest sent {} events at once", answer.len());
        }
        for event in answer {
            received = received.saturating_add(1);
            let Some(event) = event::checked(event) else {
                nonsense += 1;
                if nonsense >= MOST_NONSENSE {
                    return format!("the guest sent {nonsense} events that are none");
                }
                continue;
            };
            // Where many wait, the guest waits too.
            if events.send(event).await.is_err() {
                return "nobody listens to the pod's events".to_owned();
            }
        }
    }
}

/// The events after the first `received` ones. There is no limit to the wait: the connection ends
/// with the VM, a guest without events is none to be given up, and nobody else waits for this.
async fn next(
    client: &AgentClient,
    received: u64,
) -> ttrpc::Result<Vec<kata_like_agent_protocol::agent::Event>> {
    let request = NextEventsRequest {
        received,
        most: u32::try_from(MOST_EVENTS).unwrap_or(u32::MAX),
        ..Default::default()
    };
    let answer = client.next_events(Context::default(), &request).await?;
    Ok(answer.events)
}

fn why_none(error: ttrpc::Error, offence: &Offence) -> String {
    if let Some(why) = offence.get() {
        return format!("the guest's agent is not listened to any more: {why}");
    }
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let kind = codes::kind(status.code.enum_value_or_default());
            let text = clean(&status.message);
            format!("the agent does not tell its events: {kind:?}: {text}")
        }
        other => format!("the agent is gone: {}", clean(&other.to_string())),
    }
}

#[cfg(test)]
mod tests;
