//! Address → device, for the accesses that KVM hands to us.
//!
//! Called by the vCPU threads. Every port and address of the guest has an answer: what is not there
//! reads as all ones and ignores writes, as on a PC. Deliberately absent: KVM.

use std::sync::Arc;

use crate::layout::{MMIO_BASE, MMIO_SLOT_SIZE};
use crate::legacy;
use crate::virtio::DeviceError;
use crate::virtio::life::Life;
use crate::virtio::mmio::Slot;

pub use crate::legacy::Effect;

/// Everything that the guest can address, except RAM and KVM's own devices.
#[derive(Clone)]
pub struct Bus {
    slots: Arc<[Arc<Slot>]>,
    life: Life,
}

impl Bus {
    /// Takes the virtio-mmio slots in the order of their addresses. `life` switches the devices in
    /// them on and off.
    pub fn new(slots: Arc<[Arc<Slot>]>, life: Life) -> Self {
        Self { slots, life }
    }

    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(legacy::read(port));
    }

    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        legacy::write(port, data)
    }

    /// A memory-mapped read.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((slot, offset)) => slot.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A memory-mapped write. Waits if it switches a device on or off. An error means that the
    /// device failed on the host's side.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), DeviceError> {
        let Some((slot, offset)) = self.slot(address) else {
            return Ok(());
        };
        match slot.write(offset, data) {
            Some(switch) => self.life.switch(slot, switch),
            None => Ok(()),
        }
    }

    fn slot(&self, address: u64) -> Option<(&Arc<Slot>, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(offset / MMIO_SLOT_SIZE).ok()?;
        let slot = self.slots.get(index)?;
        Some((slot, offset % MMIO_SLOT_SIZE))
    }
}
