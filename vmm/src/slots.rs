//! The guest's slots for devices, connected to KVM: filled at boot or later, and emptied again.
//!
//! Called by `machine`. Which slot is for what is in `layout`. The slots' number never changes; the
//! guest's driver binds and unbinds what is in them when the agent asks it to.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::kvm::{KvmError, Vm};
use crate::layout::{DISK_SLOT, DISK_SLOTS, SLOT_IRQS, slot_address};
use crate::reactor::Reactor;
use crate::virtio::block::{BadDisk, Block, Disk, Worker};
use crate::virtio::mmio::{QUEUE_NOTIFY, Slot, SlotError};
use crate::virtio::{Device, DeviceError, GuestRam, Interrupt};

/// Why a device was not put in or taken out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "most variants are their source's step")]
pub enum SlotsError {
    /// No such slot, or none of a disk's.
    #[error("slot {slot}: there is no such slot{what}")]
    Unknown { slot: usize, what: &'static str },
    /// All that there are.
    #[error("add a disk: all {DISK_SLOTS} slots for disks are in use")]
    Full,
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Disk(#[from] BadDisk),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("make an eventfd for a device's interrupt")]
    EventFd(#[source] std::io::Error),
    #[error("start the threads of disks")]
    Thread(#[source] std::io::Error),
}

/// All slots.
pub struct Slots {
    slots: Arc<[Arc<Slot>]>,
    /// A thread for each slot of a disk, started before the jail closes.
    workers: Vec<Worker>,
}

impl Slots {
    /// As many empty ones as the layout has.
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
            workers: Vec::new(),
        })
    }

    /// The slots in the order of their addresses, for the bus.
    pub fn all(&self) -> Arc<[Arc<Slot>]> {
        self.slots.clone()
    }

    /// Starts the threads that disks need; once, before the jail closes.
    pub fn start_workers(&mut self) -> Result<(), SlotsError> {
        self.workers = (0..DISK_SLOTS)
            .map(|number| Worker::start(format!("disk{number}")))
            .collect::<Result<_, _>>()
            .map_err(SlotsError::Thread)?;
        Ok(())
    }

    /// A descriptor of this slot's device is ready.
    pub fn ready(&self, index: usize, token: u32) -> Result<(), DeviceError> {
        match self.slots.get(index) {
            Some(slot) => slot.ready(token),
            None => Ok(()),
        }
    }

    /// Puts a device into a slot and connects it; the guest can bind it from then on. Where that
    /// fails the slot is empty again.
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
            // No driver has seen it yet; what was not connected can't be disconnected.
            let _ = self.empty(vm, index);
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes the device out of a slot, which its driver has let go, and drops it.
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

    /// Puts a disk into the first free slot for disks, and returns its number.
    pub fn add_disk(&self, vm: &Vm, file: OwnedFd, read_only: bool) -> Result<usize, SlotsError> {
        let free = |(number, _): &(usize, &Worker)| {
            let slot = self.slots.get(DISK_SLOT + number);
            slot.is_some_and(|slot| slot.is_empty())
        };
        let found = self.workers.iter().enumerate().find(free);
        let (number, worker) = found.ok_or(SlotsError::Full)?;
        let disk = Disk::new(file, read_only)?;
        let device = Block::new(disk, worker.clone());
        self.fill(vm, DISK_SLOT + number, Box::new(device))?;
        Ok(DISK_SLOT + number)
    }

    /// Takes a disk out again and closes its descriptor.
    pub fn remove_disk(&self, vm: &Vm, index: usize) -> Result<(), SlotsError> {
        if !(DISK_SLOT..DISK_SLOT + DISK_SLOTS).contains(&index) {
            let what = " for disks";
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
