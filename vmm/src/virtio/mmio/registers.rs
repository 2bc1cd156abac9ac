//! The registers of a slot, as the driver reads and writes them (virtio 1.2, 4.2.2).

use crate::virtio::number;

use super::{DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, QUEUE_NOTIFY, Transport};

pub(super) const MAGIC: u32 = 0x7472_6976;
pub(super) const VERSION: u32 = 2;
const VENDOR: u32 = 0x4c4b_414b;
const NO_SHARED_MEMORY: u32 = u32::MAX;

impl Transport {
    pub(super) fn read(&self, offset: u64) -> u32 {
        let Some(facts) = &self.facts else {
            return match offset {
                0x00 => MAGIC,
                0x04 => VERSION,
                0x0c => VENDOR,
                _ => 0, // DeviceID 0 among them: a placeholder (4.2.2.2)
            };
        };
        let selected = number::index(self.queue_select);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => facts.kind.id(),
            0x0c => VENDOR,
            0x10 => half(facts.features, self.device_features_select),
            0x34 => facts
                .queue_sizes
                .get(selected)
                .copied()
                .map_or(0, u32::from),
            0x44 => u32::from(self.queues.get(selected).is_some_and(|queue| queue.ready)),
            0x70 => self.status,
            0xb0 | 0xb4 | 0xb8 | 0xbc => NO_SHARED_MEMORY,
            _ => 0, // ConfigGeneration (0xfc) too: no configuration of ours ever changes
        }
    }

    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.facts.as_ref().map_or(&[][..], |facts| &facts.config);
        let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        for (byte, value) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    pub(super) fn write(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.device_features_select = value,
            0x20 => self.write_features(value),
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(number::index(value)) {
                    // EAGAIN: a notification is pending already.
                    let _ = kick.write(1);
                }
            }
            _ => self.write_queue(offset, value),
        }
    }

    fn write_features(&mut self, value: u32) {
        let open =
            self.status & DRIVER != 0 && self.status & (FEATURES_OK | FAILED | NEEDS_RESET) == 0;
        if open {
            set_half(
                &mut self.driver_features,
                self.driver_features_select,
                value,
            );
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let open =
            self.status & FEATURES_OK != 0 && self.status & (DRIVER_OK | FAILED | NEEDS_RESET) == 0;
        let Some(queue) = self.queues.get_mut(number::index(self.queue_select)) else {
            return;
        };
        if !open {
            return;
        }
        let layout = &mut queue.layout;
        match (offset, queue.ready) {
            (0x44, _) => queue.ready = value & 1 != 0,
            (_, true) => {} // frozen until the driver takes ready back
            (0x38, _) => layout.size = value,
            (0x80, _) => set_half(&mut layout.descriptors, 0, value),
            (0x84, _) => set_half(&mut layout.descriptors, 1, value),
            (0x90, _) => set_half(&mut layout.available, 0, value),
            (0x94, _) => set_half(&mut layout.available, 1, value),
            (0xa0, _) => set_half(&mut layout.used, 0, value),
            (0xa4, _) => set_half(&mut layout.used, 1, value),
            _ => {}
        }
    }
}

/// 32 bits of 64; there are no others.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => number::low(value),
        1 => number::low(value >> 32),
        _ => 0,
    }
}

fn set_half(target: &mut u64, select: u32, value: u32) {
    match select {
        0 => *target = *target & !u64::from(u32::MAX) | u64::from(value),
        1 => *target = *target & u64::from(u32::MAX) | u64::from(value) << 32,
        _ => {}
    }
}
