//! The VM's slots for devices, connected to KVM. They are filled at boot or later, and emptied
//! again.
//!
//! Called by `machine`. `layout` says which slot is for what. The number of slots never changes;
//! the guest's driver binds and unbinds a device when the agent asks it to. The eventfds of all
//! slots are made and connected before the jail closes: filling a slot later takes no system call.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kata_like_boot::QueueState;
use kata_like_jail::lists::vmm;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::jail::Jails;
use crate::kvm::{KvmError, Vm};
use crate::layout::{
    DISK_SLOT, DISK_SLOTS, NET_SLOT, NET_SLOTS, SLOT_IRQS, SLOT_QUEUES, slot_address,
};
use crate::reactor::Reactor;
use crate::virtio::block::{BadDisk, Block, Disk};
use crate::virtio::mmio::{QUEUE_NOTIFY, Slot, SlotError};
use crate::virtio::net::{Net, Tap};
use crate::virtio::worker::Worker;
use crate::virtio::{Device, DeviceError, GuestRam, Interrupt};

#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "most variants are their source's step")]
pub enum SlotsError {
    /// There is no such slot, or none of this kind.
    #[error("slot {slot}: there is no such slot{what}")]
    Unknown { slot: usize, what: &'static str },
    #[error("add {what}: all {slots} slots for that are in use")]
    Full { what: &'static str, slots: usize },
    #[error("add {what}: {got} descriptors instead of 1")]
    Descriptors { what: &'static str, got: usize },
    /// The MTU is outside the standard's range (virtio 1.2, 5.1.4.2).
    #[error("add an interface: an MTU of {0} is below 68")]
    Mtu(u16),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Disk(#[from] BadDisk),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("make the eventfds of a slot for a device")]
    EventFd(#[source] std::io::Error),
    #[error(transparent)]
    Jail(#[from] kata_like_jail::JailError),
    #[error("start the threads of devices")]
    Thread(#[source] std::io::Error),
}

/// The least MTU that a driver may be given.
const MIN_MTU: u16 = 68;

#[derive(Default)]
struct Workers {
    nets: Vec<Worker>,
    disks: Vec<Worker>,
}

pub struct Slots {
    slots: Arc<[Arc<Slot>]>,
    /// A thread for each slot of an interface or a disk; started before the guest runs.
    workers: Workers,
}

impl Slots {
    /// Makes as many empty slots as the layout has, and connects them to KVM: the guest's
    /// notification of a queue signals an eventfd from now on, whether there is a device or not.
    pub fn new(vm: &Vm, memory: &GuestRam, reactor: &Reactor) -> Result<Self, SlotsError> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(SlotsError::EventFd);
        let slot = |(index, (pin, queues)): (usize, (&u32, &usize))| {
            let interrupt = Arc::new(Interrupt::new(event()?));
            let kicks = (0..*queues)
                .map(|_| event().map(Arc::new))
                .collect::<Result<Vec<_>, _>>()?;
            if !kicks.is_empty() {
                vm.connect_interrupt(interrupt.irq(), *pin)?;
            }
            for (queue, kick) in (0u32..).zip(&kicks) {
                vm.connect_notification(kick, slot_address(index) + QUEUE_NOTIFY, queue)?;
            }
            let slot = Slot::new(index, memory.clone(), interrupt, reactor.epoll(), kicks);
            Ok(Arc::new(slot))
        };
        let slots = SLOT_IRQS.iter().zip(&SLOT_QUEUES).enumerate().map(slot);
        Ok(Self {
            slots: slots.collect::<Result<_, SlotsError>>()?,
            workers: Workers::default(),
        })
    }

    /// The slots in the order of their addresses, for the bus.
    pub fn all(&self) -> Arc<[Arc<Slot>]> {
        self.slots.clone()
    }

    /// Starts the threads for interfaces and disks. Call it once, before the guest runs.
    pub fn start_workers(&mut self, jails: &mut Jails) -> Result<(), SlotsError> {
        let mut start = |name, kind, count| {
            let mut workers = Vec::new();
            for (number, door) in jails.doors(kind, count)?.into_iter().enumerate() {
                let worker = Worker::start(format!("{name}{number}"), || door.close());
                workers.push(worker.map_err(SlotsError::Thread)?);
            }
            Ok::<_, SlotsError>(workers)
        };
        self.workers = Workers {
            nets: start("net", &vmm::NET, NET_SLOTS)?,
            disks: start("disk", &vmm::DISK, DISK_SLOTS)?,
        };
        Ok(())
    }

    /// Called when a descriptor of this slot's device is ready.
    pub fn ready(&self, index: usize, token: u32) -> Result<(), DeviceError> {
        match self.slots.get(index) {
            Some(slot) => slot.ready(token),
            None => Ok(()),
        }
    }

    /// How far the queues of all active devices have come.
    pub fn queue_states(&self) -> Vec<QueueState> {
        let slots = self.slots.iter();
        slots.flat_map(|slot| slot.queue_states()).collect()
    }

    /// Puts a device into a slot; from then on the guest can bind it.
    pub fn fill(&self, index: usize, device: Box<dyn Device>) -> Result<(), SlotsError> {
        Ok(self.at(index)?.fill(device)?)
    }

    /// Puts a disk into the first free slot for disks, and returns the slot's number.
    pub fn add_disk(&self, disk: Disk) -> Result<usize, SlotsError> {
        let (slot, worker) = self.free("a disk", DISK_SLOT, &self.workers.disks)?;
        self.fill(slot, Box::new(Block::new(disk, worker)))?;
        Ok(slot)
    }

    /// Takes a disk out of its slot and closes its descriptor.
    pub fn remove_disk(&self, index: usize) -> Result<(), SlotsError> {
        self.remove(index, DISK_SLOT..DISK_SLOT + DISK_SLOTS, " for disks")
    }

    /// Puts an interface over a tap into the first free slot for interfaces, and returns its
    /// number.
    pub fn add_interface(&self, tap: OwnedFd, mac: [u8; 6], mtu: u16) -> Result<usize, SlotsError> {
        if mtu < MIN_MTU {
            return Err(SlotsError::Mtu(mtu));
        }
        let (slot, worker) = self.free("an interface", NET_SLOT, &self.workers.nets)?;
        self.fill(slot, Box::new(Net::new(Tap::new(tap), mac, mtu, worker)))?;
        Ok(slot)
    }

    /// Takes an interface out of its slot and closes its tap.
    pub fn remove_interface(&self, index: usize) -> Result<(), SlotsError> {
        self.remove(index, NET_SLOT..NET_SLOT + NET_SLOTS, " for interfaces")
    }

    /// The first empty slot from `first` on, and its thread.
    fn free(
        &self,
        what: &'static str,
        first: usize,
        workers: &[Worker],
    ) -> Result<(usize, Worker), SlotsError> {
        let is_free = |slot: usize| self.slots.get(slot).is_some_and(|slot| slot.is_empty());
        let slots = workers.len();
        (first..)
            .zip(workers)
            .find(|(slot, _)| is_free(*slot))
            .map(|(slot, worker)| (slot, worker.clone()))
            .ok_or(SlotsError::Full { what, slots })
    }

    /// Takes a device that its driver has let go out of its slot, and drops it.
    fn remove(
        &self,
        index: usize,
        slots: Range<usize>,
        what: &'static str,
    ) -> Result<(), SlotsError> {
        if !slots.contains(&index) {
            return Err(SlotsError::Unknown { slot: index, what });
        }
        Ok(self.at(index)?.empty()?)
    }

    fn at(&self, slot: usize) -> Result<&Slot, SlotsError> {
        let found = self.slots.get(slot).map(Arc::as_ref);
        found.ok_or(SlotsError::Unknown { slot, what: "" })
    }
}
