//! One request of a driver (virtio 1.2, 5.2.6): checked against the disk, then carried out.
//!
//! `worker` calls [`serve`] for each chain. [`Request::parse`] copies the bytes that decide once
//! and checks them as a whole. After that, bytes move between the disk and guest memory without a
//! buffer of ours. A request that can't be carried out gets an error status; only one without room
//! for a status breaks the device.

use std::io;

use super::disk::{Disk, SECTOR};
use crate::virtio::{Chain, DeviceError, number};

/// `struct virtio_blk_req` up to its data: type, reserved, sector.
const HEADER_SIZE: usize = 16;

/// The most bytes of one system call; between two of them a reset is noticed.
const STEP: usize = 4 << 20;

/// The name that the guest reads, padded with NULs. All disks have the same: slots tell them apart.
const NAME: [u8; 20] = *b"kata-like\0\0\0\0\0\0\0\0\0\0\0";

const DONE: u8 = 0;

/// An error status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// VIRTIO_BLK_S_IOERR: the request is wrong, or the host's storage failed.
    Failed,
    /// VIRTIO_BLK_S_UNSUPP: a kind of request that is not offered.
    Unsupported,
}

impl Refusal {
    /// The byte that the driver reads.
    fn status(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Unsupported => 2,
        }
    }
}

/// What to do. Every byte of it lies on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Read {
        /// In bytes, on the disk.
        offset: u64,
        length: usize,
    },
    Write {
        /// In bytes, on the disk.
        offset: u64,
        length: usize,
    },
    /// Make everything written so far durable.
    Flush,
    /// Return the disk's name.
    Name,
}

