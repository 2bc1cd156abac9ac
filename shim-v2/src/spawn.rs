//! A child process of the shim: born in its cgroup, with the descriptors it is handed and no other,
//! watched and reaped by its pidfd.
//!
//! Called by `launch` (vmm, fsd), `stand_in` and `bootstrap` (the daemon). A child is never moved
//! into its cgroup afterwards: clone3(2) with CLONE_INTO_CGROUP puts it there before its first
//! instruction. Nobody in the shim waits for "any child": each is waited for through its pidfd,
//! by [`Child`] alone.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

pub use kata_like_linux::birth::{Birth, BirthError, Network, Newborn, birth};
use kata_like_linux::watch::Watched;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use tokio::io::Interest;
use tokio::sync::watch;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(to, "ended with status {status}"),
            Self::Signal(signal) => write!(to, "was killed by signal {signal}"),
        }
    }
}

/// A child that a task of the runtime watches and reaps.
#[derive(Clone, Debug)]
pub struct Child {
    /// Its pid; its own as long as it has not been reaped.
    pub pid: u32,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Child {
    /// Watches a process. Needs a runtime of tokio.
    pub fn watch(newborn: Newborn) -> io::Result<Self> {
        let pidfd = Arc::new(newborn.pidfd);
        let (tell, exit) = watch::channel(None);
        let watched = Watched::new(Arc::clone(&pidfd), Interest::READABLE)?;
        tokio::spawn(async move {
            let exit = reap(&watched).await;
            tell.send_replace(Some(exit));
        });
        Ok(Self {
            pid: newborn.pid,
            pidfd,
            exit,
        })
    }

    /// Waits for its end.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::Status(-1)),
            // The runtime is going down, and the watching task with it.
            Err(_) => Exit::Status(-1),
        }
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Kills it; nothing happens to one that has ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Kills it and waits until it is gone, at most `limit`; `false` if it is not gone by then.
    pub async fn end(&self, limit: Duration) -> bool {
        self.kill();
        tokio::time::timeout(limit, self.exited()).await.is_ok()
    }
}

async fn reap(pidfd: &Watched<Arc<OwnedFd>>) -> Exit {
    loop {
        // An error here is the reactor's end; the state is then asked for all the same.
        let readable = pidfd.readable().await;
        let fd = pidfd.get_ref().as_fd();
        match waitid(
            WaitId::PidFd(fd),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(Some(status)) => {
                return match (status.exit_status(), status.terminating_signal()) {
                    (Some(status), _) => Exit::Status(status),
                    (None, signal) => Exit::Signal(signal.unwrap_or_default()),
                };
            }
            Err(rustix::io::Errno::CHILD) => return Exit::Status(-1),
            Ok(None) | Err(_) => match readable {
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => return Exit::Status(-1),
            },
        }
    }
}

#[cfg(test)]
mod tests;
