//! A process that the host knows by name: the init of a container, or an exec.
//!
//! Made by `container.rs` when the runner has set it up. It is reached only by its pidfd, so that
//! no signal ever hits a later process with the same pid.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kata_like_failure::Failure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use tokio::sync::watch;

use crate::stdio::Streams;

/// The highest signal, the kernel's SIGRTMAX.
pub const MAX_SIGNAL: u32 = 64;

/// One process with its streams.
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    streams: Streams,
    gone: watch::Sender<bool>,
}

impl Process {
    pub fn new(pid: u32, pidfd: OwnedFd, streams: Streams) -> Self {
        Self {
            pid,
            pidfd,
            streams,
            gone: watch::Sender::new(false),
        }
    }

    /// The pid in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Sends a signal. `Ok(false)`: the process has exited.
    pub fn signal(&self, signal: u32) -> Result<bool, Failure> {
        send(self.pidfd.as_fd(), self.pid, signal)
    }

    /// Notes that the exit is told, or is about to be.
    pub fn set_gone(&self) {
        self.gone.send_replace(true);
    }

    /// Waits for `set_gone`.
    pub async fn gone(&self) {
        // The sender is ours, so only the value ends this.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }
}

/// Sends `signal` to the process behind `pidfd`. `Ok(false)`: it has exited.
pub fn send(pidfd: BorrowedFd<'_>, pid: u32, signal: u32) -> Result<bool, Failure> {
    let number = i32::try_from(signal).unwrap_or(0);
    if !(1..=MAX_SIGNAL).contains(&signal) {
        return Err(Failure::bad(
            "signal",
            format!("{signal} is not 1 to {MAX_SIGNAL}"),
        ));
    }
    // SAFETY: the caution is about signals that the C library keeps for itself. Those concern the
    // process that receives them, which is not this one; the number is one that the kernel has.
    let signal = unsafe { Signal::from_raw_unchecked(number) };
    match pidfd_send_signal(pidfd, signal) {
        Ok(()) => Ok(true),
        Err(Errno::SRCH) => Ok(false),
        Err(errno) => Err(Failure::failed(
            format!("send signal {number} to process {pid}"),
            errno,
        )),
    }
}

/// Whether the process behind `pidfd` has exited, reaped or not (pidfd_open(2): it then polls as
/// readable).
pub fn exited(pidfd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    let ready = poll(&mut polled, Some(&Timespec::default()));
    ready.is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use std::process::Command;

    #[test]
    fn a_process_is_signalled_until_it_has_exited() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        assert!(!exited(pidfd.as_fd()));
        for bad in [0, MAX_SIGNAL + 1, u32::MAX] {
            assert!(send(pidfd.as_fd(), child.id(), bad).is_err(), "{bad}");
        }
        // A real-time signal ends what does not expect it, like any other.
        send(pidfd.as_fd(), child.id(), MAX_SIGNAL).unwrap();
        child.wait().unwrap();
        assert!(exited(pidfd.as_fd()));
        assert!(!send(pidfd.as_fd(), child.id(), 15).unwrap());
    }
}
