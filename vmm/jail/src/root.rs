//! An empty root directory, for a process that needs no path any more.

use kata_like_linux::namespace::unshare;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::UnshareFlags;

use crate::layers::{Layer, is_kept};
use crate::{JailError, failed};

/// From now on `/` is an empty directory that nothing can be added to, and the only mount in a
/// mount namespace of the process's own. Open files stay. For a process with one thread; needs
/// CAP_SYS_ADMIN.
///
/// False: the process has an SELinux label that may not use such a directory, and its root is what
/// it was. Nothing else refuses root a directory, and that label itself keeps files off.
pub fn enter_empty_root() -> Result<bool, JailError> {
    own_mounts()?;
    if !is_kept(Layer::Root) {
        return Ok(true);
    }
    let step = "make an empty root directory";
    let tmpfs = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed(step))?;
    // Room for nothing but the root directory itself, were it ever writable.
    for (key, value) in [(c"size", c"4k"), (c"nr_inodes", c"1"), (c"mode", c"0555")] {
        fsconfig_set_string(&tmpfs, key, value).map_err(failed(step))?;
    }
    fsconfig_create(&tmpfs).map_err(failed(step))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed(step))?;

    let onto_root = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, c"", CWD, c"/", onto_root).map_err(failed("attach the empty root"))?;
    match fchdir(&root) {
        Err(Errno::ACCESS) => return Ok(false),
        entered => entered.map_err(failed("change into the empty root"))?,
    }
    pivot_root(c".", c".").map_err(failed("take the empty root"))?;
    // Both roots are at "." now, with the old one on top (pivot_root(2)).
    unmount(c".", UnmountFlags::DETACH).map_err(failed("detach the old root directory"))?;
    chdir(c"/").map_err(failed("change into the new root directory"))?;
    Ok(true)
}

/// Enters a mount namespace of the process's own, in which no mount of the host's appears.
pub fn own_mounts() -> Result<(), JailError> {
    if is_kept(Layer::Mounts) {
        unshare(UnshareFlags::NEWNS).map_err(failed("enter a mount namespace of its own"))?;
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change(c"/", private).map_err(failed("cut the mount namespace off the host's"))
}
