//! The network device (virtio 1.2, 5.1): a receive and a transmit queue over a tap of the host.
//!
//! `slots` puts it into one of the slots for interfaces, when the pod's network is known, and takes
//! it out again. `tap` is the host's descriptor, `header` comes before each frame, `receive` and
//! `send` are the two ways, `job` is the thread that serves both.
//!
//! Checksums and the cutting of long TCP segments pass through: a frame of up to 64 KiB, its
//! checksum not computed yet, crosses the tap as it is if both sides can take it. The host's kernel
//! does what the driver has not negotiated. There is no control queue: the device has only its one
//! address, and filters are the driver's own business.

mod features;
mod header;
mod job;
pub(crate) mod receive;
pub(crate) mod send;
pub(crate) mod tap;

use self::features::FEATURES;
use self::job::Frames;
use self::receive::Receive;
use self::send::Send;
pub use self::tap::Tap;
use super::worker::{Serving, Worker};
use super::{Activation, Active, Device, DeviceError, Kind, RING_FEATURES, Token};

/// Receive, transmit.
const QUEUE_SIZES: [u16; 2] = [256; 2];

/// `struct virtio_net_config` up to `mtu`; what follows belongs to features never offered.
const CONFIG_SIZE: usize = 12;

/// The thread uses this token to say that it has ended.
const ENDED: Token = Token(0);

/// The idle device.
pub struct Net {
    tap: Tap,
    worker: Worker,
    config: [u8; CONFIG_SIZE],
    mtu: u16,
}

impl Net {
    /// Makes a device over `tap` with this address and MTU (at least 68). `worker` must serve no
    /// other device at the same time.
    pub fn new(tap: Tap, mac: [u8; 6], mtu: u16, worker: Worker) -> Self {
        let mut config = [0; CONFIG_SIZE];
        let (address, rest) = config.split_at_mut(mac.len());
        address.copy_from_slice(&mac);
        let (_status_and_pairs, bytes) = rest.split_at_mut(4);
        bytes.copy_from_slice(&mtu.to_le_bytes());
        Self {
            tap,
            worker,
            config,
            mtu,
        }
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        RING_FEATURES | FEATURES
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
        let Self {
            tap,
            worker,
            config,
            mtu,
        } = *self;
        tap.set_offloads(guest.features)
            .map_err(|source| DeviceError::host("set what a tap leaves to the guest", source))?;
        let frames = Frames {
            tap,
            receive: Receive::new(guest.take_queue(0)?, guest.features, mtu),
            send: Send::new(guest.take_queue(1)?, guest.features),
        };
        Ok(Box::new(Running {
            serving: Serving::begin(worker, frames, guest.host, ENDED)?,
            config,
            mtu,
        }))
    }
}

/// The running device; the thread has the tap.
struct Running {
    serving: Serving<Tap>,
    config: [u8; CONFIG_SIZE],
    mtu: u16,
}

impl Active for Running {
    fn notified(&mut self, _queue: u16) -> Result<(), DeviceError> {
        Ok(())
    }

    fn ready(&mut self, _token: Token) -> Result<(), DeviceError> {
        self.serving.ready()
    }

    fn reset(self: Box<Self>) -> Result<Box<dyn Device>, DeviceError> {
        let (tap, worker) = self.serving.end()?;
        Ok(Box::new(Net {
            tap,
            worker,
            config: self.config,
            mtu: self.mtu,
        }))
    }
}

#[cfg(test)]
mod tests;