impl Request {
    /// Checks a header against the disk and the chain. `readable` and `writable` are the numbers of
    /// bytes between the header and the status.
    pub fn parse(
        header: [u8; HEADER_SIZE],
        readable: usize,
        writable: usize,
        sectors: u64,
        read_only: bool,
    ) -> Result<Self, Refusal> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match (u32::from_le_bytes([t0, t1, t2, t3]), readable) {
            (0, 0) => Ok(Self::Read {
                offset: check(sector, writable, sectors)?,
                length: writable,
            }),
            (1, _) if !read_only && writable == 0 => Ok(Self::Write {
                offset: check(sector, readable, sectors)?,
                length: readable,
            }),
            (0 | 1, _) => Err(Refusal::Failed),
            (4, _) => Ok(Self::Flush),
            (8, _) if writable >= NAME.len() => Ok(Self::Name),
            (8, _) => Err(Refusal::Failed),
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Carries the request out. Stops in the middle when `stopped` says so: nobody waits for the
    /// rest.
    fn perform(
        self,
        chain: &mut Chain,
        disk: &Disk,
        flush_each_write: bool,
        stopped: impl Fn() -> bool,
    ) -> Result<(), Refusal> {
        match self {
            Self::Read { offset, length } => transfer(offset, length, stopped, |at, limit| {
                chain.write_from_at(disk, limit, at)
            }),
            Self::Write { offset, length } => {
                transfer(offset, length, stopped, |at, limit| {
                    chain.read_into_at(disk, limit, at)
                })?;
                match flush_each_write {
                    true => flush(disk),
                    false => Ok(()),
                }
            }
            Self::Flush => flush(disk),
            Self::Name => chain.write_all(&NAME).map_err(|_| Refusal::Failed),
        }
    }
}

/// The offset in bytes of sector `sector`, if `length` bytes from there on are on the disk.
fn check(sector: u64, length: usize, sectors: u64) -> Result<u64, Refusal> {
    let length = u64::try_from(length).map_err(|_| Refusal::Failed)?;
    let end = sector.checked_add(length / SECTOR);
    if !length.is_multiple_of(SECTOR) || end.is_none_or(|end| end > sectors) {
        return Err(Refusal::Failed);
    }
    sector.checked_mul(SECTOR).ok_or(Refusal::Failed)
}

fn transfer(
    offset: u64,
    length: usize,
    stopped: impl Fn() -> bool,
    mut step: impl FnMut(u64, usize) -> io::Result<usize>,
) -> Result<(), Refusal> {
    let (mut at, mut left) = (offset, length);
    while left > 0 {
        if stopped() {
            return Err(Refusal::Failed);
        }
        match step(at, left.min(STEP)) {
            Ok(0) => return Err(Refusal::Failed), // the file has become shorter
            Ok(count) => {
                left = left.saturating_sub(count);
                at = at.saturating_add(number::wide(count));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Refusal::Failed),
        }
    }
    Ok(())
}

fn flush(disk: &Disk) -> Result<(), Refusal> {
    disk.flush().map_err(|_| Refusal::Failed)
}

/// Serves one chain, its status included.
pub fn serve(
    chain: &mut Chain,
    disk: &Disk,
    flush_each_write: bool,
    stopped: impl Fn() -> bool,
) -> Result<(), DeviceError> {
    let mut header = [0; HEADER_SIZE];
    chain.read_exact(&mut header)?;
    let Some(writable) = chain.writable().checked_sub(1) else {
        return Err(DeviceError::Guest {
            rule: "gives a disk's request no byte for its status",
        });
    };
    let (sectors, read_only) = (disk.sectors(), disk.is_read_only());
    let status = Request::parse(header, chain.readable(), writable, sectors, read_only)
        .and_then(|request| request.perform(chain, disk, flush_each_write, stopped))
        .map_or_else(Refusal::status, |()| DONE);
    // The status is the last byte, whatever comes before it.
    chain.skip_writable(chain.writable().saturating_sub(1));
    chain.write_all(&[status])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(kind: u32, sector: u64) -> [u8; HEADER_SIZE] {
        let mut header = [0xff; HEADER_SIZE];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    #[test]
    fn a_request_must_lie_on_the_disk() {
        let read = |sector, length| Request::parse(header(0, sector), 0, length, 8, false);
        let whole = Request::Read {
            offset: 0,
            length: 4096,
        };
        assert_eq!(read(0, 4096), Ok(whole));
        let last = Request::Read {
            offset: 3584,
            length: 512,
        };
        assert_eq!(read(7, 512), Ok(last));
        for (sector, length) in [
            (0, 4608),
            (7, 1024),
            (8, 512),
            (0, 511),
            (0, 513),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (1 << 55, 0),
        ] {
            assert_eq!(read(sector, length), Err(Refusal::Failed), "{sector}");
        }
    }

    /// Every edge of 64 bits, in numbers that don't wrap.
    #[test]
    fn a_request_lies_on_the_disk_at_every_edge() {
        let ends = [0u64, 8, 512, 1 << 32, 1 << 55, 1 << 63];
        let edges: Vec<u64> = ends
            .iter()
            .flat_map(|end| (0..5u64).map(|step| end.wrapping_add(step).wrapping_sub(2)))
            .collect();
        for sector in &edges {
            for length in &edges {
                for sectors in &edges {
                    let end = u128::from(*sector) * 512 + u128::from(*length);
                    // A disk has fewer than 2^64 bytes, so none is this large.
                    let fits = length.is_multiple_of(512)
                        && end <= u128::from(*sectors) * 512
                        && u128::from(*sector) * 512 <= u128::from(u64::MAX);
                    let wanted = fits.then(|| sector * 512).ok_or(Refusal::Failed);
                    let got = check(*sector, *length as usize, *sectors);
                    assert_eq!(got, wanted, "{length} bytes at {sector} of {sectors}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_offered_is_refused() {
        let write = |read_only| Request::parse(header(1, 0), 512, 0, 8, read_only);
        assert!(write(false).is_ok());
        assert_eq!(write(true), Err(Refusal::Failed));
        // Data of the wrong direction is no data.
        assert!(Request::parse(header(1, 0), 512, 512, 8, false).is_err());
        assert!(Request::parse(header(0, 0), 512, 512, 8, false).is_err());
        assert!(Request::parse(header(8, 0), 0, 19, 8, false).is_err());
        for kind in [2, 3, 5, 6, 7, 9, 10, 11, 13, 14, u32::MAX] {
            let refused = Request::parse(header(kind, 0), 512, 512, 8, false);
            assert_eq!(refused, Err(Refusal::Unsupported), "{kind}");
        }
    }

    proptest! {
        /// Whatever the header and the chain say, the bytes taken lie on the disk, and nothing is
        /// written to a read-only disk.
        #[test]
        fn nothing_reaches_beyond_the_disk(
            kind in prop_oneof![8 => 0u32..2, 2 => 0u32..16, 1 => any::<u32>()],
            sector in prop_oneof![4 => 0u64..70, 1 => (0u64..200).prop_map(|less| u64::MAX - less), 1 => any::<u64>()],
            readable in prop_oneof![2 => Just(0usize), 2 => (0usize..80).prop_map(|n| n * 512), 1 => 0usize..40_000, 1 => any::<usize>()],
            writable in prop_oneof![2 => Just(0usize), 2 => (0usize..80).prop_map(|n| n * 512), 1 => 0usize..40_000, 1 => any::<usize>()],
            sectors in prop_oneof![1u64..70, any::<u64>()],
            read_only in any::<bool>(),
        ) {
            match Request::parse(header(kind, sector), readable, writable, sectors, read_only) {
                Ok(Request::Read { offset, length }) | Ok(Request::Write { offset, length }) => {
                    let end = u128::from(offset) + length as u128;
                    prop_assert!(end <= u128::from(sectors) * 512);
                    prop_assert_eq!((offset % 512, length % 512), (0, 0));
                    prop_assert_eq!(u128::from(offset), u128::from(sector) * 512);
                    prop_assert!(kind == 0 || kind == 1 && !read_only);
                }
                Ok(Request::Flush | Request::Name) | Err(_) => {}
            }
        }
    }
}
