//! The pod's state folder `/run/kata-like/NAMESPACE:ID`: who may be in it, what its files are
//! called, what survives the shim in it.
//!
//! Made by the shim when a pod starts; `delete`, which runs when the shim is gone, takes a pod down
//! from this folder alone. Only root may reach it (mode 0700 all the way down), because the sockets
//! in it control the pod. Nothing found there is trusted before the checks of `root` and
//! [`StateFolder::read_record`]: `/run/kata-like` could have been planted, the record could be
//! another version's or cut off.
//!
//! Sockets are reached through the folder's descriptor: a path of two long ids exceeds the 107
//! bytes of a UNIX address. What is mounted below the folder is the caller's to unmount before
//! [`StateFolder::remove`].

mod network;
mod process;
mod record;
mod uid;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

pub use network::{NetworkId, NetworkLock, Occupied};
pub use process::Process;
pub use record::{Network, RECORD_VERSION, Record, StandIn};
pub use uid::{UIDS, proxy_uid};

/// The parent of all state folders.
pub const ROOT: &str = "/run/kata-like";

/// The names in a state folder.
pub mod name {
    /// The record of what the pod consists of: see [`super::Record`].
    pub const RECORD: &str = "shim.json";
    /// Held exclusively by whoever changes the pod: the shim while it serves, else `delete`.
    pub const LOCK: &str = "lock";
    /// The VMM listens here; each connection becomes one to the agent's port for streams.
    pub const STREAMS: &str = "streams.sock";
    /// What the guest's kernel logs.
    pub const GUEST_LOG: &str = "guest.log";
    /// The directory that fsd serves: the pod's share.
    pub const SHARE: &str = "share";
    /// An empty directory, on which the shim alone sees what is about to be put into the share.
    pub const STAGING: &str = "staging";
    /// An empty directory: the root of the stand-ins.
    pub const EMPTY: &str = "empty";
}

