//! How the library's threads come by their filters: it makes them and has no place for that.
//!
//! Each share's `backend` has one of these. The worker closes at an event that waits for it from
//! the beginning, before any request can come; `serve` waits until it has. The vhost thread closes
//! at the VMM's first message. Requests need the guest's memory, which comes by a later one.
//!
//! Without its filter no thread goes on: the process ends, and `last_words` says why.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process;
use std::sync::Once;
use std::sync::mpsc::Sender;

use kata_like_jail::JailError;
use rustix::event::{EventfdFlags, eventfd};

use crate::filters::{Filters, Kind};

/// See the module.
#[derive(Debug)]
pub struct Closing {
    filters: Filters,
    event: OwnedFd,
    closed: Sender<Kind>,
    vhost: Once,
}

impl Closing {
    /// Tells `closed` when the worker has its filter.
    pub fn new(filters: Filters, closed: Sender<Kind>) -> std::io::Result<Self> {
        Ok(Self {
            filters,
            event: eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            closed,
            vhost: Once::new(),
        })
    }

    /// The descriptor that is readable until [`Closing::worker`] was called.
    pub fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// For the worker, at the event.
    pub fn worker(&self) {
        let _ = rustix::io::read(self.event.as_fd(), &mut [0u8; 8]);
        or_end(self.filters.close(Kind::Worker));
        // `serve` has given up if nobody listens, and the process ends.
        let _ = self.closed.send(Kind::Worker);
    }

    /// For the thread of vhost-user, at each message.
    pub fn vhost(&self) {
        self.vhost
            .call_once(|| or_end(self.filters.close(Kind::Vhost)));
    }
}

fn or_end(closed: Result<(), JailError>) {
    if let Err(error) = closed {
        log::error!("{}", kata_like_failure::one_line(&error));
        process::exit(1);
    }
}
