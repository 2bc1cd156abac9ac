//! Follows the guest's events: asks for the next ones, checks them, hands them on.
//!
//! The guest can't make the shim do more than this file allows. It waits while its events wait for
//! the pod; it is asked for more at the pace of [`Pace`]; one that sends what is no event is given
//! up after [`MOST_NONSENSE`] times.

use std::time::Duration;

use kata_like_agent_protocol::agent::NextEventsRequest;
use kata_like_agent_protocol::agent_ttrpc::AgentClient;
use kata_like_agent_protocol::{MOST_EVENTS, status as codes};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use ttrpc::context::Context;

use super::event::{self, Event, clean};
use super::gate::Offence;
use crate::log::Budget;

/// How much that is no event the guest may send. An honest agent sends none.
const MOST_NONSENSE: u32 = 100;
/// After so long without an answer the log says so: the agent answers every half minute.
const SILENCE: Duration = Duration::from_secs(90);

/// What each answer costs, and how much may be owed: 200 answers at once, then 50 a second.
const COST: Duration = Duration::from_millis(20);
const CREDIT: Duration = Duration::from_secs(4);

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
                static STRANGE: Budget = Budget::new();
                STRANGE.spend(|left_out| {
                    tracing::warn!(left_out, "the guest sent an event that is not one");
                });
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
    let answer = client.next_events(Context::default(), &request);
    tokio::pin!(answer);
    let answer = match timeout(SILENCE, &mut answer).await {
        Ok(answer) => answer,
        Err(_) => {
            tracing::warn!("the guest has not answered for {SILENCE:?}: its events are missing");
            answer.await
        }
    };
    Ok(answer?.events)
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

/// How often the guest is asked: at once after a quiet time, and not faster than it can be handled
/// for ever.
struct Pace {
    /// Until when all answers so far have been paid for.
    paid: Instant,
}

impl Pace {
    fn new() -> Self {
        Self {
            paid: Instant::now(),
        }
    }

    async fn keep(&mut self) {
        let now = Instant::now();
        self.paid = self.paid.max(now) + COST;
        let owed = self.paid.duration_since(now);
        if let Some(wait) = owed.checked_sub(CREDIT) {
            sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests;
