//! One descriptor chain: walked and checked whole, then read and written in order.
//!
//! [`Chain::walk`] copies every descriptor once, so the guest can't change what was checked (virtio
//! 1.2, 2.7.5). It requires:
//! - indices below the table's size, and no more descriptors than the table has, which ends a loop;
//! - an indirect table only as the chain's last direct descriptor, and never in another one;
//! - all buffers in guest memory, readable before writable ones, less than 4 GiB in all.
//!
//! The guest can still change the buffers' contents: read what you decide upon once, into a copy.

use std::io;
use std::os::fd::AsFd;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, Permissions,
    VolatileSlice,
};

use super::guest::GuestRam;
use super::{number, vectors};

/// The most buffers that one system call reads or writes (the kernel's own limit is 1,024).
const MAX_VECTORS: usize = 64;

/// The most buffers of one packet, which must pass in a single system call: UIO_MAXIOV, less one
/// for the packet's header.
pub const MAX_PACKET_VECTORS: usize = 1023;

const DESCRIPTOR_SIZE: u32 = 16;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A head or next index outside of its table.
    #[error("index {index} in a table of {size}")]
    Index {
        /// The head or next index.
        index: u16,
        /// The number of descriptors in the table.
        size: u16,
    },
    /// The chain has more descriptors than the table: a loop.
    #[error("more than {0} descriptors: a loop")]
    Loop(u16),
    /// A descriptor table or a buffer lies outside guest memory.
    #[error("{length} bytes at {address:#x} are not in guest memory")]
    Outside {
        /// The guest-physical address where it begins.
        address: u64,
        /// In bytes.
        length: u32,
    },
    /// An indirect table is inside another one, or beside NEXT, or of a bad size.
    #[error("a bad indirect table of {0} bytes")]
    Indirect(u32),
    /// A readable buffer comes after a writable one.
    #[error("a readable buffer after a writable one")]
    Order,
    /// The buffers hold 4 GiB or more.
    #[error("4 GiB or more in one chain")]
    TooLong,
    /// The chain has fewer bytes than the device needs.
    #[error("{wanted} bytes wanted, {held} left in the chain")]
    Short {
        /// Bytes that the device needs.
        wanted: usize,
        /// Bytes that are left.
        held: usize,
    },
}

#[derive(Clone, Copy, Debug)]
struct Buffer {
    address: GuestAddress,
    length: usize,
}

/// The buffers of one direction, and how far they are used up.
#[derive(Debug, Default)]
struct Side {
    buffers: Vec<Buffer>,
    next: usize,
    left: usize,
}

impl Side {
    fn push(&mut self, buffer: Buffer) {
        self.left += buffer.length;
        self.buffers.push(buffer);
    }

    fn rest(&self) -> &[Buffer] {
        self.buffers.get(self.next..).unwrap_or_default()
    }

    /// Uses up `count` bytes, or all if fewer are left.
    fn advance(&mut self, count: usize) {
        let mut count = count.min(self.left);
        self.left -= count;
        while let Some(buffer) = self.buffers.get_mut(self.next) {
            let step = count.min(buffer.length);
            buffer.length -= step;
            buffer.address = GuestAddress(buffer.address.raw_value() + number::wide(step));
            count -= step;
            if buffer.length > 0 {
                break;
            }
            self.next += 1;
        }
    }
}

/// One checked chain, with a position in its readable and one in its writable bytes.
#[derive(Debug)]
pub struct Chain {
    memory: GuestRam,
    head: u16,
    readable: Side,
    writable: Side,
    written: u32,
}

