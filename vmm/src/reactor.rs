//! The process's one epoll set: descriptors of devices, the control socket, notices.
//!
//! `machine` waits here and passes each event on. Devices register through `virtio::HostEvents`,
//! which shares the set.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::descriptor;

const EVENTS_AT_ONCE: usize = 32;

/// Owners in epoll data that are no slot (see `virtio::HostEvents`).
const CONTROL: u32 = u32::MAX;
const NOTICES: u32 = u32::MAX - 1;

#[derive(Debug, thiserror::Error)]
#[error("{step} of the VMM's event loop")]
pub struct ReactorError {
    step: &'static str,
    #[source]
    source: io::Error,
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> ReactorError {
    move |source| ReactorError {
        step,
        source: source.into(),
    }
}

/// What is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A descriptor of the device in this slot; the device chose the token.
    Device {
        slot: usize,
        token: u32,
    },
    Control,
    Notice,
}

pub struct Reactor {
    epoll: Arc<OwnedFd>,
    events: Vec<epoll::Event>,
}

impl Reactor {
    pub fn new() -> Result<Self, ReactorError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed("make the epoll set"))?;
        Ok(Self {
            epoll: Arc::new(epoll),
            events: Vec::with_capacity(EVENTS_AT_ONCE),
        })
    }

    /// The epoll set, for the devices.
    pub fn epoll(&self) -> Arc<OwnedFd> {
        self.epoll.clone()
    }

    pub fn watch_control(&self, socket: impl AsFd) -> Result<(), ReactorError> {
        let data = EventData::new_u64(u64::from(CONTROL) << 32);
        epoll::add(&*self.epoll, socket, data, EventFlags::IN)
            .map_err(failed("watch the control socket"))
    }

    /// Makes a channel by which other threads and devices send the machine notices.
    pub fn notices<T>(&self) -> Result<(Notifier<T>, Notices<T>), ReactorError> {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed("make an eventfd"))?;
        let wake = Arc::new(wake);
        let data = EventData::new_u64(u64::from(NOTICES) << 32);
        epoll::add(&*self.epoll, descriptor(&wake), data, EventFlags::IN)
            .map_err(failed("watch notices"))?;
        let (sender, receiver) = mpsc::channel();
        let notices = Notices {
            receiver,
            wake: wake.clone(),
        };
        Ok((Notifier { sender, wake }, notices))
    }

    /// Waits until there is at least one event.
    pub fn wait(&mut self) -> Result<Vec<Event>, ReactorError> {
        loop {
            self.events.clear();
            let buffer = rustix::buffer::spare_capacity(&mut self.events);
            match epoll::wait(&*self.epoll, buffer, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(failed("wait for events")(errno)),
            }
        }
        let decode = |event: &epoll::Event| {
            let data = event.data.u64();
            match (data >> 32) as u32 {
                CONTROL => Event::Control,
                NOTICES => Event::Notice,
                slot => Event::Device {
                    slot: slot as usize,
                    token: data as u32, // the lower half
                },
            }
        };
        Ok(self.events.iter().map(decode).collect())
    }
}

/// The sending end. Each notice wakes the reactor.
pub struct Notifier<T> {
    sender: Sender<T>,
    wake: Arc<EventFd>,
}

impl<T> Clone for Notifier<T> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            wake: self.wake.clone(),
        }
    }
}

impl<T> Notifier<T> {
    /// Never blocks. If no receiver is left the machine is ending, and the notice is not needed.
    pub fn send(&self, notice: T) {
        let _ = self.sender.send(notice);
        // EAGAIN: the reactor is about to wake anyway.
        let _ = self.wake.write(1);
    }
}

pub struct Notices<T> {
    receiver: Receiver<T>,
    wake: Arc<EventFd>,
}

impl<T> Notices<T> {
    /// All notices that have come.
    pub fn take(&self) -> Vec<T> {
        let _ = self.wake.read(); // EAGAIN: none since the last time
        self.receiver.try_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::{HostEvents, Token};

    #[test]
    fn every_event_finds_its_owner() {
        let mut reactor = Reactor::new().unwrap();
        let (notifier, notices) = reactor.notices().unwrap();
        let device = EventFd::new(EFD_NONBLOCK).unwrap();
        let host = HostEvents::new(reactor.epoll(), 7);
        host.watch(descriptor(&device), Token(1 << 31), EventFlags::IN)
            .unwrap();
        device.write(1).unwrap();
        let expected = Event::Device {
            slot: 7,
            token: 1 << 31,
        };
        assert_eq!(reactor.wait().unwrap(), [expected]);
        host.unwatch(descriptor(&device)).unwrap();
        notifier.send("hello");
        notifier.send("again");
        assert_eq!(reactor.wait().unwrap(), [Event::Notice]);
        assert_eq!(notices.take(), ["hello", "again"]);
        assert!(notices.take().is_empty());
    }
}
