//! A disk on the host: a block device or a regular file. We never interpret its content.
//!
//! The shim opens the file, chooses it, and tells its size once: if the file grows later, the disk
//! does not. Nothing is asked of the descriptor here, so the jail needs no call for that.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The unit of all offsets and lengths, whatever the disk's own blocks (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;

/// The largest block that a disk may have, in bytes.
const MAX_BLOCK: u32 = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum BadDisk {
    /// It is smaller than a sector; bytes.
    #[error("add a disk: its {0} bytes are less than a sector")]
    Size(u64),
    #[error("add a disk: its blocks of {0} bytes are no power of two from {SECTOR} to {MAX_BLOCK}")]
    Blocks(u32),
}

/// An open disk. Dropped, its descriptor is closed.
#[derive(Debug)]
pub struct Disk {
    file: OwnedFd,
    sectors: u64,
    block_size: u32,
    read_only: bool,
}

impl Disk {
    /// Takes a descriptor that is open for reading and, unless it is `read_only`, for writing. The
    /// disk has `bytes` bytes, in blocks of `block_size`.
    pub fn new(
        file: OwnedFd,
        bytes: u64,
        block_size: u32,
        read_only: bool,
    ) -> Result<Self, BadDisk> {
        let sectors = bytes / SECTOR;
        if sectors == 0 {
            return Err(BadDisk::Size(bytes));
        }
        if !block_size.is_power_of_two()
            || !(SECTOR..=MAX_BLOCK.into()).contains(&block_size.into())
        {
            return Err(BadDisk::Blocks(block_size));
        }
        Ok(Self {
            file,
            sectors,
            block_size,
            read_only,
        })
    }

    /// The size in sectors of 512 bytes, rounded down; never 0.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The size of the disk's own blocks in bytes: the least that it reads or writes at a time.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Returns when everything written so far is on stable storage.
    pub fn flush(&self) -> std::io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_a_disk_is_taken() {
        let disk = |bytes, blocks| {
            let file = tempfile::tempfile().unwrap().into();
            Disk::new(file, bytes, blocks, false)
        };
        let good = disk(1500, 512).unwrap();
        assert_eq!((good.sectors(), good.block_size()), (2, 512));
        assert!(disk(1 << 20, 4096).is_ok());
        assert!(matches!(disk(511, 512), Err(BadDisk::Size(511))));
        for blocks in [0, 1, 256, 513, 1 << 17] {
            assert!(matches!(disk(4096, blocks), Err(BadDisk::Blocks(_))));
        }
    }
}