const PRIVATE_DIRECTORY: Mode = Mode::RWXU;
/// The bits of [`PRIVATE_DIRECTORY`].
const PRIVATE: u32 = 0o700;
const OTHERS_MAY_WRITE: u32 = 0o022;
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Why a state folder can't be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub enum StateError {
    /// A system call failed.
    #[error("{step} {}", path.display())]
    Io {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// `/run/kata-like` or a folder in it is not a directory that root alone can reach.
    #[error("use state folder {}: {why}", path.display())]
    Unsafe {
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Namespace or id is no name, so it must not become part of a path.
    #[error("name the state folder of {id:?} in namespace {namespace:?}: not valid as names")]
    Name { namespace: String, id: String },
    /// The pod exists already.
    #[error("make state folder {}: it exists already, a pod of this name runs or was not deleted", path.display())]
    Exists { path: PathBuf },
    /// The record is not one of ours.
    #[error("read {}: {why}", path.display())]
    Record {
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl StateError {
    fn io(step: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io {
            step,
            path: path.into(),
            source: source.into(),
        }
    }

    fn not_safe(path: &Path, why: impl Into<String>) -> Self {
        Self::Unsafe {
            path: path.into(),
            why: why.into(),
        }
    }
}

/// One pod's state folder, held open.
#[derive(Debug)]
pub struct StateFolder {
    root: OwnedFd,
    folder: OwnedFd,
    name: String,
    path: PathBuf,
}

impl StateFolder {
    /// Makes the folder of a new pod, and `/run/kata-like` where it is missing.
    pub fn create(namespace: &str, id: &str) -> Result<Self, StateError> {
        Self::create_under(Path::new(ROOT), namespace, id)
    }

    /// Opens the folder of a pod; `None` if there is none.
    pub fn open(namespace: &str, id: &str) -> Result<Option<Self>, StateError> {
        Self::open_under(Path::new(ROOT), namespace, id)
    }

    /// As [`StateFolder::create`], below another root than [`ROOT`].
    pub fn create_under(root: &Path, namespace: &str, id: &str) -> Result<Self, StateError> {
        let name = folder_name(namespace, id)?;
        let path = root.join(&name);
        let root = make_root(root)?;
        match rustix::fs::mkdirat(&root, &name, PRIVATE_DIRECTORY) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(StateError::Exists { path }),
            Err(errno) => return Err(StateError::io("make state folder", &path, errno)),
        }
        let folder = open_checked(root.as_fd(), Path::new(&name), &path)?;
        Ok(Self {
            root,
            folder,
            name,
            path,
        })
    }

    /// As [`StateFolder::open`], below another root than [`ROOT`].
    pub fn open_under(root: &Path, namespace: &str, id: &str) -> Result<Option<Self>, StateError> {
        let name = folder_name(namespace, id)?;
        let path = root.join(&name);
        let missing = |error: &StateError| matches!(error, StateError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound);
        let root = match open_root(root) {
            Err(error) if missing(&error) => return Ok(None),
            other => other?,
        };
        match open_checked(root.as_fd(), Path::new(&name), &path) {
            Ok(folder) => Ok(Some(Self {
                root,
                folder,
                name,
                path,
            })),
            Err(error) if missing(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The folder's path, for messages and for mounts.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the pod's lock; `None` if another process holds it. Freed when the file is dropped.
    pub fn try_lock(&self) -> Result<Option<File>, StateError> {
        let flags = OFlags::RDWR | OFlags::CREATE;
        let file = self.open_file(name::LOCK, flags, "open")?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(StateError::io("lock", &self.path.join(name::LOCK), errno)),
        }
    }

    /// Makes a file that must not exist yet, readable and writable by root alone.
    pub fn create_file(&self, name: &str) -> Result<File, StateError> {
        self.open_file(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, "make")
    }

    /// Makes a directory that must not exist yet.
    pub fn create_directory(&self, name: &str) -> Result<OwnedFd, StateError> {
        let path = self.path.join(name);
        rustix::fs::mkdirat(&self.folder, name, PRIVATE_DIRECTORY)
            .map_err(|errno| StateError::io("make directory", &path, errno))?;
        open_checked(self.folder.as_fd(), Path::new(name), &path)
    }

    /// Listens on a socket in the folder that must not exist yet.
    pub fn listen(&self, name: &str) -> Result<UnixListener, StateError> {
        UnixListener::bind(self.short_path(name))
            .map_err(|source| StateError::io("listen on", &self.path.join(name), source))
    }

    /// Connects to a socket in the folder. Does not wait: a socket whose queue is full is an error.
    pub fn connect(&self, name: &str) -> Result<UnixStream, StateError> {
        UnixStream::connect(self.short_path(name))
            .map_err(|source| StateError::io("connect to", &self.path.join(name), source))
    }

    /// A path to `name` for this process, of at most 40 bytes and the name's.
    pub fn short_path(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.folder.as_raw_fd()).into()
    }

    /// Removes the folder and all that is in it; the pod's user id is free. Crosses no mount and
    /// follows no link: what is still mounted below makes it fail with "Device or resource busy".
    pub fn remove(self) -> Result<(), StateError> {
        self.free_uid();
        let mut budget = MAX_ENTRIES;
        remove_content(self.folder.as_fd(), &self.path, 0, &mut budget)?;
        match rustix::fs::unlinkat(&self.root, &self.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(StateError::io("remove", &self.path, errno)),
        }
    }

    fn open_file(&self, name: &str, flags: OFlags, step: &'static str) -> Result<File, StateError> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::openat(&self.folder, name, flags, PRIVATE_FILE)
            .map(File::from)
            .map_err(|errno| StateError::io(step, &self.path.join(name), errno))
    }
}

impl AsFd for StateFolder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// How deep and how much of our own making there can be below a state folder.
const MAX_DEPTH: u8 = 4;
const MAX_ENTRIES: u32 = 100_000;

/// `NAMESPACE:ID`: neither may hold a colon, so two pods never share a folder.
fn folder_name(namespace: &str, id: &str) -> Result<String, StateError> {
    // containerd's own rule for both (pkg/identifiers): 1 to 76 of [A-Za-z0-9._-], the first
    // alphanumeric.
    let valid = |name: &str| {
        name.len() <= 76
            && name.starts_with(|first: char| first.is_ascii_alphanumeric())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    if valid(namespace) && valid(id) {
        return Ok(format!("{namespace}:{id}"));
    }
    Err(StateError::Name {
        namespace: namespace.into(),
        id: id.into(),
    })
}

/// Makes `/run/kata-like` where it is missing, and opens it.
fn make_root(root: &Path) -> Result<OwnedFd, StateError> {
    match rustix::fs::mkdir(root, PRIVATE_DIRECTORY) {
        Ok(()) | Err(Errno::EXIST) => open_root(root),
        Err(errno) => Err(StateError::io("make", root, errno)),
    }
}

/// Opens `/run/kata-like`. A package or an administrator may have made it with an ordinary mode. As
/// long as nobody else could write there, nothing can have been planted: it gets the mode that it
/// should have.
fn open_root(root: &Path) -> Result<OwnedFd, StateError> {
    let (folder, mode) = open_own(CWD, root, root)?;
    if mode != PRIVATE && mode & OTHERS_MAY_WRITE == 0 {
        rustix::fs::fchmod(&folder, PRIVATE_DIRECTORY)
            .map_err(|errno| StateError::io("set the mode of", root, errno))?;
        let root = root.display();
        tracing::info!("{root} had mode {mode:04o}: it has 0700 now, for root alone");
        return Ok(folder);
    }
    refuse_mode(mode, root).map(|()| folder)
}

/// Opens a directory that belongs to us alone: no link, our owner, mode 0700.
fn open_checked(at: BorrowedFd, name: &Path, path: &Path) -> Result<OwnedFd, StateError> {
    let (folder, mode) = open_own(at, name, path)?;
    refuse_mode(mode, path).map(|()| folder)
}

fn refuse_mode(mode: u32, path: &Path) -> Result<(), StateError> {
    match mode {
        PRIVATE => Ok(()),
        _ => Err(StateError::not_safe(
            path,
            format!("its mode is {mode:04o}, not 0700"),
        )),
    }
}

/// Opens a directory of our own, and tells its mode.
fn open_own(at: BorrowedFd, name: &Path, path: &Path) -> Result<(OwnedFd, u32), StateError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = match rustix::fs::openat(at, name, flags, Mode::empty()) {
        Ok(folder) => folder,
        Err(Errno::LOOP | Errno::NOTDIR) => {
            return Err(StateError::not_safe(path, "it is not a directory"));
        }
        Err(errno) => return Err(StateError::io("open", path, errno)),
    };
    let stat = rustix::fs::fstat(&folder).map_err(|errno| StateError::io("stat", path, errno))?;
    let (owner, us) = (stat.st_uid, rustix::process::geteuid().as_raw());
    if owner != us {
        return Err(StateError::not_safe(
            path,
            format!("it belongs to uid {owner}, not to {us}"),
        ));
    }
    Ok((folder, stat.st_mode & 0o7777))
}

fn remove_content(
    at: BorrowedFd,
    path: &Path,
    depth: u8,
    budget: &mut u32,
) -> Result<(), StateError> {
    let entries = Dir::read_from(at).map_err(|errno| StateError::io("list", path, errno))?;
    for entry in entries {
        let entry = entry.map_err(|errno| StateError::io("list", path, errno))?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let inner = path.join(name.to_string_lossy().as_ref());
        *budget = budget
            .checked_sub(1)
            .ok_or_else(|| StateError::not_safe(path, "it holds too many entries"))?;
        let failed = |errno| StateError::io("remove", &inner, errno);
        match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        // An empty directory goes at once; what is a mount point is refused as busy and not
        // entered.
        match rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::NOTEMPTY | Errno::EXIST) if depth < MAX_DEPTH => {}
            Err(errno) => return Err(failed(errno)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(at, name, flags, Mode::empty()).map_err(failed)?;
        remove_content(folder.as_fd(), &inner, depth + 1, budget)?;
        rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
