//! What mounts are to the share: its namespace, their attributes, and the guard that takes one
//! away.
//!
//! Called by `share` and its parts.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kata_like_linux::mount::{MountAttributes, set_attributes};
use kata_like_linux::namespace::unshare;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount_change, open_tree, unmount,
};

/// Leaves the host's mount namespace for one of the shim's own that follows it. To be called before
/// the process has a second thread: a namespace is a thread's. Answers the one that was left, for
/// programs that are to see the host as containerd does.
pub fn own_namespace() -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let host = rustix::fs::open("/proc/self/ns/mnt", flags, Mode::empty())?;
    unshare(rustix::thread::UnshareFlags::NEWNS)?;
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )?;
    Ok(host)
}

pub(super) const RDONLY: u64 = 0x1;
pub(super) const NOSUID: u64 = 0x2;
pub(super) const NODEV: u64 = 0x4;

pub(super) fn set_flags(mount: BorrowedFd, set: u64, recursive: bool) -> io::Result<()> {
    let attributes = MountAttributes {
        set,
        ..MountAttributes::default()
    };
    set_attributes(mount, recursive, &attributes)
}

/// Whether a tree gets what is mounted below its source later on; what is mounted in the tree never
/// gets out.
pub(super) fn set_following(tree: BorrowedFd, follows: bool) -> io::Result<()> {
    let attributes = MountAttributes {
        propagation: match follows {
            true => libc::MS_SLAVE,
            false => libc::MS_PRIVATE,
        },
        ..MountAttributes::default()
    };
    set_attributes(tree, true, &attributes)
}

/// A mount of the share, or one on a bundle's rootfs. Dropped, it is taken away.
#[derive(Debug)]
pub struct Mounted {
    /// Where it is mounted.
    pub(super) path: PathBuf,
    /// The name to remove afterwards, and the directory it is in.
    pub(super) place: Option<(OwnedFd, String)>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the fs server's slave may be busy with it, which must not stop us.
        let _ = unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        if let Some((directory, name)) = &self.place {
            let gone = rustix::fs::unlinkat(directory, name, AtFlags::empty());
            if gone == Err(Errno::ISDIR) {
                let _ = rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR);
            }
        }
    }
}

/// A detached clone of the mount at `path`, which no other mount follows.
pub(super) fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(CWD, path, flags)?)
}
