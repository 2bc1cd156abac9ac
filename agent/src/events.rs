//! The events for the host: exits, OOM kills and questions for names, in order, each once.
//!
//! Filled by `container.rs` and `resolver.rs`, emptied by `service.rs`. There are as many exits as
//! the host has started processes. A container can cause any number of OOM kills, so one that the
//! host has not heard of yet stands for all that follow. The resolver bounds the questions.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use kata_like_linux::lock;
use tokio::sync::Notify;

use crate::stdio::port::Token;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process has exited.
    Exited {
        container: String,
        /// Empty for the init.
        exec: String,
        /// The status as a shell sees it.
        status: u32,
        /// When the process exited.
        at: SystemTime,
        /// How many bytes its standard output and error had carried.
        carried: [u64; 2],
    },
    /// The kernel killed processes of a container for lack of memory.
    OutOfMemory { container: String },
    /// A process in the guest asks a name server that is the host's. It awaits the answer in a
    /// stream.
    NameQuestion {
        /// The token of that stream.
        token: Token,
        /// The server's address in the guest.
        address: IpAddr,
        /// The question came by TCP.
        tcp: bool,
    },
}

/// The queue of events.
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

    /// Takes the first event, or waits for one. One caller at a time.
    pub async fn next(&self) -> Event {
        loop {
            if let Some(event) = self.queue().pop_front() {
                return event;
            }
            self.filled.notified().await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Event>> {
        // Held for single operations only. None of them leaves it half done.
        lock(&self.queue)
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
