//! Tells the guest the host's time: once more when it is up, and when the host's clock was stepped.
//!
//! Files have the host's time, and one that is in a guest's future is taken for an error by
//! programs such as make. The first call has the time, too, but travels while the guest is busy
//! with its start.
//!
//! A guest keeps its own time from the moment it was told; a step of the host's clock, by a person,
//! by NTP or by a suspended host that wakes up, is news to it. The kernel tells of a step by
//! cancelling a timer (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET); nothing is polled.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use kata_like_linux::watch::Watched;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::Interest;

use super::guest::Guest;

/// How often the guest is told of one step, should it not take it.
const TRIES: u32 = 3;
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(1);
/// When the timer would go off: never, as clocks go (2^40 s, in 36,000 years).
const NEVER: i64 = 1 << 40;

/// A watch on the host's clock.
#[derive(Debug)]
pub struct Clock(OwnedFd);

impl Clock {
    /// From here on no step is missed.
    pub fn watch() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let clock = Self(timerfd_create(TimerfdClockId::Realtime, flags)?);
        clock.arm()?;
        Ok(clock)
    }

    fn arm(&self) -> io::Result<()> {
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let never = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: NEVER,
                tv_nsec: 0,
            },
        };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        match timerfd_settime(&self.0, flags, &never) {
            // Armed, and the clock was stepped since the last time: the read says so too.
            Ok(_) | Err(Errno::CANCELED) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Tells the guest of every step, as long as its VM runs.
    pub fn follow(self, guest: Guest) -> io::Result<()> {
        let watched = Watched::new(self, Interest::READABLE)?;
        tokio::spawn(async move {
            let mut was_stepped = false;
            loop {
                if tell(&guest).await && was_stepped {
                    tracing::info!(
                        sandbox = %guest.sandbox,
                        "the host's clock was stepped: the guest has its time"
                    );
                }
                if !stepped(&watched, &guest).await {
                    return;
                }
                was_stepped = true;
            }
        });
        Ok(())
    }
}

impl AsFd for Clock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits for the next step; `false` when there is nothing to wait for any more.
async fn stepped(watched: &Watched<Clock>, guest: &Guest) -> bool {
    loop {
        let mut ready = tokio::select! {
            ready = watched.readable() => match ready {
                Ok(ready) => ready,
                Err(_) => return false,
            },
            _ = guest.vmm.ended() => return false,
        };
        match rustix::io::read(&watched.get_ref().0, &mut [0; 8]) {
            Err(Errno::CANCELED) => return watched.get_ref().arm().is_ok(),
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) | Ok(_) => {}
            Err(_) => return false,
        }
    }
}

/// Whether the guest has taken the time.
async fn tell(guest: &Guest) -> bool {
    for _ in 0..TRIES {
        if guest.is_ending() {
            return false;
        }
        match guest.agent.set_time().await {
            Ok(()) => return true,
            // A pod that ends meanwhile is none to be told.
            Err(_) if guest.is_ending() => return false,
            Err(error) => tracing::warn!(sandbox = %guest.sandbox, "{}", error.one_line()),
        }
        tokio::time::sleep(PAUSE).await;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unstepped_clock_is_quiet_and_can_be_armed_again() {
        let clock = Clock::watch().unwrap();
        let read = rustix::io::read(&clock.0, &mut [0; 8]);
        assert_eq!(read, Err(Errno::AGAIN));
        clock.arm().unwrap();
    }
}
