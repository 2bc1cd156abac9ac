//! The entropy device (virtio 1.2, 5.4): one queue of writable buffers to fill.
//!
//! `machine` puts it into its slot if the CPU gives the guest no RDRAND, or if the shim asks for
//! it. A request gets at most [`MAX_REQUEST`] bytes, however many the guest's buffers hold.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use super::queue::Served;
use super::{
    Activation, Active, Chain, Device, DeviceError, Kind, RING_FEATURES, Token, Virtqueue,
};

/// The most random bytes for one request: getrandom(2) gives as many without interruption.
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

/// All the work of the device, without eventfd or register.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::virtio::GuestRam;

    /// A chain of one writable buffer of `length` bytes at 0x1000.
    fn request(length: u32) -> (GuestRam, Chain) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let memory: GuestRam = Arc::new(memory);
        let mut descriptor = 0x1000u64.to_le_bytes().to_vec();
        descriptor.extend(length.to_le_bytes());
        descriptor.extend([2, 0, 0, 0]); // VIRTQ_DESC_F_WRITE
        memory.write_slice(&descriptor, GuestAddress(0)).unwrap();
        let chain = Chain::walk(memory.clone(), GuestAddress(0), 1, 0).unwrap();
        (memory, chain)
    }

    #[test]
    fn a_request_is_filled_up_to_our_bound() {
        for (asked, filled) in [(1, 1), (256, 256), (0x8_0000, 256)] {
            let (memory, mut chain) = request(asked);
            let source = |bytes: &mut [u8]| {
                bytes.fill(7);
                Ok(bytes.len())
            };
            fill(&mut chain, source).unwrap();
            assert_eq!(chain.written(), filled);
            let last: u8 = memory
                .read_obj(GuestAddress(0xfff + u64::from(filled)))
                .unwrap();
            let after: u8 = memory
                .read_obj(GuestAddress(0x1000 + u64::from(filled)))
                .unwrap();
            assert_eq!((last, after), (7, 0));
        }
    }

    #[test]
    fn a_source_that_fails_is_the_hosts_failure() {
        let (_, mut chain) = request(8);
        let failed = fill(&mut chain, |_| Err(io::Error::other("dry")));
        assert!(matches!(failed, Err(DeviceError::Host { .. })));
    }
}
