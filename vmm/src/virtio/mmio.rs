//! The virtio-mmio transport: registers and the status machine (virtio 1.2, 3.1.1 and 4.2.2).
//!
//! `bus` brings register accesses from vCPU threads, `reactor` brings events, `machine` fills
//! slots. The transport knows devices only by their traits, and no KVM. The guest's accesses may
//! have any size, offset and order.
//!
//! Invariants, against a driver that keeps no rule:
//! - Feature bits change only between DRIVER and FEATURES_OK. Queues change only between
//!   FEATURES_OK and DRIVER_OK, and only while not ready. From DRIVER_OK on everything is frozen
//!   until a reset.
//! - Only a reset clears a status bit. A status bit is set only after those that it builds on.
//! - If a driver breaks its rings, its device is idle and DEVICE_NEEDS_RESET is set.
//!
//! InterruptStatus and InterruptACK need no lock of the device: a vCPU that takes an interrupt does
//! not wait for a device at work.
//!
//! A vCPU's thread only reads and writes registers. A status write that switches the device on or
//! off comes back as a [`Switch`], for the thread of `life` to carry out. The event loop waits for
//! neither: while the lock is held it passes a device's event by, and epoll reports it again.

mod registers;
mod state;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use kata_like_linux::lock;
use rustix::event::epoll::EventFlags;
use vmm_sys_util::eventfd::EventFd;

use super::number;
use super::queue::QueueLayout;
use super::{
    Activation, Active, Device, DeviceError, FEATURE_EVENT_IDX, FEATURE_VERSION_1, GuestRam,
    HostEvents, Interrupt, Kind, QUEUE_DISABLED, Token, Virtqueue, descriptor,
};

/// QueueNotify: the value written is the queue's number. KVM passes it to the queue's eventfd.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Tokens from here on belong to the transport: queue numbers.
const QUEUE_TOKENS: u32 = 1 << 31;

const CONFIG_SPACE: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// Why a slot can't be filled or emptied.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error("fill slot {0}: it holds a device already")]
    Taken(usize),
    /// The slot is meant for another kind of device.
    #[error("fill slot {slot}: the device has {queues} queues")]
    Queues { slot: usize, queues: usize },
    #[error("empty slot {0}: it holds no device")]
    Empty(usize),
    /// The guest's driver has not let go of it.
    #[error("empty slot {0}: the guest's driver holds the device")]
    Held(usize),
}

/// A status write that switches a device on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the driver waits for it"]
pub struct Switch(u32);

/// One slot: empty, or a device and its registers.
pub struct Slot {
    index: usize,
    memory: GuestRam,
    interrupt: Arc<Interrupt>,
    host: HostEvents,
    transport: Mutex<Transport>,
}

/// What the registers say of a device in any state.
struct Facts {
    kind: Kind,
    features: u64,
    queue_sizes: Vec<u16>,
    config: Vec<u8>,
    serves_queues: bool,
}

enum State {
    Empty,
    Idle(Box<dyn Device>),
    Active(Box<dyn Active>),
    /// The host's side has failed, and the VM is about to end.
    Failed,
}

/// A queue as the driver sets it up.
#[derive(Clone, Copy, Default)]
struct QueueRegisters {
    layout: QueueLayout,
    ready: bool,
}

struct Transport {
    state: State,
    facts: Option<Facts>,
    kicks: Vec<Arc<EventFd>>,
    queues: Vec<QueueRegisters>,
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
}

impl Slot {
    /// Makes an empty slot. `interrupt` is connected to the slot's pin; the guest's notifications
    /// signal `kicks`, one for each queue that a device here may have.
    pub fn new(
        index: usize,
        memory: GuestRam,
        interrupt: Arc<Interrupt>,
        epoll: Arc<OwnedFd>,
        kicks: Vec<Arc<EventFd>>,
    ) -> Self {
        Self {
            index,
            memory,
            interrupt,
            host: HostEvents::new(epoll, number::small(index)),
            transport: Mutex::new(Transport {
                state: State::Empty,
                facts: None,
                kicks,
                queues: Vec::new(),
                status: 0,
                driver_features: 0,
                device_features_select: 0,
                driver_features_select: 0,
                queue_select: 0,
            }),
        }
    }

    /// Puts a device in.
    pub fn fill(&self, device: Box<dyn Device>) -> Result<(), SlotError> {
        // An empty slot is never being switched: this waits for a register's access at most.
        let mut transport = self.lock();
        if !matches!(transport.state, State::Empty) {
            return Err(SlotError::Taken(self.index));
        }
        let queue_sizes = device.queue_sizes().to_vec();
        if queue_sizes.len() > transport.kicks.len() {
            return Err(SlotError::Queues {
                slot: self.index,
                queues: queue_sizes.len(),
            });
        }
        transport.queues = vec![QueueRegisters::default(); queue_sizes.len()];
        transport.facts = Some(Facts {
            kind: device.kind(),
            features: device.features(),
            queue_sizes,
            config: device.config().to_vec(),
            serves_queues: device.serves_queues(),
        });
        transport.state = State::Idle(device);
        Ok(())
    }

