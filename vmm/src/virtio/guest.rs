//! What rings and chains need of the guest: its memory, and the interrupt of their device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory as all devices see it.
pub type GuestRam = Arc<GuestMemoryMmap>;

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

    /// The caller registers `irq` with KVM as an irqfd.
    pub fn new(irq: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            irq,
        }
    }

    /// Sets status bits, then raises the interrupt.
    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // EAGAIN: the counter is full, so an interrupt is pending anyway.
        let _ = self.irq.write(1);
    }

    /// The register InterruptStatus, for the transport.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The register InterruptACK, for the transport.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The eventfd that KVM turns into an interrupt.
    pub fn irq(&self) -> &EventFd {
        &self.irq
    }
}
