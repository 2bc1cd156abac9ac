//! The entropy device (virtio 1.2, 5.4): one queue of writable buffers to fill.
//!
//! `machine` puts it into its slot where the CPU gives the guest no RDRAND, or when the shim asks. A
//! request is filled with at most [`MAX_REQUEST`] bytes, whatever the guest's buffers hold.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use super::queue::Served;
use super::{
    Activation, Active, Chain, Device, DeviceError, Kind, RING_FEATURES, Token, Virtqueue,
};

/// The most random bytes for one request: getrandom(2) gives as many without a break.
const MAX_REQUEST: usize = 256;

const QUEUE_SIZES: [u16; 1] = [64];

/// The idle device.
pub struct Entropy;

/// The running device.
struct Running {
    requests: Virtqueue,
}

impl Device for Entropy {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(self: Box<Self>, mut guest: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let requests = guest.take_queue(0)?;
        Ok(Box::new(Running { requests }))
    }
}

impl Active for Running {
    fn notified(&mut self, _queue: u16) -> Result<(), DeviceError> {
        self.requests.serve(|mut chain| {
            fill(&mut chain, random)?;
            Ok(Served::Done(chain))
        })
    }

    fn ready(&mut self, _token: Token) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(self: Box<Self>) -> Result<Box<dyn Device>, DeviceError> {
        Ok(Box::new(Entropy))
    }
}

fn random(bytes: &mut [u8]) -> io::Result<usize> {
    Ok(getrandom(bytes, GetRandomFlags::NONBLOCK)?)
}

/// The device's whole work: no eventfd, no register.
fn fill(
    request: &mut Chain,
    source: impl FnOnce(&mut [u8]) -> io::Result<usize>,
) -> Result<(), DeviceError> {
    let mut bytes = [0; MAX_REQUEST];
    let wanted = request.writable().min(MAX_REQUEST);
    let buffer = bytes.get_mut(..wanted).unwrap_or_default();
    let got = source(buffer)
        .map_err(|source| DeviceError::host("take random bytes for the guest", source))?;
    request.write_all(buffer.get(..got).unwrap_or_default())?;
    Ok(())
}
