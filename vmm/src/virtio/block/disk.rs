//! A disk on the host: a block device or a regular file. We never interpret its content.
//!
//! The shim opens the file and chooses it. We check that it can serve as a disk at all. Its size is
//! taken once: if the file grows later, the disk does not.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags, SeekFrom, fcntl_getfl, fstat, ioctl_blksszget, seek};
use rustix::io::Errno;

use crate::virtio::number;

/// The unit of all offsets and lengths, whatever the disk's own blocks (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;

#[derive(Debug, thiserror::Error)]
pub enum BadDisk {
    /// It is neither a block device nor a regular file.
    #[error("add a disk: the descriptor is neither a block device nor a regular file")]
    Kind,
    /// It is smaller than a sector; bytes.
    #[error("add a disk: its {0} bytes are less than a sector")]
    Size(u64),
    /// The descriptor lacks an access mode that the disk needs.
    #[error("add a disk: the descriptor was not opened for {0}")]
    Access(&'static str),
    #[error("add a disk: ask for its {what}")]
    Ask {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
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
    /// Takes the descriptor if it can be a disk.
    pub fn new(file: OwnedFd, read_only: bool) -> Result<Self, BadDisk> {
        let ask = |what| {
            move |errno: Errno| BadDisk::Ask {
                what,
                source: errno.into(),
            }
        };
        let kind = FileType::from_raw_mode(fstat(&file).map_err(ask("kind"))?.st_mode);
        let block_size = match kind {
            FileType::RegularFile => number::low(SECTOR),
            FileType::BlockDevice => ioctl_blksszget(&file).map_err(ask("block size"))?,
            _ => return Err(BadDisk::Kind),
        };
        let access = fcntl_getfl(&file).map_err(ask("access mode"))?;
        if access.contains(OFlags::PATH) {
            return Err(BadDisk::Access("reading"));
        }
        match access & OFlags::RWMODE {
            OFlags::WRONLY => return Err(BadDisk::Access("reading")),
            OFlags::RDONLY if !read_only => return Err(BadDisk::Access("writing")),
            _ => {}
        }
        // Seeking is the one way to a size that both kinds know. We never use the position
        // otherwise.
        let bytes = seek(&file, SeekFrom::End(0)).map_err(ask("size"))?;
        let sectors = bytes / SECTOR;
        if sectors == 0 {
            return Err(BadDisk::Size(bytes));
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
    use std::fs::File;

    #[test]
    fn only_what_can_be_a_disk_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, [0; 1500]).unwrap();
        let open = |read, write| -> OwnedFd {
            let mut options = File::options();
            options.read(read).write(write).open(&path).unwrap().into()
        };
        let disk = Disk::new(open(true, true), false).unwrap();
        assert_eq!((disk.sectors(), disk.block_size()), (2, 512));
        assert!(Disk::new(open(true, false), true).is_ok());
        let unwritable = Disk::new(open(true, false), false);
        assert!(matches!(unwritable, Err(BadDisk::Access("writing"))));
        let unreadable = Disk::new(open(false, true), true);
        assert!(matches!(unreadable, Err(BadDisk::Access("reading"))));
        std::fs::write(&path, [0; 511]).unwrap();
        let small = Disk::new(open(true, false), true);
        assert!(matches!(small, Err(BadDisk::Size(511))));
        let folder = File::open(folder.path()).unwrap().into();
        assert!(matches!(Disk::new(folder, true), Err(BadDisk::Kind)));
    }
}
