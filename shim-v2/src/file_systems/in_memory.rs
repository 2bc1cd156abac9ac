//! Which file systems of the host keep in memory what is written to them.
//!
//! Called by `pod` for the pod's memory limit on the host.

use std::io;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};

use super::{TMPFS_MAGIC, mount_table};

/// RAMFS_MAGIC of linux/magic.h.
const RAMFS_MAGIC: u32 = 0x8584_58f6;

/// A file system of the host whose files are memory of the pod that writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InMemory {
    /// The number of its device.
    pub device: u64,
    /// In bytes; 0: it has no limit.
    pub size: u64,
}

/// That of a file or directory, if it is in memory. What is not there is not.
pub fn at(path: &Path) -> Option<InMemory> {
    look(path).ok().flatten()
}

/// Those that are mounted below a directory.
pub fn below(path: &Path) -> Vec<InMemory> {
    let (Ok(top), Ok(mounts)) = (std::fs::canonicalize(path), mount_table::read()) else {
        return Vec::new();
    };
    mounts
        .into_iter()
        .filter(|mount| matches!(mount.kind.as_str(), "tmpfs" | "ramfs"))
        .filter(|mount| mount.path != top && mount.path.starts_with(&top))
        .filter_map(|mount| at(&mount.path))
        .collect()
}

fn look(path: &Path) -> io::Result<Option<InMemory>> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    let system = rustix::fs::fstatfs(&file)?;
    // The kernel's word is wider; all magic numbers have 32 bits.
    if !matches!(system.f_type as u32, TMPFS_MAGIC | RAMFS_MAGIC) {
        return Ok(None);
    }
    let block = u64::try_from(system.f_bsize).unwrap_or_default();
    Ok(Some(InMemory {
        device: rustix::fs::fstat(&file)?.st_dev,
        size: system.f_blocks.saturating_mul(block),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_at_the_source_and_below() {
        assert_eq!(at(Path::new("/proc")), None);
        assert_eq!(at(Path::new("/nowhere/at/all")), None);
        let mounts = mount_table::read().unwrap();
        let shm = Path::new("/dev/shm");
        if !mounts.iter().any(|it| it.path == shm && it.kind == "tmpfs") {
            return;
        }
        let own = at(shm).unwrap();
        let stat = rustix::fs::statfs(shm).unwrap();
        assert_eq!(
            own.size,
            stat.f_blocks * u64::try_from(stat.f_bsize).unwrap()
        );
        assert!(below(Path::new("/dev")).contains(&own));
        assert!(!below(shm).contains(&own));
    }
}
