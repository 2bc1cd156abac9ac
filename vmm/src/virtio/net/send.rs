//! From the driver to the tap: each chain is a header and a frame.
//!
//! A frame that can't be sent is lost, as on a wire: one that is too long, has a wrong header, or
//! is refused by the tap. Only a chain without a whole header breaks the device.

use super::header::{SIZE, checked};
use super::tap::Tap;
use crate::virtio::{DeviceError, Virtqueue};

pub struct Send {
    queue: Virtqueue,
    features: u64,
}

impl Send {
    /// Serves the transmit queue of a driver that has negotiated these features.
    pub fn new(queue: Virtqueue, features: u64) -> Self {
        Self { queue, features }
    }

    /// The queue whose kick is the driver's notification.
    pub fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    /// Sends at most `limit` frames. True: there may be more. False: the driver will notify us of
    /// new ones.
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
