//! The thread of a disk: it serves the queue, one request after the other.

use super::Disk;
use super::request;
use crate::virtio::worker::{Job, Signal, wait_for};
use crate::virtio::{DeviceError, Virtqueue, descriptor};

/// What the thread works on.
pub struct Requests {
    pub disk: Disk,
    /// Whether a write must be on stable storage before it is answered.
    pub flush_each_write: bool,
    pub queue: Virtqueue,
}

impl Job for Requests {
    type Host = Disk;

    fn serve(&mut self, stop: &Signal) -> Result<(), DeviceError> {
        while !stop.is_raised() {
            while let Some(mut chain) = self.queue.next_chain()? {
                if stop.is_raised() {
                    return Ok(());
                }
                let stopped = || stop.is_raised();
                request::serve(&mut chain, &self.disk, self.flush_each_write, stopped)?;
                self.queue.give_back(chain)?;
                self.queue.signal()?;
            }
            if !self.queue.rearm()? {
                let kick = self.queue.kick();
                wait_for(&[descriptor(kick), descriptor(stop.event())])?;
                let _ = kick.read(); // EAGAIN: it was the stop
            }
        }
        Ok(())
    }

    fn finish(self) -> Disk {
        self.disk
    }
}
