//! A guest's memory with the rings of one device, and a driver that keeps no rule.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::input::Input;
use crate::virtio::queue::QueueLayout;
use crate::virtio::{GuestRam, Interrupt, Virtqueue};

/// The size of each queue.
pub const RING: u16 = 8;

/// Where buffers of well-formed chains begin; rings lie below.
pub const BUFFERS: u64 = 0x5000;

/// Two pieces of memory with a hole between them.
const MEMORY: [(GuestAddress, usize); 2] = [
    (GuestAddress(0), 0x1_0000),
    (GuestAddress(0x2_0000), 0x1_0000),
];

/// All bytes of guest memory.
pub const ALL: usize = 0x2_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

pub struct Driver {
    pub memory: GuestRam,
    pub interrupt: Arc<Interrupt>,
    queues: usize,
    offered: Vec<u16>,
}

impl Driver {
    /// For a device with this many queues, at most 3.
    pub fn new(queues: usize) -> Self {
        Self {
            memory: Arc::new(GuestMemoryMmap::from_ranges(&MEMORY).expect("make guest memory")),
            interrupt: Arc::new(Interrupt::new(event())),
            queues,
            offered: vec![0; queues],
        }
    }

    pub fn layout(&self, queue: usize) -> QueueLayout {
        let at = 0x1000 * (queue as u64 + 1);
        QueueLayout {
            size: RING.into(),
            descriptors: at,
            available: at + 0x100,
            used: at + 0x200,
        }
    }

    /// Empties the rings of a queue and gives it to a device.
    pub fn queue(&mut self, queue: usize, event_idx: bool) -> Virtqueue {
        let layout = self.layout(queue);
        let rings = GuestAddress(layout.available);
        self.memory.write_slice(&[0; 0x200], rings).expect("write");
        self.offered[queue] = 0;
        let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
        let kick = Arc::new(event());
        Virtqueue::new(layout, RING, event_idx, memory, interrupt, kick).expect("a queue")
    }

    /// A chain of one descriptor to read and one to write, from descriptor 2 × `slot` on.
    pub fn request(&mut self, queue: usize, slot: u16, readable: &[u8], writable: u32) {
        let (first, second) = (slot % (RING / 2) * 2, slot % (RING / 2) * 2 + 1);
        let at = BUFFERS + 0x1000 * u64::from(first);
        let (table, answer) = (self.layout(queue).descriptors, at + 0x1000);
        let length = readable.len() as u32;
        self.write(at, readable);
        let head = match (length, writable) {
            (0, _) => {
                self.descriptor(table, second, answer, writable, WRITE, 0);
                second
            }
            (_, 0) => {
                self.descriptor(table, first, at, length, 0, 0);
                first
            }
            _ => {
                self.descriptor(table, first, at, length, NEXT, second);
                self.descriptor(table, second, answer, writable, WRITE, 0);
                first
            }
        };
        self.offer(queue, head);
    }

    /// Does what the input says to memory and rings.
    pub fn act(&mut self, input: &mut Input) {
        let act = input.byte();
        let queue = usize::from(act >> 4) % self.queues;
        let table = self.layout(queue).descriptors;
        match act % 8 {
            0..=2 => {
                let (place, length) = (input.word() & 0x3_ffff, u32::from(input.half()));
                let [index, flags, next] = [input.byte(), input.byte(), input.byte()];
                // Or an entry of an indirect table.
                let table = if act & 8 == 0 { table } else { BUFFERS };
                let (index, next) = (u16::from(index) % 16, u16::from(next) % 16);
                let flags = u16::from(flags) & 7;
                self.descriptor(table, index, place.into(), length, flags, next);
            }
            3 => {
                let (address, length) = (input.long(), input.word());
                let (index, flags, next) = (input.byte(), input.half(), input.half());
                let index = u16::from(index) % RING;
                self.descriptor(table, index, address, length, flags, next);
            }
            4 | 5 => self.offer(queue, u16::from(input.byte()) % (RING + 1)),
            6 => {
                let (place, length) = (input.word() & 0x3_ffff, usize::from(input.byte()));
                self.write(place.into(), input.bytes(length));
            }
            _ => {
                let index = self.layout(queue).available + 2;
                self.write(index, &input.half().to_le_bytes());
            }
        }
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let available = self.layout(queue).available;
        let index = &mut self.offered[queue];
        let entry = available + 4 + 2 * u64::from(*index % RING);
        *index = index.wrapping_add(1);
        let index = *index;
        self.write(entry, &head.to_le_bytes());
        self.write(available + 2, &index.to_le_bytes());
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    /// Outside of memory nothing is written.
    fn write(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }
}

/// A non-blocking eventfd.
pub fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("make an eventfd")
}
