//! Every exit in the guest: code, signal and time, once.
//!
//! PID 1 becomes the parent of every orphan. So all zombies end here, also those of the runner and
//! of containers: nobody else in the agent waits for a child.
//!
//! Invariant: whoever asks for an exit before or shortly after it hears of it. Exits that nobody
//! claims are forgotten after `KEPT_FOR`, long before their pid can come round again.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use kata_like_linux::lock;
use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The code or the signal.
    pub end: End,
    /// When the parent heard of it: CLOCK_REALTIME.
    pub at: SystemTime,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By exit(2), with the low byte of its argument.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl End {
    /// The status as a shell sees it: the code, or 128 and the signal.
    pub fn status(self) -> u32 {
        match self {
            Self::Code(code) => u32::from(code),
            Self::Signal(signal) => 128 + u32::from(signal),
        }
    }
}

/// How long an unclaimed exit is kept for a late caller, and how many of them.
const KEPT_FOR: Duration = Duration::from_secs(10);
const KEPT: usize = 1024;

static EXITS: Mutex<Option<Exits>> = Mutex::new(None);

#[derive(Default)]
struct Exits {
    waiting: HashMap<u32, Vec<oneshot::Sender<Exit>>>,
    unclaimed: VecDeque<(Instant, u32, Exit)>,
}

impl Exits {
    fn record(&mut self, pid: u32, exit: Exit, now: Instant) {
        self.forget(now);
        match self.waiting.remove(&pid) {
            Some(waiting) => {
                for claimant in waiting {
                    // The caller may have stopped waiting.
                    let _ = claimant.send(exit);
                }
            }
            None => self.unclaimed.push_back((now, pid, exit)),
        }
    }

    fn claim(&mut self, pid: u32, now: Instant) -> oneshot::Receiver<Exit> {
        self.forget(now);
        let (tell, told) = oneshot::channel();
        match self.unclaimed.iter().rposition(|entry| entry.1 == pid) {
            Some(index) => {
                if let Some((_, _, exit)) = self.unclaimed.remove(index) {
                    let _ = tell.send(exit);
                }
            }
            None => self.waiting.entry(pid).or_default().push(tell),
        }
        told
    }

    fn forget(&mut self, now: Instant) {
        while let Some((since, _, _)) = self.unclaimed.front() {
            let old = now.saturating_duration_since(*since) > KEPT_FOR;
            if !old && self.unclaimed.len() <= KEPT {
                break;
            }
            self.unclaimed.pop_front();
        }
        self.waiting.retain(|_, claimants| {
            claimants.retain(|claimant| !claimant.is_closed());
            !claimants.is_empty()
        });
    }
}

fn exits() -> MutexGuard<'static, Option<Exits>> {
    // Nothing panics while it is held. If something did, the table is still whole.
    lock(&EXITS)
}

/// Begins to reap. Must be called on the runtime, before the first child is made.
pub fn start() -> io::Result<()> {
    let mut children = signal(SignalKind::child())?;
    tokio::spawn(async move {
        loop {
            reap();
            if children.recv().await.is_none() {
                break;
            }
        }
    });
    Ok(())
}

/// Waits for the exit of the child `pid`, or returns at once if it was reaped just before.
///
/// The call itself makes the claim, not the first poll of the future that it returns.
pub fn exited(pid: u32) -> impl Future<Output = Exit> + Send + use<> {
    let told = exits().get_or_insert_default().claim(pid, Instant::now());
    async move {
        match told.await {
            Ok(exit) => exit,
            // The sender is dropped only with the table, which lives as long as the process.
            Err(_) => std::future::pending().await,
        }
    }
}

/// Takes every zombie there is.
fn reap() {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                let at = SystemTime::now();
                if let Some(end) = end_of(status) {
                    let pid = pid.as_raw_nonzero().get().unsigned_abs();
                    exits()
                        .get_or_insert_default()
                        .record(pid, Exit { end, at }, Instant::now());
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            // None left, or no child at all.
            Ok(None) | Err(_) => return,
        }
    }
}

fn end_of(status: WaitStatus) -> Option<End> {
    let byte = |value: i32| u8::try_from(value & 0xff).unwrap_or(u8::MAX);
    if let Some(code) = status.exit_status() {
        return Some(End::Code(byte(code)));
    }
    // Without WUNTRACED and WCONTINUED there is nothing else.
    status
        .terminating_signal()
        .map(|signal| End::Signal(byte(signal)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: u8) -> Exit {
        Exit {
            end: End::Code(code),
            at: SystemTime::now(),
        }
    }

    #[test]
    fn an_exit_reaches_who_asks_before_and_who_asks_late() {
        let (mut exits, now) = (Exits::default(), Instant::now());
        let mut early = exits.claim(7, now);
        let (seven, eight) = (exit(1), exit(2));
        exits.record(7, seven, now);
        exits.record(8, eight, now);
        assert_eq!(early.try_recv(), Ok(seven));
        assert_eq!(exits.claim(8, now).try_recv(), Ok(eight));
        assert!(exits.claim(8, now).try_recv().is_err(), "told once");
    }

    #[test]
    fn an_unclaimed_exit_is_not_taken_for_a_later_process_of_the_same_pid() {
        let (mut exits, now) = (Exits::default(), Instant::now());
        exits.record(7, exit(1), now);
        let later = now + KEPT_FOR + Duration::from_secs(1);
        assert!(exits.claim(7, later).try_recv().is_err());
    }

    #[test]
    fn orphans_without_number_are_not_kept() {
        let (mut exits, now) = (Exits::default(), Instant::now());
        for pid in 1..3 * KEPT as u32 {
            exits.record(pid, exit(0), now);
        }
        assert!(exits.unclaimed.len() <= KEPT + 1);
        drop(exits.claim(9_999_999, now));
        exits.record(1, exit(0), now);
        assert!(exits.waiting.is_empty(), "a claimant who left is forgotten");
    }

    #[test]
    fn a_status_is_as_a_shell_sees_it() {
        assert_eq!(End::Code(7).status(), 7);
        assert_eq!(End::Signal(9).status(), 137);
    }
}
