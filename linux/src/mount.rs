//! Attributes of a mount: mount_setattr(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `struct mount_attr`: what to set, what to clear, and the propagation to give.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MountAttributes {
    /// `MOUNT_ATTR_…` to set.
    pub set: u64,
    /// `MOUNT_ATTR_…` to clear.
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0: as it is.
    pub propagation: u64,
    /// The user namespace whose ids the mount has, with `MOUNT_ATTR_IDMAP`.
    pub userns_fd: u64,
}

/// Changes the mount that `mount` is the root of; with `recursive`, all mounts below it as well.
pub fn set_attributes(
    mount: impl AsFd,
    recursive: bool,
    attributes: &MountAttributes,
) -> io::Result<()> {
    let below = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: mount_setattr(2) reads a path, which is a static C string, and as many bytes at the
    // fourth argument as the fifth says, which is the size of the structure there. It writes
    // nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | below,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::CWD;
    use rustix::mount::{OpenTreeFlags, open_tree};

    /// Needs root.
    #[test]
    fn a_clone_of_a_mount_becomes_read_only() {
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let directory = tempfile::tempdir().unwrap();
        let tree = open_tree(CWD, directory.path(), clone).unwrap();
        let read_only = MountAttributes {
            set: libc::MOUNT_ATTR_RDONLY,
            ..MountAttributes::default()
        };
        set_attributes(&tree, true, &read_only).unwrap();
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
        let made = rustix::fs::openat(&tree, "x", flags, rustix::fs::Mode::RUSR);
        assert_eq!(made.unwrap_err(), rustix::io::Errno::ROFS);
        std::fs::write(directory.path().join("x"), "").unwrap();
    }

    #[test]
    fn what_is_no_mount_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let read_only = MountAttributes {
            set: libc::MOUNT_ATTR_RDONLY,
            ..MountAttributes::default()
        };
        assert!(set_attributes(&file, false, &read_only).is_err());
    }
}
