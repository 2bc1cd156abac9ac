//! The events for the host: exits, OOM kills and questions for names, in order, each once.
//!
//! Filled by `container.rs` and `resolver.rs`, read by `service.rs`. An event stays until the host
//! has counted it as received.
//!
//! The queue is bounded by what is asked of it. There are as many exits as the host has started
//! processes, and with [`MOST_WAITING`] events in the queue no process is started. A container can
//! cause any number of OOM kills, so one that the host has not got yet stands for all that follow.
//! The resolver bounds the questions that are under way. A full queue takes neither of the last
//! two: a question without an answer is asked again.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::stdio::port::Token;

/// With so many events in the queue the host starts no process, and only exits are taken.
const MOST_WAITING: usize = 4096;

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
    queue: Mutex<Queue>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    /// How many events the host has received.
    received: u64,
    /// How many of `waiting` were in an answer. The host may have them.
    sent: usize,
    waiting: VecDeque<Event>,
}

impl Events {
    /// Puts an event at the end.
    pub fn push(&self, event: Event) {
        let mut queue = self.queue();
        let wanted = match &event {
            Event::Exited { .. } => true,
            // What the host may have already tells of nothing that comes later.
            Event::OutOfMemory { .. } => {
                let told = queue.waiting.iter().skip(queue.sent).any(|it| *it == event);
                !told && queue.waiting.len() < MOST_WAITING
            }
            Event::NameQuestion { .. } => queue.waiting.len() < MOST_WAITING,
        };
        if wanted {
            queue.waiting.push_back(event);
        }
        drop(queue);
        self.filled.notify_waiters();
    }

    /// Whether a process may be started, whose exit will be an event.
    ///
    /// # Errors
    /// Too many events wait for the host.
    pub fn have_room(&self) -> Result<(), Failure> {
        match self.queue().waiting.len() {
            waiting if waiting < MOST_WAITING => Ok(()),
            waiting => {
                let text = format!("start a process: {waiting} events wait for the host");
                Err(Failure::new(Kind::WrongState, text))
            }
        }
    }

    /// The first `most` events after the `received` first ones, which are forgotten. Waits for one,
    /// but no longer than `patience`: then there is none in the answer.
    ///
    /// # Errors
    /// The host can't have received so many, or it has counted more of them before.
    pub async fn after(
        &self,
        received: u64,
        most: usize,
        patience: Duration,
    ) -> Result<Vec<Event>, Failure> {
        let late = Instant::now() + patience;
        loop {
            // Before the look at the queue: an event that comes right after it is not missed.
            let filled = self.filled.notified();
            let next = self.queue().after(received, most)?;
            if !next.is_empty() || timeout_at(late, filled).await.is_err() {
                return Ok(next);
            }
        }
    }

    /// The next event, which is received with that.
    #[cfg(test)]
    pub async fn next(&self) -> Event {
        loop {
            let received = self.queue().received;
            let next = self.after(received, 1, Duration::from_secs(60)).await;
            if let Some(event) = next.unwrap().into_iter().next() {
                let after = self.after(received + 1, 1, Duration::ZERO).await;
                after.unwrap();
                return event;
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Held for single operations only. None of them leaves it half done.
        lock(&self.queue)
    }
}

impl Queue {
    fn after(&mut self, received: u64, most: usize) -> Result<Vec<Event>, Failure> {
        let new = received.checked_sub(self.received);
        let new = new.and_then(|new| usize::try_from(new).ok());
        let Some(new) = new.filter(|new| *new <= self.sent) else {
            let why = format!(
                "{received}: {} were received before, and {} sent since",
                self.received, self.sent
            );
            return Err(Failure::bad("received", why));
        };
        self.waiting.drain(..new);
        self.received = received;
        let next: Vec<Event> = self.waiting.iter().take(most).cloned().collect();
        self.sent = next.len().max(self.sent - new);
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(10);

    fn out_of_memory(container: &str) -> Event {
        Event::OutOfMemory {
            container: container.into(),
        }
    }

    fn exited(exec: &str) -> Event {
        Event::Exited {
            container: "a".into(),
            exec: exec.into(),
            status: 137,
            at: SystemTime::UNIX_EPOCH,
            carried: [1, 2],
        }
    }

    #[tokio::test]
    async fn events_come_in_order_and_a_flood_is_one() {
        let events = Events::default();
        for _ in 0..1000 {
            events.push(out_of_memory("a"));
        }
        events.push(out_of_memory("b"));
        events.push(exited(""));
        let all = [out_of_memory("a"), out_of_memory("b"), exited("")];
        assert_eq!(events.after(0, 64, SHORT).await.unwrap(), all);
        // The host may have it: the next kill is another event.
        events.push(out_of_memory("a"));
        let next = events.after(3, 64, SHORT).await.unwrap();
        assert_eq!(next, [out_of_memory("a")]);
        assert_eq!(events.after(4, 64, SHORT).await.unwrap(), []);
    }

    #[tokio::test]
    async fn what_was_not_received_comes_again_and_nothing_twice() {
        let events = Events::default();
        for exec in ["1", "2", "3"] {
            events.push(exited(exec));
        }
        let first = [exited("1"), exited("2")];
        assert_eq!(events.after(0, 2, SHORT).await.unwrap(), first);
        assert_eq!(events.after(0, 2, SHORT).await.unwrap(), first);
        let next = events.after(1, 64, SHORT).await.unwrap();
        assert_eq!(next, [exited("2"), exited("3")]);
        for impossible in [0, 4, u64::MAX] {
            let refused = events.after(impossible, 64, SHORT).await;
            assert!(refused.is_err(), "{impossible}");
        }
        assert_eq!(events.after(3, 64, SHORT).await.unwrap(), []);
    }

    #[tokio::test]
    async fn an_event_is_told_at_once_to_all_who_wait() {
        let events = Events::default();
        let begin = Instant::now();
        let wait = || events.after(0, 64, Duration::from_secs(60));
        let push = async {
            tokio::time::sleep(SHORT).await;
            events.push(exited(""));
        };
        let (one, other, ()) = tokio::join!(wait(), wait(), push);
        assert_eq!(one.unwrap(), [exited("")]);
        assert_eq!(other.unwrap(), [exited("")]);
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_full_queue_takes_exits_only() {
        let events = Events::default();
        for exec in 0..MOST_WAITING - 1 {
            events.push(exited(&exec.to_string()));
        }
        events.have_room().unwrap();
        events.push(exited("last"));
        events.have_room().unwrap_err();
        events.push(out_of_memory("a"));
        events.push(exited("of one that was started"));
        assert_eq!(events.queue().waiting.len(), MOST_WAITING + 1);
        events.after(0, 64, SHORT).await.unwrap();
        events.after(64, 64, SHORT).await.unwrap();
        events.have_room().unwrap();
    }
}
