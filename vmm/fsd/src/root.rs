//! Makes the pod's share the only file system that the server can see.
//!
//! Called once by `main`, on the only thread, while still privileged. The share arrives as an
//! `open_tree(2)` clone, so no path is looked up. It becomes a slave of the shim's mounts: what the
//! shim mounts into the share later appears here, and nothing from here appears there.
//!
//! What must hold afterwards: `/` is the share, its top mount read-only; nothing else is mounted;
//! `/proc` is reachable only as the directory `/proc/self/fd`, through the descriptor that is
//! returned, which is also the working directory. (The library changes into it and back around some
//! calls. The working directory belongs to the whole process, so with two shares, thus two threads,
//! "back" must be the same place.)

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use kata_like_jail::JailError;
use kata_like_jail::layers::{Layer, is_kept};
use kata_like_linux::mount::{MountAttributes, set_attributes};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

/// Makes `tree` the root directory, in a mount namespace of its own. Returns `/proc/self/fd`.
pub fn enter(tree: OwnedFd) -> Result<File, JailError> {
    // A detached clone: ".." at its top leads nowhere, so it opens no way to the rest of /proc.
    let proc_self_fd = open_tree(
        CWD,
        c"/proc/self/fd",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(failed("clone /proc/self/fd"))?;
    let slave = MountAttributes {
        propagation: libc::MS_SLAVE,
        ..MountAttributes::default()
    };
    set_attributes(&tree, true, &slave)
        .map_err(failed("make the share a slave of the shim's mounts"))?;
    let read_only = MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        ..MountAttributes::default()
    };
    set_attributes(&tree, false, &read_only).map_err(failed("make the share's top read-only"))?;

    kata_like_jail::own_mounts()?;
    if !is_kept(Layer::Root) {
        return Ok(File::from(proc_self_fd));
    }

    let onto_root = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, c"", CWD, c"/", onto_root).map_err(failed("attach the share"))?;
    rustix::process::fchdir(&tree).map_err(failed("change into the share"))?;
    rustix::process::pivot_root(c".", c".").map_err(failed("make the share the root directory"))?;
    // Both roots are at "." now, with the old one on top (pivot_root(2)).
    unmount(c".", UnmountFlags::DETACH).map_err(failed("detach the old root directory"))?;
    rustix::process::chdir(c"/").map_err(failed("change into the new root directory"))?;
    rustix::process::fchdir(&proc_self_fd).map_err(failed("change into /proc/self/fd"))?;
    Ok(File::from(proc_self_fd))
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::new(step, source.into())
}