    /// Whether the slot holds no device. It is not empty while its device's driver is at work.
    pub fn is_empty(&self) -> bool {
        let transport = self.try_lock();
        transport.is_some_and(|transport| matches!(transport.state, State::Empty))
    }

    /// Takes out a device that its driver has let go of, and drops it. Never waits, not even for a
    /// driver at work.
    pub fn empty(&self) -> Result<(), SlotError> {
        let mut transport = self.try_lock().ok_or(SlotError::Held(self.index))?;
        match transport.state {
            // A bus also acknowledges a device that no driver has (ACKNOWLEDGE alone).
            State::Idle(_) if transport.status & DRIVER == 0 => {}
            State::Empty => return Err(SlotError::Empty(self.index)),
            _ => return Err(SlotError::Held(self.index)),
        }
        transport.state = State::Empty;
        transport.facts = None;
        self.forget_driver(&mut transport);
        transport.queues.clear();
        Ok(())
    }

    /// The read of a register. Anything that is no register reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_SPACE {
            return self.lock().read_config(offset - CONFIG_SPACE, data);
        }
        // Registers are 32 bits wide and aligned (4.2.2.2); any other access reads as 0.
        let Ok(register) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let value = match offset {
            0x60 => self.interrupt.status(),
            _ => self.lock().read(offset),
        };
        *register = value.to_le_bytes();
    }

    /// The write of a register. A write to anything else is ignored. A switch is the caller's to
    /// have carried out, by [`Slot::switch`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Option<Switch> {
        let value = u32::from_le_bytes(data.try_into().ok()?);
        match offset {
            0x64 => self.interrupt.acknowledge(value),
            0x70 => return self.write_status(value),
            _ => self.lock().write(offset, value),
        }
        None
    }

    /// Called when a descriptor of this slot's device is ready: a queue's notification or one of
    /// the device. Never waits. While the device is switched, or a vCPU is at its registers,
    /// nothing happens: descriptors are watched level-triggered, so what still counts comes again.
    pub fn ready(&self, token: u32) -> Result<(), DeviceError> {
        let Some(mut transport) = self.try_lock() else {
            return Ok(());
        };
        let queue = token.checked_sub(QUEUE_TOKENS);
        if let Some(kick) = queue.and_then(|queue| transport.kicks.get(number::index(queue))) {
            // Level-triggered, so it must be read. EAGAIN: another thread has read it, and nothing
            // is lost.
            let _ = kick.read();
        }
        let State::Active(device) = &mut transport.state else {
            return Ok(()); // an event from before a reset
        };
        let result = match queue {
            // A token beyond all queues is nobody's.
            Some(queue) => match u16::try_from(queue) {
                Ok(queue) => device.notified(queue),
                Err(_) => Ok(()),
            },
            None => device.ready(Token(token)),
        };
        self.settle(&mut transport, result)
    }

    /// A panic under the lock ends the VM anyway; until then the state is still whole.
    fn lock(&self) -> MutexGuard<'_, Transport> {
        lock(&self.transport)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Transport>> {
        match self.transport.try_lock() {
            Ok(transport) => Some(transport),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn write_status(&self, value: u32) -> Option<Switch> {
        let mut transport = self.lock();
        if transport.switches(value) {
            return Some(Switch(value));
        }
        match value {
            0 => self.forget_driver(&mut transport),
            _ => transport.status |= transport.admitted(value),
        }
        None
    }

    /// Carries a switch out. This may wait for the host, with a deadline of the device's.
    pub fn switch(&self, Switch(value): Switch) -> Result<(), DeviceError> {
        let mut transport = self.lock();
        if value == 0 {
            let result = self.make_idle(&mut transport);
            self.forget_driver(&mut transport);
            return result;
        }
        // Another vCPU may have written meanwhile, so what counts is what may be set now.
        let bits = transport.admitted(value);
        transport.status |= bits;
        if bits & DRIVER_OK == 0 {
            return Ok(());
        }
        let result = self.activate(&mut transport);
        self.settle(&mut transport, result)
    }

    fn forget_driver(&self, transport: &mut Transport) {
        transport.forget_driver();
        self.interrupt.acknowledge(u32::MAX);
    }

    /// The guest's fault: the device goes idle and asks for a reset. The host's fault: the
    /// caller's.
    fn settle(
        &self,
        transport: &mut Transport,
        result: Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        match result {
            Ok(()) => Ok(()),
            Err(DeviceError::Host { step, source }) => {
                transport.state = State::Failed;
                Err(DeviceError::Host { step, source })
            }
            Err(_) => {
                let stopped = self.make_idle(transport);
                transport.status |= NEEDS_RESET;
                self.interrupt.raise(Interrupt::CONFIG);
                stopped
            }
        }
    }

    fn activate(&self, transport: &mut Transport) -> Result<(), DeviceError> {
        let device = match std::mem::replace(&mut transport.state, State::Failed) {
            State::Idle(device) => device,
            other => {
                transport.state = other;
                return Ok(());
            }
        };
        let queues = transport.virtqueues(&self.memory, &self.interrupt);
        // Whatever the driver does wrong must leave the device as it is: a reset brings it back.
        let queues = match queues.and_then(|queues| complete(queues, device.needed_queues())) {
            Ok(queues) => queues,
            Err(error) => {
                transport.state = State::Idle(device);
                return Err(error);
            }
        };
        let served: Vec<bool> = queues.iter().map(Option::is_some).collect();
        let active = device.activate(Activation {
            memory: self.memory.clone(),
            features: transport.driver_features,
            queues,
            host: self.host.clone(),
            interrupt: self.interrupt.clone(),
        })?;
        transport.state = State::Active(active);
        if transport
            .facts
            .as_ref()
            .is_some_and(|facts| facts.serves_queues)
        {
            for ((queue, kick), _) in (0u32..)
                .zip(&transport.kicks)
                .zip(&served)
                .filter(|(_, served)| **served)
            {
                let token = Token(QUEUE_TOKENS + queue);
                self.host.watch(descriptor(kick), token, EventFlags::IN)?;
            }
        }
        Ok(())
    }

    fn make_idle(&self, transport: &mut Transport) -> Result<(), DeviceError> {
        match std::mem::replace(&mut transport.state, State::Failed) {
            State::Active(device) => {
                for kick in &transport.kicks {
                    // ENOENT: a queue that was not enabled is not watched.
                    let _ = self.host.unwatch(descriptor(kick));
                }
                transport.state = State::Idle(device.reset()?);
            }
            other => transport.state = other,
        }
        Ok(())
    }
}

/// The queues, if the first `needed` of them are enabled.
fn complete(
    queues: Vec<Option<Virtqueue>>,
    needed: usize,
) -> Result<Vec<Option<Virtqueue>>, DeviceError> {
    match queues.iter().take(needed).all(Option::is_some) {
        true => Ok(queues),
        false => Err(DeviceError::Guest {
            rule: QUEUE_DISABLED,
        }),
    }
}

impl Transport {
    /// Status 0: forgets everything that a driver has written.
    fn forget_driver(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.queues.fill(QueueRegisters::default());
    }

    /// Whether a status write switches the device on, or off.
    fn switches(&self, value: u32) -> bool {
        match value {
            0 => matches!(self.state, State::Active(_)),
            _ => self.admitted(value) & DRIVER_OK != 0,
        }
    }

    /// The bits of a status write that may be set now and are not set yet.
    fn admitted(&self, value: u32) -> u32 {
        let has = |bits| self.status & bits == bits;
        if has(FAILED) || has(NEEDS_RESET) || matches!(self.state, State::Empty) {
            return 0;
        }
        let mut status = self.status;
        let mut admit = |bit, after: u32, allowed| {
            if value & bit != 0 && status & after == after && allowed {
                status |= bit;
            }
        };
        admit(ACKNOWLEDGE, 0, true);
        admit(DRIVER, ACKNOWLEDGE, true);
        admit(
            FEATURES_OK,
            ACKNOWLEDGE | DRIVER,
            self.features_acceptable(),
        );
        // In one write with FEATURES_OK the driver could not have read whether we accepted the
        // features.
        admit(
            DRIVER_OK,
            ACKNOWLEDGE | DRIVER | FEATURES_OK,
            has(FEATURES_OK),
        );
        admit(FAILED, 0, true);
        status & !self.status
    }

    fn features_acceptable(&self) -> bool {
        let offered = self.facts.as_ref().map_or(0, |facts| facts.features);
        self.driver_features & !offered == 0 && self.driver_features & FEATURE_VERSION_1 != 0
    }

    fn virtqueues(
        &self,
        memory: &GuestRam,
        interrupt: &Arc<Interrupt>,
    ) -> Result<Vec<Option<Virtqueue>>, DeviceError> {
        let sizes = self.facts.iter().flat_map(|facts| &facts.queue_sizes);
        let all = self.queues.iter().zip(&self.kicks).zip(sizes);
        all.map(|((queue, kick), max_size)| {
            if !queue.ready {
                return Ok(None);
            }
            let queue = Virtqueue::new(
                queue.layout,
                *max_size,
                self.driver_features & FEATURE_EVENT_IDX != 0,
                memory.clone(),
                interrupt.clone(),
                kick.clone(),
            )?;
            Ok(Some(queue))
        })
        .collect()
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