impl Chain {
    /// Walks the chain that begins at `head` in the descriptor table at `table`.
    pub fn walk(
        memory: GuestRam,
        table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<Self, Malformed> {
        let mut chain = Self {
            memory,
            head,
            readable: Side::default(),
            writable: Side::default(),
            written: 0,
        };
        let (mut table, mut size, mut index) = (table, size, head);
        let (mut left, mut indirect, mut total) = (size, false, 0u32);
        loop {
            if index >= size {
                return Err(Malformed::Index { index, size });
            }
            left = left.checked_sub(1).ok_or(Malformed::Loop(size))?;
            let descriptor = chain.descriptor(table, index)?;
            if descriptor.refers_to_indirect_table() {
                let length = descriptor.len();
                let entries = length / DESCRIPTOR_SIZE;
                if indirect
                    || descriptor.has_next()
                    || length % DESCRIPTOR_SIZE != 0
                    || entries == 0
                    || entries > u32::from(size)
                {
                    return Err(Malformed::Indirect(length));
                }
                indirect = true;
                table = descriptor.addr();
                size = u16::try_from(entries).map_err(|_| Malformed::Indirect(length))?;
                (left, index) = (size, 0);
                continue;
            }
            total = total
                .checked_add(descriptor.len())
                .ok_or(Malformed::TooLong)?;
            chain.add(descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }

    fn descriptor(&self, table: GuestAddress, index: u16) -> Result<Descriptor, Malformed> {
        let outside = || Malformed::Outside {
            address: table.raw_value(),
            length: DESCRIPTOR_SIZE,
        };
        let address = table
            .checked_add(u64::from(index) * u64::from(DESCRIPTOR_SIZE))
            .ok_or_else(outside)?;
        self.memory
            .read_obj::<RawDescriptor>(address)
            .map(Descriptor::from)
            .map_err(|_| outside())
    }

    fn add(&mut self, descriptor: Descriptor) -> Result<(), Malformed> {
        let buffer = Buffer {
            address: descriptor.addr(),
            length: number::index(descriptor.len()),
        };
        let access = match descriptor.is_write_only() {
            true => Permissions::Write,
            false => Permissions::Read,
        };
        if !GuestMemory::check_range(&*self.memory, buffer.address, buffer.length, access) {
            return Err(Malformed::Outside {
                address: buffer.address.raw_value(),
                length: descriptor.len(),
            });
        }
        if descriptor.is_write_only() {
            self.writable.push(buffer);
        } else if self.writable.buffers.is_empty() {
            self.readable.push(buffer);
        } else {
            return Err(Malformed::Order);
        }
        Ok(())
    }

    /// The index of the chain's first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// How many bytes are left to read.
    pub fn readable(&self) -> usize {
        self.readable.left
    }

    /// How many bytes are left to write.
    pub fn writable(&self) -> usize {
        self.writable.left
    }

    /// How many buffers are left to write.
    pub fn writable_buffers(&self) -> usize {
        self.writable.rest().len()
    }

    /// How many bytes were written. The driver is told when the chain is given back.
    pub fn written(&self) -> u32 {
        self.written
    }

    /// Fills `bytes` from the readable buffers. Fails if fewer are left.
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), Malformed> {
        let (wanted, held) = (bytes.len(), self.readable.left);
        if wanted > held {
            return Err(Malformed::Short { wanted, held });
        }
        let mut at = 0;
        for buffer in self.readable.rest() {
            let rest = bytes.get_mut(at..).unwrap_or_default();
            let count = rest.len().min(buffer.length);
            let Some(part) = rest.get_mut(..count).filter(|part| !part.is_empty()) else {
                break;
            };
            self.memory
                .read_slice(part, buffer.address)
                .map_err(|_| outside(buffer))?;
            at += count;
        }
        self.readable.advance(wanted);
        Ok(())
    }

    /// Copies a structure out of the readable buffers, so that the guest can't change it any more.
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Result<T, Malformed> {
        let mut object = T::default();
        self.read_exact(object.as_mut_slice())?;
        Ok(object)
    }

    /// Writes all of `bytes` to the writable buffers. Fails if they don't fit.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        let (wanted, held) = (bytes.len(), self.writable.left);
        if wanted > held {
            return Err(Malformed::Short { wanted, held });
        }
        let mut rest = bytes;
        for buffer in self.writable.rest() {
            if rest.is_empty() {
                break;
            }
            let (part, after) = rest.split_at(rest.len().min(buffer.length));
            self.memory
                .write_slice(part, buffer.address)
                .map_err(|_| outside(buffer))?;
            rest = after;
        }
        self.writable.advance(wanted);
        self.count_written(wanted);
        Ok(())
    }

    /// As [`Chain::write_all`], for a structure.
    pub fn write_object<T: ByteValued>(&mut self, object: &T) -> Result<(), Malformed> {
        self.write_all(object.as_slice())
    }

    /// One `readv(2)` of at most `limit` bytes from `source` straight into the writable buffers.
    /// `Ok(0)` is the source's end, if `limit` and [`Chain::writable`] are not 0.
    pub fn write_from(&mut self, source: impl AsFd, limit: usize) -> io::Result<usize> {
        self.fill(source, limit, None)
    }

    /// Like [`Chain::write_from`], from `offset` on (`preadv(2)`).
    pub fn write_from_at(
        &mut self,
        source: impl AsFd,
        limit: usize,
        offset: u64,
    ) -> io::Result<usize> {
        self.fill(source, limit, Some(offset))
    }

    /// One `writev(2)` of at most `limit` readable bytes straight to `target`.
    pub fn read_into(&mut self, target: impl AsFd, limit: usize) -> io::Result<usize> {
        self.drain(target, limit, None)
    }

    /// Like [`Chain::read_into`], to `offset` on (`pwritev(2)`).
    pub fn read_into_at(
        &mut self,
        target: impl AsFd,
        limit: usize,
        offset: u64,
    ) -> io::Result<usize> {
        self.drain(target, limit, Some(offset))
    }

    /// One `writev(2)` of a packet: `head`, then all readable bytes. They are used up if all of it
    /// was written. They must be in at most [`MAX_PACKET_VECTORS`] buffers.
    pub fn send_packet(&mut self, target: impl AsFd, head: &[u8]) -> io::Result<()> {
        let slices = self.pieces(&self.readable, usize::MAX, MAX_PACKET_VECTORS)?;
        let length = head.len() + slices.iter().map(VolatileSlice::len).sum::<usize>();
        if length != head.len() + self.readable.left {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        if vectors::write(target, None, head, &slices)? != length {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.readable.advance(self.readable.left);
        Ok(())
    }

    /// Leaves `count` writable bytes (or all that are left) as they are. They count as written.
    pub fn skip_writable(&mut self, count: usize) {
        let count = count.min(self.writable.left);
        self.writable.advance(count);
        self.count_written(count);
    }

    fn fill(&mut self, source: impl AsFd, limit: usize, offset: Option<u64>) -> io::Result<usize> {
        let slices = self.slices(&self.writable, limit)?;
        let got = vectors::read(source, offset, &mut [], &slices)?;
        self.writable.advance(got);
        self.count_written(got);
        Ok(got)
    }

    fn drain(&mut self, target: impl AsFd, limit: usize, offset: Option<u64>) -> io::Result<usize> {
        let slices = self.slices(&self.readable, limit)?;
        let sent = vectors::write(target, offset, &[], &slices)?;
        self.readable.advance(sent);
        Ok(sent)
    }

    /// The first bytes of one side as host memory: at most `limit` bytes in MAX_VECTORS pieces.
    fn slices(&self, side: &Side, limit: usize) -> io::Result<Vec<VolatileSlice<'_>>> {
        self.pieces(side, limit, MAX_VECTORS)
    }

    fn pieces(&self, side: &Side, limit: usize, most: usize) -> io::Result<Vec<VolatileSlice<'_>>> {
        let mut left = limit;
        let mut slices = Vec::new();
        // Empty ones count for nothing: a call that gets only such looks like the other side's end.
        let filled = side.rest().iter().filter(|buffer| buffer.length > 0);
        for buffer in filled.take(most) {
            let count = buffer.length.min(left);
            if count == 0 {
                break;
            }
            let slice = GuestMemoryBackend::get_slice(&*self.memory, buffer.address, count)
                .map_err(|_| io::Error::other(outside(buffer)))?;
            slices.push(slice);
            left -= count;
        }
        Ok(slices)
    }

    /// A chain holds less than 4 GiB, so this can't overflow.
    fn count_written(&mut self, count: usize) {
        self.written = self
            .written
            .saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }
}

/// One `readv(2)` of a packet: into `head`, which stands for the first bytes of the first chain,
/// then into the writable buffers of `chains`, one after the other, up to [`MAX_PACKET_VECTORS`]
/// buffers. Nothing counts as written yet; the caller counts what the packet takes.
pub fn receive_packet(source: impl AsFd, head: &mut [u8], chains: &[Chain]) -> io::Result<usize> {
    let mut slices = Vec::new();
    let mut skip = head.len();
    for chain in chains {
        let most = MAX_PACKET_VECTORS.saturating_sub(slices.len());
        for slice in chain.pieces(&chain.writable, usize::MAX, most)? {
            let behind = slice.offset(skip.min(slice.len()));
            skip -= skip.min(slice.len());
            slices.push(behind.map_err(io::Error::other)?);
        }
    }
    vectors::read(source, None, head, &slices)
}

fn outside(buffer: &Buffer) -> Malformed {
    Malformed::Outside {
        address: buffer.address.raw_value(),
        length: u32::try_from(buffer.length).unwrap_or(u32::MAX),
    }
}
