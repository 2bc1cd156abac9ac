//! The thread of an interface: it serves both ways in turn, and waits when neither has work.

use std::os::fd::AsFd;

use super::receive::{Next, Receive};
use super::send::Send;
use super::tap::Tap;
use crate::virtio::worker::{Job, Signal, wait_for};
use crate::virtio::{DeviceError, descriptor};

/// The most frames of one way before the other one gets its turn and a stop is noticed.
const BATCH: usize = 64;

pub struct Frames {
    pub tap: Tap,
    /// From the tap to the driver.
    pub receive: Receive,
    /// From the driver to the tap.
    pub send: Send,
}

impl Job for Frames {
    type Host = Tap;

    fn serve(&mut self, stop: &Signal) -> Result<(), DeviceError> {
        while !stop.is_raised() {
            let more = self.send.serve(&self.tap, BATCH)?;
            let next = self.receive.serve(&self.tap, BATCH)?;
            if more || next == Next::Frames {
                continue;
            }
            let (sends, buffers) = (self.send.queue().kick(), self.receive.queue().kick());
            let (stop, sends_fd) = (descriptor(stop.event()), descriptor(sends));
            match next {
                Next::Frames | Next::Nothing => wait_for(&[stop, sends_fd])?,
                Next::Tap => wait_for(&[stop, sends_fd, self.tap.as_fd()])?,
                Next::Buffers => wait_for(&[stop, sends_fd, descriptor(buffers)])?,
            }
            // EAGAIN: the other eventfd woke us. The queue is looked through right away in any
            // case.
            let _ = sends.read();
            let _ = buffers.read();
        }
        Ok(())
    }

    fn finish(self) -> Tap {
        self.tap
    }
}
