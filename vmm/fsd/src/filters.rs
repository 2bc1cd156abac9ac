//! A filter of system calls for each kind of thread; a call that its list has not kills the server
//! (seccomp(2)). The lists are in `kata_like_jail::lists::fsd`.
//!
//! All threads are made first. `serve` closes those that it makes; the library makes the others,
//! and closes them where it first calls `backend`.

use std::fmt;

use kata_like_jail::JailError;
use kata_like_jail::lists::{Thread, fsd};
use kata_like_jail::seccomp::{Filter, Threads};
use rustix::process::getpid;

/// The kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Serves the guest's requests.
    Worker,
    /// Answers the VMM's vhost-user messages.
    Vhost,
    /// Waits: for the others, for the shim.
    Waiter,
}

impl Kind {
    fn thread(self) -> &'static Thread {
        match self {
            Self::Worker => &fsd::WORKER,
            Self::Vhost => &fsd::VHOST,
            Self::Waiter => &fsd::WAITER,
        }
    }
}

/// A filter for each kind.
#[derive(Clone)]
pub struct Filters {
    worker: Filter,
    vhost: Filter,
    waiter: Filter,
}

impl Filters {
    /// Compiles the lists.
    pub fn new() -> Result<Self, JailError> {
        let filter = |kind: Kind| kind.thread().filter(getpid(), &[]);
        Ok(Self {
            worker: filter(Kind::Worker)?,
            vhost: filter(Kind::Vhost)?,
            waiter: filter(Kind::Waiter)?,
        })
    }

    /// From now on the calling thread makes the calls of its list and no other.
    pub fn close(&self, kind: Kind) -> Result<(), JailError> {
        let filter = match kind {
            Kind::Worker => &self.worker,
            Kind::Vhost => &self.vhost,
            Kind::Waiter => &self.waiter,
        };
        filter.install(Threads::Calling)
    }
}

impl fmt::Debug for Filters {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        to.write_str("Filters")
    }
}

#[cfg(test)]
mod tests;
