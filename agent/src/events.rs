//! What the host is told unasked: exits, kills for memory and questions for names, in order, each once.
//!
//! Filled by `container.rs` and `resolver.rs`, emptied by `service.rs`. Exits are as many as the host started
//! processes. Kills for memory are as many as a container likes, so one that is not told yet stands
//! for all that follow it. Questions are bounded by who asks them.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::Notify;

use crate::stdio::port::Token;

/// One thing to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process has gone.
    Exited {
        /// Its container.
        container: String,
        /// Its exec; empty for the init.
        exec: String,
        /// As a shell sees it.
        status: u32,
        /// When it went.
        at: SystemTime,
        /// What its standard output and error had carried.
        carried: [u64; 2],
    },
    /// Processes of a container were killed for memory.
    OutOfMemory {
        /// The container.
        container: String,
    },
    /// Somebody in the guest asks a name server that is the host's: the answer is awaited in a stream.
    NameQuestion {
        /// The stream's.
        token: Token,
        /// The server's address.
        address: IpAddr,
        /// Whether it came by TCP.
        tcp: bool,
    },
}

/// The queue.
#[derive(Debug, Default)]
pub struct Events {
    queue: Mutex<VecDeque<Event>>,
    filled: Notify,
}

impl Events {
    /// Puts an event at the end.
    pub fn push(&self, event: Event) {
        let mut queue = self.queue();
        let told_later = matches!(event, Event::OutOfMemory { .. }) && queue.contains(&event);
        if !told_later {
            queue.push_back(event);
        }
        drop(queue);
        self.filled.notify_one();
    }

    /// The first event; waits for one. For one caller at a time.
    pub async fn next(&self) -> Event {
        loop {
            if let Some(event) = self.queue().pop_front() {
                return event;
            }
            self.filled.notified().await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Event>> {
        // Held for single operations only, none of which leaves it half done.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out_of_memory(container: &str) -> Event {
        Event::OutOfMemory {
            container: container.into(),
        }
    }

    #[tokio::test]
    async fn events_come_in_order_and_a_flood_is_one() {
        let events = Events::default();
        let exited = Event::Exited {
            container: "a".into(),
            exec: String::new(),
            status: 137,
            at: SystemTime::now(),
            carried: [1, 2],
        };
        for _ in 0..1000 {
            events.push(out_of_memory("a"));
        }
        events.push(out_of_memory("b"));
        events.push(exited.clone());
        assert_eq!(events.next().await, out_of_memory("a"));
        assert_eq!(events.next().await, out_of_memory("b"));
        assert_eq!(events.next().await, exited);
        let later = tokio::time::timeout(std::time::Duration::from_millis(10), events.next());
        assert!(later.await.is_err());
    }
}
