//! Virtio devices (virtio 1.2): the traits of an idle and of an active device.
//!
//! `mmio` moves a device through its states. `reactor` calls an active one when the guest has
//! notified a queue or when a host descriptor is ready. A device knows neither transport nor KVM.
//!
//! ```text
//!   Device ──DRIVER_OK: activate──▶ Active ──notified(queue), ready(token)──▶ Active
//!      ▲                              │ Err(Guest): DEVICE_NEEDS_RESET until the driver resets
//!      └────────status 0: reset───────┘ Err(Host): the VM ends with that line as its reason
//! ```
//!
//! How a device works:
//! - `activate` takes its queues out of [`Activation::queues`], registers host descriptors with
//!   [`Activation::host`] under tokens of its own, and returns its running self.
//! - `notified(i)` serves queue `i`: `while let Some(mut chain) = queue.next_chain()? { …;
//!   queue.give_back(chain)?; }` and then `queue.signal()?` once. [`Virtqueue::serve`] is that
//!   loop. It is bounded, so a guest that never stops adding buffers can't hold the thread.
//! - A chain that can't be filled yet goes back with [`Virtqueue::undo`].
//! - All calls come with the device's lock held: `notified` and `ready` from the reactor's thread,
//!   `activate` and `reset` from that of `life`. The first two may not block, and so neither may a
//!   `reset` that follows their error. Else `activate` and `reset` may block, with a deadline, if
//!   nothing is registered with [`Activation::host`] meanwhile: the reactor passes by what it can't
//!   lock, and would find it ready again and again. After a reset a stale `ready` may still come,
//!   for a token of the device's earlier life. It is harmless, since descriptors are non-blocking.
//! - `reset` drops the queues. The device unregisters the descriptors that are still watched.

#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::as_conversions))]

pub(crate) mod block;
pub mod chain;
pub(crate) mod fs;
mod guest;
pub(crate) mod life;
pub(crate) mod mmio;
pub(crate) mod net;
mod number;
pub(crate) mod queue;
pub(crate) mod rng;
mod vectors;
pub mod vsock;
pub(crate) mod worker;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;
use vmm_sys_util::eventfd::EventFd;

pub use chain::Chain;
pub use guest::{GuestRam, Interrupt};
pub(crate) use queue::{QueueError, Virtqueue};

/// The feature bits of every device whose queues [`Virtqueue`] serves: VIRTIO_F_VERSION_1,
/// VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX (virtio 1.2, 6).
pub const RING_FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29;

/// What a driver must not do.
const QUEUE_DISABLED: &str = "sets DRIVER_OK with a queue disabled that the device needs";

/// VIRTIO_F_EVENT_IDX.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// VIRTIO_F_VERSION_1. We serve no driver without it.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

/// Device types (virtio 1.2, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A network interface (5.1).
    Net,
    /// A disk (5.2).
    Block,
    /// Random numbers (5.4).
    Entropy,
    /// A socket device (5.10).
    Vsock,
    /// A file system (5.11).
    Fs,
}

impl Kind {
    /// What the guest reads as DeviceID.
    pub fn id(self) -> u32 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Entropy => 4,
            Self::Vsock => 19,
            Self::Fs => 26,
        }
    }
}

