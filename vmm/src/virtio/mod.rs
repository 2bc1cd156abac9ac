//! Virtio devices (virtio 1.2): the traits of a device idle and a device active.
//!
//! `mmio` moves a device through its states; `reactor` calls an active one when the guest has
//! notified a queue or a host descriptor is ready. A device knows neither transport nor KVM.
//!
//! ```text
//!   Device ──DRIVER_OK: activate──▶ Active ──notified(queue), ready(token)──▶ Active
//!      ▲                              │ Err(Guest): DEVICE_NEEDS_RESET until the driver resets
//!      └────────status 0: reset───────┘ Err(Host): the VM ends with that line as its reason
//! ```
//!
//! How a device uses it:
//! - `activate` takes its queues out of [`Activation::queues`], registers host descriptors with
//!   [`Activation::host`] under tokens of its own, and returns its running self.
//! - `notified(i)` serves queue `i`: `while let Some(mut chain) = queue.next_chain()? { …;
//!   queue.give_back(chain)?; }` and then `queue.signal()?` once. [`Virtqueue::serve`] is that loop,
//!   bounded, so that a guest that never stops adding buffers can't hold the thread.
//! - A chain that can't be filled yet goes back with [`Virtqueue::undo`].
//! - All calls come with the device's lock held, from the reactor's thread (`notified`, `ready`) or
//!   a vCPU's (`activate`, `reset`). The former may not block. The latter may, with a deadline, if
//!   nothing is registered with [`Activation::host`] meanwhile: then only vCPUs can come to wait.
//!   After a reset a stale `ready` may still come, for a token of the device's earlier life:
//!   descriptors are non-blocking, so it is harmless.
//! - `reset` drops the queues; descriptors that are still watched are unregistered by the device.

pub mod block;
pub mod chain;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;
pub mod worker;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::epoll;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use chain::Chain;
pub use queue::{QueueError, Virtqueue};

/// The guest's memory, as all devices see it.
pub type GuestRam = Arc<GuestMemoryMmap>;

/// The feature bits of every device whose queues [`Virtqueue`] serves: VIRTIO_F_VERSION_1,
/// VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX (virtio 1.2, 6).
pub const RING_FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29;

/// VIRTIO_F_EVENT_IDX.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// VIRTIO_F_VERSION_1: no driver without it is served.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

/// Device types (virtio 1.2, 5); the value is what the guest reads as DeviceID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Network interface.
    Net = 1,
    /// Disk.
    Block = 2,
    /// Entropy.
    Entropy = 4,
    /// Socket.
    Vsock = 19,
    /// File system.
    Fs = 26,
}

