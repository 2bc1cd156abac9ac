//! The block device (virtio 1.2, 5.2): one queue, served by a thread of its own.
//!
//! `slots` puts it into one of the slots for disks, long after boot, and takes it out again. `disk`
//! is the host's descriptor, `request` what the driver asks of it, `job` the thread. Reads and
//! writes wait for the host's storage; on a thread of their own they delay neither a vCPU nor the
//! event loop.

mod disk;
mod job;
pub(crate) mod request;

pub use self::disk::{BadDisk, Disk};
use self::job::Requests;
use super::worker::{Serving, Worker};
use super::{Activation, Active, Device, DeviceError, Kind, RING_FEATURES, Token};

/// How many requests a driver may have in flight.
const QUEUE_SIZES: [u16; 1] = [256];

/// The buffers of one request: all of a queue, without those of header and status.
const MAX_SEGMENTS: u32 = 254;

/// VIRTIO_BLK_F_SEG_MAX, _BLK_SIZE and _FLUSH (5.2.3).
const FEATURES: u64 = 1 << 2 | 1 << 6 | FEATURE_FLUSH;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_READ_ONLY: u64 = 1 << 5;

/// `struct virtio_blk_config` up to `blk_size`; what follows belongs to features never offered.
const CONFIG_SIZE: usize = 24;

/// The thread uses this token to say that it has ended.
const ENDED: Token = Token(0);

/// The idle device.
pub struct Block {
    disk: Disk,
    worker: Worker,
    config: [u8; CONFIG_SIZE],
}

impl Block {
    /// Makes a device over `disk`. `worker` must serve no other device at the same time.
    pub fn new(disk: Disk, worker: Worker) -> Self {
        let mut config = [0; CONFIG_SIZE];
        let (capacity, rest) = config.split_at_mut(8);
        capacity.copy_from_slice(&disk.sectors().to_le_bytes());
        let (_size_max, rest) = rest.split_at_mut(4);
        let (segments, rest) = rest.split_at_mut(4);
        segments.copy_from_slice(&MAX_SEGMENTS.to_le_bytes());
        let (_geometry, block_size) = rest.split_at_mut(4);
        block_size.copy_from_slice(&disk.block_size().to_le_bytes());
        Self {
            disk,
            worker,
            config,
        }
    }
}

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let read_only = match self.disk.is_read_only() {
            true => FEATURE_READ_ONLY,
            false => 0,
        };
        RING_FEATURES | FEATURES | read_only
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    /// The thread itself waits for the driver's notifications.
    fn serves_queues(&self) -> bool {
        false
    }

    fn activate(self: Box<Self>, mut guest: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let queue = guest.take_queue(0)?;
        // Without FLUSH a driver takes a completed write for a durable one (5.2.6.2).
        let requests = Requests {
            disk: self.disk,
            flush_each_write: guest.features & FEATURE_FLUSH == 0,
            queue,
        };
        let serving = Serving::begin(self.worker, requests, guest.host, ENDED)?;
        Ok(Box::new(Running(serving)))
    }
}

/// The running device: the disk is with the thread.
struct Running(Serving<Disk>);

impl Active for Running {
    fn notified(&mut self, _queue: u16) -> Result<(), DeviceError> {
        Ok(())
    }

    fn ready(&mut self, _token: Token) -> Result<(), DeviceError> {
        self.0.ready()
    }

    fn reset(self: Box<Self>) -> Result<Box<dyn Device>, DeviceError> {
        let (disk, worker) = self.0.end()?;
        Ok(Box::new(Block::new(disk, worker)))
    }
}

#[cfg(test)]
mod tests;
