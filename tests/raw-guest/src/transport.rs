//! A virtio-mmio device and its virtqueues, without any rule kept (virtio 1.2, 2.7 and 4.2).

use crate::machine::{self, barrier, fill, load, store, until};

/// The registers of the first slot; each has 4 KiB.
pub const MMIO: u64 = 0xd000_0000;
/// How many slots there are.
pub const SLOTS: u64 = 18;
/// Of a slot.
pub const SLOT_SIZE: u64 = 0x1000;

/// DriverFeatures, QueueSel and so on, by their offsets.
pub const DRIVER_FEATURES: u64 = 0x20;
/// Which half of the features.
pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
/// Which queue the next registers are about.
pub const QUEUE_SELECT: u64 = 0x30;
/// The queue's size.
pub const QUEUE_SIZE: u64 = 0x38;
/// 1 if the queue may be used.
pub const QUEUE_READY: u64 = 0x44;
/// Tells the device of a queue.
pub const NOTIFY: u64 = 0x50;
/// The status machine.
pub const STATUS: u64 = 0x70;
/// The halves of the rings' addresses.
pub const QUEUE_DESCRIPTORS: u64 = 0x80;
/// The available ring.
pub const QUEUE_AVAILABLE: u64 = 0x90;
/// The used ring.
pub const QUEUE_USED: u64 = 0xa0;

/// ACKNOWLEDGE, DRIVER and FEATURES_OK.
pub const ACCEPTED: u32 = 1 | 2 | 8;
/// DRIVER_OK.
pub const DRIVER_OK: u32 = 4;
/// DEVICE_NEEDS_RESET.
pub const NEEDS_RESET: u32 = 64;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_INDIRECT_DESC.
pub const INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_INDEX: u64 = 1 << 29;

/// A slot and the device in it.
#[derive(Clone, Copy)]
pub struct Device {
    base: u64,
}

impl Device {
    /// The device in this slot.
    pub fn at(slot: u64) -> Self {
        let base = MMIO + slot * SLOT_SIZE;
        Self { base }
    }

    /// Reads a register.
    pub fn get(self, register: u64) -> u32 {
        load(self.base + register)
    }

    /// Writes a register.
    pub fn set(self, register: u64, value: u32) {
        store(self.base + register, value);
    }

    /// DeviceID; 0 as long as the slot is empty.
    pub fn kind(self) -> u32 {
        self.get(8)
    }

    /// Status 0.
    pub fn reset(self) {
        self.set(STATUS, 0);
    }

    /// Resets it, and goes as far as FEATURES_OK. False: the device does not accept the features.
    pub fn negotiate(self, features: u64) -> bool {
        self.reset();
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        for half in 0..2 {
            self.set(DRIVER_FEATURES_SELECT, half);
            self.set(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.set(STATUS, ACCEPTED);
        self.get(STATUS) == ACCEPTED
    }

    /// Tells it a queue's place.
    pub fn place(self, queue: u32, size: u32, addresses: [u64; 3]) {
        self.set(QUEUE_SELECT, queue);
        self.set(QUEUE_SIZE, size);
        let registers = [QUEUE_DESCRIPTORS, QUEUE_AVAILABLE, QUEUE_USED];
        for (register, address) in registers.into_iter().zip(addresses) {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(QUEUE_READY, 1);
    }

    /// DRIVER_OK.
    pub fn switch_on(self) {
        self.set(STATUS, ACCEPTED | DRIVER_OK);
    }

    /// Notifies the device of a queue.
    pub fn kick(self, queue: u32) {
        barrier();
        self.set(NOTIFY, queue);
    }

    /// Whether the device gives up this driver.
    pub fn needs_reset(self) -> bool {
        self.get(STATUS) & NEEDS_RESET != 0
    }
}

/// The memory of one queue.
const RINGS: u64 = machine::FREE + (1 << 20);
const RING_SIZE: u64 = 0x1_0000;

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const TABLE: u16 = 4;

/// A virtqueue: its three parts, and how far the driver has come.
#[derive(Clone, Copy)]
pub struct Ring {
    /// Where it lies.
    pub base: u64,
    /// The number of its descriptors.
    pub size: u16,
    /// The next available index.
    pub available: u16,
    /// The used index up to which answers were taken.
    pub seen: u16,
}

impl Ring {
    /// Clears the memory of queue `number`, which is then empty.
    pub fn new(number: u32, size: u16) -> Self {
        let base = RINGS + u64::from(number) * RING_SIZE;
        fill(base, RING_SIZE, 0);
        Self {
            base,
            size,
            available: 0,
            seen: 0,
        }
    }

    /// The addresses of descriptors, available and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + 0x5000, self.base + 0x8000]
    }

    /// Writes a descriptor.
    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        descriptor(self.base, index, address, length, flags, next);
    }

    /// Makes a chain available.
    pub fn offer(&mut self, head: u16) {
        let [_, available, _] = self.addresses();
        store(
            available + 4 + 2 * u64::from(self.available % self.size),
            head,
        );
        self.available = self.available.wrapping_add(1);
        barrier();
        self.tell(self.available);
    }

    /// Sets the available index, whatever the ring holds.
    pub fn tell(&self, index: u16) {
        store(self.base + 0x5002, index);
        barrier();
    }

    /// The device's index.
    pub fn used(&self) -> u16 {
        load(self.base + 0x8002)
    }

    /// Takes the next chain that the device has given back: its head, and how much was written.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if self.used() == self.seen {
            return None;
        }
        let at = self.base + 0x8004 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((load(at), load(at + 4)))
    }

    /// Waits for the next chain.
    pub fn wait(&mut self) -> Option<(u32, u32)> {
        until(|| self.used() != self.seen);
        self.take()
    }
}

/// Writes a descriptor into a table.
pub fn descriptor(table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
    let at = table + 16 * u64::from(index);
    store(at, address);
    store(at + 8, length);
    store(at + 12, flags);
    store(at + 14, next);
}