/// Why a device can't go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest's driver broke a rule: its device wants a reset, the VM goes on.
    #[error("the guest's driver: {rule}")]
    Guest {
        /// What it should not have done.
        rule: &'static str,
    },
    /// The rings or a chain in them are malformed: as [`DeviceError::Guest`].
    #[error("the guest's virtqueue")]
    Queue(#[from] QueueError),
    /// A chain has too few bytes for what its device must read or write.
    #[error("the guest's descriptor chain")]
    Chain(#[from] chain::Malformed),
    /// The host's side failed: the VM can't go on.
    #[error("{step}")]
    Host {
        /// What was being done, to what.
        step: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl DeviceError {
    /// A failure of the host's side: `step` says what was being done, to what.
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

/// A device the guest has not switched on. DRIVER_OK (virtio 1.2, 3.1.1) moves memory, queues and
/// interrupt in.
pub trait Device: Send {
    /// Its type.
    fn kind(&self) -> Kind;
    /// All feature bits it offers, [`RING_FEATURES`] included.
    fn features(&self) -> u64;
    /// The largest size of each of its queues; powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Its configuration space; read-only to the guest.
    fn config(&self) -> &[u8];
    /// Whether the queues are served in this process. Where not (vhost-user), nobody here listens
    /// to their notifications.
    fn serves_queues(&self) -> bool {
        true
    }
    /// Switches it on. An error is the host's failure and ends the VM.
    fn activate(self: Box<Self>, guest: Activation) -> Result<Box<dyn Active>, DeviceError>;
}

/// The same device, running.
pub trait Active: Send {
    /// The guest has notified this queue, or chains were left in it at the last call.
    fn notified(&mut self, queue: u16) -> Result<(), DeviceError>;
    /// A host descriptor registered under `token` is ready.
    fn ready(&mut self, token: Token) -> Result<(), DeviceError>;
    /// Status 0: drops the queues and gives the idle device back.
    fn reset(self: Box<Self>) -> Result<Box<dyn Device>, DeviceError>;
}

/// What DRIVER_OK hands to a device.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestRam,
    /// The feature bits that were negotiated: a subset of [`Device::features`].
    pub features: u64,
    /// One per entry of [`Device::queue_sizes`], in that order; each lies wholly in guest memory.
    /// `None`: the driver left that queue disabled.
    pub queues: Vec<Option<Virtqueue>>,
    /// Where the device registers host descriptors.
    pub host: HostEvents,
    /// Raises the device's interrupt; each [`Virtqueue`] holds it too.
    pub interrupt: Arc<Interrupt>,
}

impl Activation {
    /// Takes queue `index`, which the driver must have enabled.
    pub fn take_queue(&mut self, index: usize) -> Result<Virtqueue, DeviceError> {
        self.queues
            .get_mut(index)
            .and_then(Option::take)
            .ok_or(DeviceError::Guest {
                rule: "sets DRIVER_OK with a queue disabled that the device needs",
            })
    }
}

/// A device's own name for a host descriptor it has registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u32);

/// One device's access to the reactor's epoll set. Descriptors are watched level-triggered.
#[derive(Clone)]
pub struct HostEvents {
    epoll: Arc<OwnedFd>,
    /// The upper half of the epoll data: tells the reactor whose token it is.
    owner: u32,
}

impl HostEvents {
    /// For the device in slot `owner`; made by the reactor.
    pub fn new(epoll: Arc<OwnedFd>, owner: u32) -> Self {
        Self { epoll, owner }
    }

    fn data(&self, token: Token) -> epoll::EventData {
        epoll::EventData::new_u64(u64::from(self.owner) << 32 | u64::from(token.0))
    }

    /// Calls [`Active::ready`] with `token` while `fd` has any of `events` (HUP and ERR always).
    pub fn watch(
        &self,
        fd: impl AsFd,
        token: Token,
        events: epoll::EventFlags,
    ) -> Result<(), DeviceError> {
        epoll::add(&*self.epoll, fd, self.data(token), events)
            .map_err(|errno| DeviceError::host("watch a descriptor", io::Error::from(errno)))
    }

    /// Changes what a watched descriptor is watched for.
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

    /// No longer watches it. Must precede its closing if a duplicate of it lives on.
    pub fn unwatch(&self, fd: impl AsFd) -> Result<(), DeviceError> {
        epoll::delete(&*self.epoll, fd).map_err(|errno| {
            DeviceError::host("stop watching a descriptor", io::Error::from(errno))
        })
    }
}

/// An eventfd as a descriptor to watch: the type itself does not offer it.
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns the descriptor and stays borrowed for as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A device's interrupt: the InterruptStatus register and the irqfd behind it.
pub struct Interrupt {
    status: AtomicU32,
    irq: EventFd,
}

impl Interrupt {
    /// InterruptStatus bit 0: a buffer was used.
    pub const USED: u32 = 1;
    /// InterruptStatus bit 1: the configuration changed, or the device needs a reset.
    pub const CONFIG: u32 = 2;

    /// `irq` is registered with KVM as an irqfd by the caller.
    pub fn new(irq: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            irq,
        }
    }

    /// Sets status bits, then raises the interrupt.
    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // An eventfd whose counter is full (EAGAIN) is an interrupt that is pending anyway.
        let _ = self.irq.write(1);
    }

    /// InterruptStatus, for the transport.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// InterruptACK, for the transport.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The irqfd's eventfd, to be registered with KVM.
    pub fn irq(&self) -> &EventFd {
        &self.irq
    }
}
