//! How far the queues of a slot's device have come, read from the rings in guest memory.

use std::sync::atomic::Ordering;

use kata_like_boot::QueueState;
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::number;

use super::{FEATURE_EVENT_IDX, GuestRam, QueueLayout, Slot, State};

impl Slot {
    /// The queues that an active device serves. Empty while another thread holds the device's lock:
    /// this never waits.
    pub fn queue_states(&self) -> Vec<QueueState> {
        let Some(transport) = self.try_lock() else {
            return Vec::new();
        };
        let (State::Active(_), Some(facts)) = (&transport.state, &transport.facts) else {
            return Vec::new();
        };
        let event_idx = transport.driver_features & FEATURE_EVENT_IDX != 0;
        let queues = (0u32..).zip(&transport.queues);
        queues
            .filter(|(_, queue)| queue.ready)
            .filter_map(|(number, queue)| {
                let rings = Rings(&self.memory, queue.layout);
                Some(QueueState {
                    slot: number::small(self.index),
                    device: format!("{:?}", facts.kind),
                    interrupt: self.interrupt.status(),
                    queue: number,
                    available: rings.available(2)?,
                    used: rings.used(2)?,
                    events: match event_idx {
                        true => Some((rings.avail_event()?, rings.used_event()?)),
                        false => None,
                    },
                })
            })
            .collect()
    }
}

/// A queue's rings (virtio 1.2, 2.7.6 and 2.7.8). What lies outside guest memory is not read.
struct Rings<'a>(&'a GuestRam, QueueLayout);

impl Rings<'_> {
    fn available(&self, offset: u64) -> Option<u16> {
        self.load(self.1.available, offset)
    }

    fn used(&self, offset: u64) -> Option<u16> {
        self.load(self.1.used, offset)
    }

    fn used_event(&self) -> Option<u16> {
        self.available(4 + 2 * u64::from(self.1.size))
    }

    fn avail_event(&self) -> Option<u16> {
        self.used(4 + 8 * u64::from(self.1.size))
    }

    fn load(&self, ring: u64, offset: u64) -> Option<u16> {
        let address = GuestAddress(ring.checked_add(offset)?);
        let value = self.0.load(address, Ordering::Relaxed);
        value.ok().map(u16::from_le)
    }
}
