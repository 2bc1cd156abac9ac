//! From the tap to the driver: a frame is read straight into the driver's buffers.
//!
//! The kernel silently cuts off what a read has no room for. So we read a frame only when the
//! buffers at hand hold the longest possible one. Until then the frame stays in the tap's own
//! queue, which is bounded, and nobody polls. Buffers that a frame has not filled wait for the next
//! one.

use rustix::io::Errno;

use super::features::{FEATURE_GUEST_TSO4, FEATURE_GUEST_TSO6, FEATURE_MERGEABLE};
use super::header::{ETHERNET, MAX_FRAME, SIZE, VLAN_TAG};
use super::tap::Tap;
use crate::virtio::chain::{MAX_PACKET_VECTORS, receive_packet};
use crate::virtio::{Chain, DeviceError, Virtqueue};

/// The shortest receive buffer of a driver that takes only whole frames (virtio 1.2, 5.1.6.3.1).
const SHORT: usize = 1526;
/// The same for a driver that also takes long segments.
const LONG: usize = 65_562;

/// How often one turn looks again at a ring that only seemed to be filled: a vCPU may move the
/// index to and fro.
const MAX_LOOKS: u32 = 16;

/// What the receiving way waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing: there may be more frames.
    Frames,
    /// The tap, which has no frame.
    Tap,
    /// The driver, which has given no more buffers and will notify us of new ones.
    Buffers,
    /// Nothing any more: the tap's interface was deleted.
    Nothing,
}

pub struct Receive {
    queue: Virtqueue,
    mergeable: bool,
    /// The room that must be there before a frame is read, including its header; bytes.
    need: usize,
    /// Taken from the ring and not filled yet: `room` bytes in `buffers` pieces.
    chains: Vec<Chain>,
    room: usize,
    buffers: usize,
}

impl Receive {
    /// Serves the receive queue of a driver that has negotiated these features.
    pub fn new(queue: Virtqueue, features: u64, mtu: u16) -> Self {
        let mergeable = features & FEATURE_MERGEABLE != 0;
        let long = features & (FEATURE_GUEST_TSO4 | FEATURE_GUEST_TSO6) != 0;
        // One byte more than the longest frame: so a frame that fits differs from one that was cut.
        let need = match (mergeable, long) {
            (true, true) => SIZE + MAX_FRAME + 1,
            (false, true) => LONG,
            (_, false) => SHORT.max(SIZE + ETHERNET + VLAN_TAG + usize::from(mtu) + 1),
        };
        Self {
            queue,
            mergeable,
            need,
            chains: Vec::new(),
            room: 0,
            buffers: 0,
        }
    }

    /// The queue whose kick is the driver's notification.
    pub fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    /// Delivers at most `limit` frames and says what to wait for.
    pub fn serve(&mut self, tap: &Tap, limit: usize) -> Result<Next, DeviceError> {
        let (mut delivered, mut next) = (false, Next::Frames);
        for _ in 0..limit {
            if !self.gather()? {
                next = Next::Buffers;
                break;
            }
            let mut header = [0; SIZE];
            match receive_packet(tap, &mut header, &self.chains) {
                // The frame was cut, or is no frame: it is lost. The buffers are as good as before.
                Ok(got) if got >= self.room || got < SIZE + ETHERNET => {}
                Ok(got) => {
                    self.deliver(header, got)?;
                    delivered = true;
                }
                Err(error) => match Errno::from_io_error(&error) {
                    // INVAL: virtio's header can't express this kind of frame, which is lost.
                    Some(Errno::INTR | Errno::INVAL) => {}
                    Some(Errno::AGAIN) => {
                        next = Next::Tap;
                        break;
                    }
                    Some(Errno::BADFD) => {
                        next = Next::Nothing;
                        break;
                    }
                    _ => return Err(DeviceError::host("read from a tap", error)),
                },
            }
        }
        if delivered {
            self.queue.signal()?;
        }
        Ok(next)
    }

    /// Takes chains from the ring until the longest frame fits. False: the driver must give more
    /// first, or has made us look so often that others must have their turn.
    fn gather(&mut self) -> Result<bool, DeviceError> {
        let mut looks = 0;
        while self.room < self.need {
            let Some(chain) = self.queue.next_chain()? else {
                if !self.queue.rearm()? {
                    return Ok(false);
                }
                looks += 1;
                if looks > MAX_LOOKS {
                    self.queue.again();
                    return Ok(false);
                }
                continue;
            };
            let least = if self.mergeable { SIZE } else { self.need };
            if chain.writable() < least {
                return Err(DeviceError::Guest {
                    rule: "gives a receive buffer that is too short",
                });
            }
            self.buffers += chain.writable_buffers();
            if self.buffers > MAX_PACKET_VECTORS {
                return Err(DeviceError::Guest {
                    rule: "gives receive buffers in so many pieces that a frame does not fit them",
                });
            }
            self.room += chain.writable();
            self.chains.push(chain);
        }
        Ok(true)
    }

    /// Gives the driver back the chains that the `got` bytes fill.
    fn deliver(&mut self, mut header: [u8; SIZE], got: usize) -> Result<(), DeviceError> {
        let (mut count, mut held) = (0, 0);
        for chain in &self.chains {
            if held >= got {
                break;
            }
            held += chain.writable();
            count += 1;
        }
        let (_, chains_in_frame) = header.split_at_mut(SIZE - 2);
        // At most the ring's size.
        let chains = u16::try_from(count).unwrap_or(u16::MAX);
        chains_in_frame.copy_from_slice(&chains.to_le_bytes());
        let (mut first, mut left) = (true, got);
        let mut filled: Vec<Chain> = self.chains.drain(..count).collect();
        for chain in &mut filled {
            self.room -= chain.writable();
            self.buffers -= chain.writable_buffers();
            let part = left.min(chain.writable());
            left -= part;
            if std::mem::take(&mut first) {
                chain.write_all(&header)?;
                chain.skip_writable(part - SIZE);
            } else {
                chain.skip_writable(part);
            }
        }
        Ok(self.queue.give_back_all(filled)?)
    }
}
