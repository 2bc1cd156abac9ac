//! From the driver to the tap: each chain is a header and a frame.
//!
//! What can't be sent is lost, as on a wire: a frame that is too long, one whose header is wrong, one that the
//! tap does not take. Only a chain without a whole header breaks the device.

use super::Tap;
use super::header::{SIZE, checked};
use crate::virtio::{DeviceError, Virtqueue};

/// The way out.
pub struct Send {
    queue: Virtqueue,
    features: u64,
}

impl Send {
    /// Over the transmit queue of a driver that has negotiated these features.
    pub fn new(queue: Virtqueue, features: u64) -> Self {
        Self { queue, features }
    }

    /// Where the driver's notification arrives.
    pub fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    /// Sends at most `limit` frames. True if there may be more, false if the driver will notify us of them.
    pub fn serve(&mut self, tap: &Tap, limit: usize) -> Result<bool, DeviceError> {
        let (mut sent, mut more) = (false, true);
        for _ in 0..limit {
            let Some(mut chain) = self.queue.next_chain()? else {
                more = self.queue.rearm()?;
                if more {
                    continue;
                }
                break;
            };
            let mut header = [0; SIZE];
            chain.read_exact(&mut header)?;
            if let Some(header) = checked(header, chain.readable(), self.features) {
                let _ = chain.send_packet(tap, &header);
            }
            self.queue.give_back(chain)?;
            sent = true;
        }
        if sent {
            self.queue.signal()?;
        }
        Ok(more)
    }
}
