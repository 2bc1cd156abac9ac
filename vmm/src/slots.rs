//! The VM's slots for devices, connected to KVM. They are filled at boot or later, and emptied
//! again.
//!
//! Called by `machine`. `layout` says which slot is for what. The number of slots never changes;
//! the guest's driver binds and unbinds a device when the agent asks it to.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kata_like_boot::QueueState;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::kvm::{KvmError, Vm};
use crate::layout::{DISK_SLOT, DISK_SLOTS, NET_SLOT, NET_SLOTS, SLOT_IRQS, slot_address};
use crate::reactor::Reactor;
use crate::virtio::block::{BadDisk, Block, Disk};
use crate::virtio::mmio::{QUEUE_NOTIFY, Slot, SlotError};
use crate::virtio::net::{BadTap, Net, Tap};
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
    /// The MTU is outside the standard's range (virtio 1.2, 5.1.4.2).
    #[error("add an interface: an MTU of {0} is below 68")]
    Mtu(u16),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Disk(#[from] BadDisk),
    #[error(transparent)]
    Tap(#[from] BadTap),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("make an eventfd for a device's interrupt")]
    EventFd(#[source] std::io::Error),
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
    /// A thread for each slot of an interface or a disk; started before the jail closes.
    workers: Workers,
}

impl Slots {
    /// Makes as many empty slots as the layout has.
    pub fn new(memory: &GuestRam, reactor: &Reactor) -> Result<Self, SlotsError> {
        let slot = |index| {
            let irq = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(SlotsError::EventFd)?;
            let interrupt = Arc::new(Interrupt::new(irq));
            let slot = Slot::new(index, memory.clone(), interrupt, reactor.epoll());
            Ok(Arc::new(slot))
        };
        Ok(Self {
            slots: (0..SLOT_IRQS.len())
                .map(slot)
                .collect::<Result<_, SlotsError>>()?,
            workers: Workers::default(),
        })
    }

    /// The slots in the order of their addresses, for the bus.
    pub fn all(&self) -> Arc<[Arc<Slot>]> {
        self.slots.clone()
    }

    /// Starts the threads for interfaces and disks. Call it once, before the jail closes.
    pub fn start_workers(&mut self) -> Result<(), SlotsError> {
        let start = |name, count| {
            (0..count)
                .map(|number| Worker::start(format!("{name}{number}")))
                .collect::<Result<_, _>>()
                .map_err(SlotsError::Thread)
        };
        self.workers = Workers {
            nets: start("net", NET_SLOTS)?,
            disks: start("disk", DISK_SLOTS)?,
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

    /// Puts a device into a slot and connects it; from then on the guest can bind it. If that fails
    /// the slot is empty again.
    pub fn fill(&self, vm: &Vm, index: usize, device: Box<dyn Device>) -> Result<(), SlotsError> {
        let (slot, pin) = self.at(index)?;
        let kicks = slot.fill(device)?;
        let connected = vm
            .connect_interrupt(slot.interrupt().irq(), pin)
            .and_then(|()| {
                (0u32..).zip(&kicks).try_for_each(|(queue, kick)| {
                    vm.connect_notification(kick, slot_address(index) + QUEUE_NOTIFY, queue)
                })
            });
        if let Err(error) = connected {
            // No driver has seen it yet. Disconnecting what was not connected fails, which does no
            // harm.
            let _ = self.empty(vm, index);
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes a device that its driver has let go out of its slot, and drops it.
    fn empty(&self, vm: &Vm, index: usize) -> Result<(), SlotsError> {
        let (slot, pin) = self.at(index)?;
        let kicks = slot.empty()?;
        let mut result = vm.disconnect_interrupt(slot.interrupt().irq(), pin);
        for (queue, kick) in (0u32..).zip(&kicks) {
            let address = slot_address(index) + QUEUE_NOTIFY;
            result = result.and(vm.disconnect_notification(kick, address, queue));
        }
        Ok(result?)
    }

    /// Puts a disk into the first free slot for disks, and returns the slot's number.
    pub fn add_disk(&self, vm: &Vm, file: OwnedFd, read_only: bool) -> Result<usize, SlotsError> {
        let (slot, worker) = self.free("a disk", DISK_SLOT, &self.workers.disks)?;
        let disk = Disk::new(file, read_only)?;
        self.fill(vm, slot, Box::new(Block::new(disk, worker)))?;
        Ok(slot)
    }

    /// Takes a disk out of its slot and closes its descriptor.
    pub fn remove_disk(&self, vm: &Vm, index: usize) -> Result<(), SlotsError> {
        self.remove(vm, index, DISK_SLOT..DISK_SLOT + DISK_SLOTS, " for disks")
    }

    /// Puts an interface over a tap into the first free slot for interfaces, and returns its
    /// number.
    pub fn add_interface(
        &self,
        vm: &Vm,
        tap: OwnedFd,
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<usize, SlotsError> {
        if mtu < MIN_MTU {
            return Err(SlotsError::Mtu(mtu));
        }
        let (slot, worker) = self.free("an interface", NET_SLOT, &self.workers.nets)?;
        let tap = Tap::new(tap)?;
        self.fill(vm, slot, Box::new(Net::new(tap, mac, mtu, worker)))?;
        Ok(slot)
    }

    /// Takes an interface out of its slot and closes its tap.
    pub fn remove_interface(&self, vm: &Vm, index: usize) -> Result<(), SlotsError> {
        self.remove(vm, index, NET_SLOT..NET_SLOT + NET_SLOTS, " for interfaces")
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

    fn remove(
        &self,
        vm: &Vm,
        index: usize,
        slots: Range<usize>,
        what: &'static str,
    ) -> Result<(), SlotsError> {
        if !slots.contains(&index) {
            return Err(SlotsError::Unknown { slot: index, what });
        }
        self.empty(vm, index)
    }

    fn at(&self, index: usize) -> Result<(&Slot, u32), SlotsError> {
        match (self.slots.get(index), SLOT_IRQS.get(index)) {
            (Some(slot), Some(pin)) => Ok((slot, *pin)),
            _ => Err(SlotsError::Unknown {
                slot: index,
                what: "",
            }),
        }
    }
}