/// Why a device can't go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest's driver broke a rule. Its device asks for a reset; the VM goes on.
    #[error("the guest's driver: {rule}")]
    Guest {
        /// What the driver must not do.
        rule: &'static str,
    },
    /// The rings, or a chain in them, are malformed: like [`DeviceError::Guest`].
    #[error("the guest's virtqueue")]
    Queue(#[from] QueueError),
    /// A chain has fewer bytes than its device must read or write.
    #[error("the guest's descriptor chain")]
    Chain(#[from] chain::Malformed),
    /// The host's side failed, and the VM can't go on.
    #[error("{step}")]
    Host {
        /// What was being done, and to what.
        step: String,
        /// The host's own error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl DeviceError {
    /// A failure of the host's side. `step` says what was being done, and to what.
    pub fn host(
        step: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Host {
            step: step.into(),
            source: source.into(),
        }
    }
}

/// A device that the guest has not switched on. DRIVER_OK (virtio 1.2, 3.1.1) brings memory, queues
/// and interrupt.
pub trait Device: Send {
    /// What the guest reads as DeviceID.
    fn kind(&self) -> Kind;
    /// All feature bits that the device offers, including [`RING_FEATURES`].
    fn features(&self) -> u64;
    /// The largest size of each queue; powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// How many of the queues, from the first on, it can't do without.
    fn needed_queues(&self) -> usize {
        self.queue_sizes().len()
    }
    /// The configuration space, which the guest can only read.
    fn config(&self) -> &[u8];
    /// Whether this process serves the queues. If not (vhost-user), nobody here listens to their
    /// notifications.
    fn serves_queues(&self) -> bool {
        true
    }
    /// Switches the device on. The queues that it needs are there. An error is the host's failure
    /// and ends the VM.
    fn activate(self: Box<Self>, guest: Activation) -> Result<Box<dyn Active>, DeviceError>;
}

/// The same device, running.
pub trait Active: Send {
    /// Called when the guest has notified this queue, or when the last call left chains in it.
    fn notified(&mut self, queue: u16) -> Result<(), DeviceError>;
    /// Called when the host descriptor registered under `token` is ready.
    fn ready(&mut self, token: Token) -> Result<(), DeviceError>;
    /// Status 0: drops the queues and returns the idle device.
    fn reset(self: Box<Self>) -> Result<Box<dyn Device>, DeviceError>;
}

/// What DRIVER_OK hands to a device.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestRam,
    /// The negotiated feature bits: a subset of [`Device::features`].
    pub features: u64,
    /// One per entry of [`Device::queue_sizes`], in that order. Each lies wholly in guest memory.
    /// `None`: the driver left that queue disabled.
    pub queues: Vec<Option<Virtqueue>>,
    /// Registers host descriptors of the device.
    pub host: HostEvents,
    /// Raises the device's interrupt. Each [`Virtqueue`] holds it, too.
    pub interrupt: Arc<Interrupt>,
}

impl Activation {
    /// Takes queue `index`. Fails if the driver has not enabled it.
    pub fn take_queue(&mut self, index: usize) -> Result<Virtqueue, DeviceError> {
        self.queues
            .get_mut(index)
            .and_then(Option::take)
            .ok_or(DeviceError::Guest {
                rule: QUEUE_DISABLED,
            })
    }
}

/// A device's own name for a host descriptor that it has registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u32);

/// One device's access to the reactor's epoll set. Descriptors are watched level-triggered.
#[derive(Clone)]
pub struct HostEvents {
    epoll: Arc<OwnedFd>,
    /// The upper half of the epoll data: it tells the reactor whose token it is.
    owner: u32,
}

impl HostEvents {
    /// For the device in slot `owner`. The reactor makes it.
    pub fn new(epoll: Arc<OwnedFd>, owner: u32) -> Self {
        Self { epoll, owner }
    }

    fn data(&self, token: Token) -> epoll::EventData {
        epoll::EventData::new_u64(u64::from(self.owner) << 32 | u64::from(token.0))
    }

    /// From now on calls [`Active::ready`] with `token` while `fd` has any of `events` (always HUP
    /// and ERR).
    pub fn watch(
        &self,
        fd: impl AsFd,
        token: Token,
        events: epoll::EventFlags,
    ) -> Result<(), DeviceError> {
        epoll::add(&*self.epoll, fd, self.data(token), events)
            .map_err(|errno| DeviceError::host("watch a descriptor", io::Error::from(errno)))
    }

    /// Changes which events of a watched descriptor count.
    pub fn change(
        &self,
        fd: impl AsFd,
        token: Token,
        events: epoll::EventFlags,
    ) -> Result<(), DeviceError> {
        epoll::modify(&*self.epoll, fd, self.data(token), events).map_err(|errno| {
            DeviceError::host("watch a descriptor otherwise", io::Error::from(errno))
        })
    }

    /// Stops watching `fd`. Call it before closing `fd` if a duplicate lives on.
    pub fn unwatch(&self, fd: impl AsFd) -> Result<(), DeviceError> {
        epoll::delete(&*self.epoll, fd).map_err(|errno| {
            DeviceError::host("stop watching a descriptor", io::Error::from(errno))
        })
    }
}

/// An eventfd as a descriptor to watch; the type itself does not offer it.
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns the descriptor and stays borrowed for as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
