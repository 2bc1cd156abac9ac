//! The pod's memory volumes: which tmpfs of the host each stands for.
//!
//! Called by `pod` while a spec is split. What containers share on the host, they share in the
//! guest: a tmpfs of the host has one name for the whole pod, whoever mounts it.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use kata_like_agent_protocol::agent::MemoryVolume;
use rustix::fs::{CWD, Mode, OFlags};

use crate::file_systems::TMPFS_MAGIC;
use kata_like_failure::Failure;

/// As /dev/shm is everywhere: for all, and each deletes its own only.
const MODE: u32 = 0o1777;

/// A directory on a tmpfs of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    directory: (u64, u64),
    size_bytes: u64,
}

/// What `source` leads to, if that is a directory on a tmpfs. Its size is that of the host's, which
/// is how kubelet and containerd tell it.
pub fn look(source: &Path) -> Result<Option<HostMemory>, Failure> {
    let look = || {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
        let fd = rustix::fs::openat(CWD, source, flags, Mode::empty())?;
        Ok((rustix::fs::fstatfs(&fd)?, rustix::fs::fstat(&fd)?))
    };
    let (system, about) = match look() {
        Ok(found) => found,
        Err(rustix::io::Errno::NOTDIR) => return Ok(None),
        Err(errno) => {
            let step = format!("look at source {}", source.display());
            return Err(Failure::failed(step, io::Error::from(errno)));
        }
    };
    if system.f_type as u32 != TMPFS_MAGIC {
        return Ok(None);
    }
    let block = u64::try_from(system.f_bsize).unwrap_or_default();
    Ok(Some(HostMemory {
        directory: (about.st_dev, about.st_ino),
        size_bytes: system.f_blocks.saturating_mul(block),
    }))
}

/// The names that were given.
#[derive(Debug, Default)]
pub struct MemoryNames(HashMap<(u64, u64), String>);

impl MemoryNames {
    /// The volume that stands for a tmpfs of the host.
    pub fn volume(&mut self, memory: HostMemory) -> MemoryVolume {
        let next = self.0.len() + 1;
        let name = self
            .0
            .entry(memory.directory)
            .or_insert_with(|| format!("memory-{next}"));
        MemoryVolume {
            name: name.clone(),
            size_bytes: memory.size_bytes,
            mode: MODE,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_directory_has_one_name() {
        let mut names = MemoryNames::default();
        let memory = |inode| HostMemory {
            directory: (1, inode),
            size_bytes: 64 << 20,
        };
        let first = names.volume(memory(1));
        let second = names.volume(memory(2));
        assert_eq!(names.volume(memory(1)), first);
        assert_ne!(first.name, second.name);
        assert_eq!((first.size_bytes, first.mode), (64 << 20, 0o1777));
        assert!(kata_like_agent_protocol::is_name(&first.name));
    }

    #[test]
    fn only_a_directory_on_a_tmpfs_is_memory() {
        assert_eq!(look(Path::new("/proc")).unwrap(), None);
        assert_eq!(look(Path::new("/proc/version")).unwrap(), None);
        assert!(look(Path::new("/nowhere/at/all")).is_err());
        let shm = look(Path::new("/dev/shm")).unwrap();
        let stat = rustix::fs::statfs("/dev/shm").unwrap();
        let wanted = (stat.f_type as u32 == TMPFS_MAGIC)
            .then(|| stat.f_blocks * u64::try_from(stat.f_bsize).unwrap());
        assert_eq!(shm.map(|memory| memory.size_bytes), wanted);
    }
}
