//! Which pod lives in a network namespace: `/run/kata-like/network:DEVICE:INODE`.
//!
//! Two virtual machines can't share a network. So whoever is given a namespace looks here, whatever
//! path has led to it: the file is named by what the kernel knows the namespace by, holds the name
//! of the pod's state folder, and is locked as long as the pod is there. The lock is the truth: the
//! kernel drops it with the shim, and a file that nobody has locked counts for nothing. A living
//! pod keeps its namespace, and so the numbers are no other's.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FlockOperation, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{PRIVATE_FILE, ROOT, StateError, folder_name, make_root, open_checked};

/// What follows the name of a pod that is leaving.
const LEAVING: &str = " leaving";
/// No file holds more: two names, a colon and that.
const MAX_LENGTH: u64 = 2 * 76 + 1 + LEAVING.len() as u64;

/// What the kernel knows a network namespace by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkId {
    /// The number of its file system.
    pub device: u64,
    /// Its number there; another namespace's once it is gone.
    pub inode: u64,
}

impl NetworkId {
    /// That of an open namespace.
    pub fn of(namespace: impl AsFd) -> io::Result<Self> {
        Ok(rustix::fs::fstat(namespace)?.into())
    }

    /// That of the namespace at a path.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(rustix::fs::stat(path)?.into())
    }

    fn file_name(self) -> String {
        // Two colons: no state folder's.
        format!("network:{}:{}", self.device, self.inode)
    }

    fn named(file: &str) -> Option<Self> {
        let (device, inode) = file.strip_prefix("network:")?.split_once(':')?;
        Some(Self {
            device: device.parse().ok()?,
            inode: inode.parse().ok()?,
        })
    }
}

impl From<rustix::fs::Stat> for NetworkId {
    fn from(stat: rustix::fs::Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

/// What [`NetworkLock::take`] has found.
#[derive(Debug)]
pub enum Occupied {
    /// Nobody was there; the pod is now.
    Free(NetworkLock),
    /// A pod is there.
    By {
        /// A namespace of containerd's, not of Linux.
        namespace: String,
        /// containerd's id of the pod.
        sandbox: String,
    },
    /// A pod has just come, or is leaving: ask again.
    Changing,
}

/// A network namespace that is a pod's. Dropped, it is nobody's.
#[derive(Debug)]
pub struct NetworkLock {
    id: NetworkId,
    root: OwnedFd,
    file: File,
    dead: Option<(String, String)>,
    is_handed_over: bool,
}

impl NetworkLock {
    fn new(id: NetworkId, root: OwnedFd, file: File) -> Self {
        Self {
            id,
            root,
            file,
            dead: None,
            is_handed_over: false,
        }
    }

    /// Takes a namespace for a pod, unless there is one. Does not wait.
    pub fn take(id: NetworkId, namespace: &str, sandbox: &str) -> Result<Occupied, StateError> {
        Self::take_under(Path::new(ROOT), id, namespace, sandbox)
    }

    /// As [`NetworkLock::take`], below another root than [`ROOT`].
    pub fn take_under(
        root: &Path,
        id: NetworkId,
        namespace: &str,
        sandbox: &str,
    ) -> Result<Occupied, StateError> {
        let own = folder_name(namespace, sandbox)?;
        let path = root.join(id.file_name());
        let root = make_root(root)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&root, id.file_name(), flags, PRIVATE_FILE)
            .map(File::from)
            .map_err(|errno| StateError::io("open", &path, errno))?;
        let is_ours = match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => true,
            Err(Errno::WOULDBLOCK) => false,
            Err(errno) => return Err(StateError::io("lock", &path, errno)),
        };
        let mut text = String::new();
        let read = (&file).take(MAX_LENGTH).read_to_string(&mut text);
        read.map_err(|source| StateError::io("read", &path, source))?;
        let (name, is_leaving) = match text.strip_suffix(LEAVING) {
            Some(name) => (name, true),
            None => (text.as_str(), false),
        };
        let named = name.split_once(':');
        let named = named.map(|(namespace, id)| (namespace.to_owned(), id.to_owned()));
        if !is_ours {
            return Ok(match named.filter(|_| !is_leaving) {
                Some((namespace, sandbox)) => Occupied::By { namespace, sandbox },
                None => Occupied::Changing,
            });
        }
        if !rustix::fs::fstat(&file).is_ok_and(|stat| stat.st_nlink > 0) {
            return Ok(Occupied::Changing); // its last holder has just removed it
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.write_all_at(own.as_bytes(), 0));
        written.map_err(|source| StateError::io("write", &path, source))?;
        let mut lock = Self::new(id, root, file);
        lock.dead = named;
        Ok(Occupied::Free(lock))
    }

    /// Whether there is a pod's file, living or dead.
    pub fn is_there(root: &Path, id: NetworkId) -> bool {
        root.join(id.file_name()).exists()
    }

    /// The one that this descriptor is of, which another process has taken and handed over; none if
    /// it is of something else, or of a file that is gone.
    pub fn inherited(descriptor: OwnedFd) -> Option<Self> {
        let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        let path = std::fs::read_link(link).ok()?;
        let id = NetworkId::named(path.file_name()?.to_str()?)?;
        let root = path.parent()?;
        let root = open_checked(CWD, root, root).ok()?;
        Some(Self::new(id, root, descriptor.into()))
    }

    /// Whose it is.
    pub fn id(&self) -> NetworkId {
        self.id
    }

    /// Namespace and sandbox of the pod that had it before, if that is dead and nobody has cleaned
    /// up after it.
    pub fn dead(&self) -> Option<(&str, &str)> {
        let dead = self.dead.as_ref();
        dead.map(|(namespace, sandbox)| (namespace.as_str(), sandbox.as_str()))
    }

    /// From now on the pod is leaving: nobody is to come any more, and who wants the namespace
    /// waits.
    pub fn leaving(&self) -> io::Result<()> {
        let end = self.file.metadata()?.len();
        self.file.write_all_at(LEAVING.as_bytes(), end)
    }

    /// Leaves it to the process that has got the descriptor.
    pub fn hand_over(mut self) {
        self.is_handed_over = true;
    }
}

impl AsFd for NetworkLock {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for NetworkLock {
    fn drop(&mut self) {
        // Before the lock goes with the descriptor: who waits for it finds that the file is none
        // any more.
        if !self.is_handed_over {
            let _ = rustix::fs::unlinkat(&self.root, self.id.file_name(), AtFlags::empty());
        }
    }
}
