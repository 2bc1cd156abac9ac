//! Masked and read-only paths: each is resolved once in the container's root, and covered by its
//! descriptor.
//!
//! Called by `init` in the container's process, after the mounts and devices. A path that doesn't
//! exist needs no cover. The container's /dev/null masks files. We check that it is that device: an
//! image could have planted another file there.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use kata_like_failure::{Failure, Step};
use kata_like_linux::mount::{MountAttributes, set_attributes};
use oci_spec::runtime::Spec;
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use super::error::Result;
use super::options::READ_ONLY;
use super::rootfs::{Rootfs, attach, clone_mount};

/// Covers the paths that the spec lists.
pub(super) fn apply(spec: &Spec, rootfs: &Rootfs) -> Result<()> {
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    for path in linux.readonly_paths().iter().flatten() {
        make_read_only(rootfs, Path::new(path))
            .step(|| format!("can't make {path:?} read-only"))?;
    }
    let masked = linux.masked_paths().as_deref().unwrap_or_default();
    if masked.is_empty() {
        return Ok(());
    }
    let null = open_null(rootfs)?;
    for path in masked {
        mask(rootfs, Path::new(path), &null).step(|| format!("can't mask path {path}"))?;
    }
    Ok(())
}

fn make_read_only(rootfs: &Rootfs, path: &Path) -> std::io::Result<()> {
    let target = match rootfs.resolve(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result?,
    };
    let mount = clone_mount(target.as_fd(), true)?;
    let attributes = MountAttributes {
        set: READ_ONLY,
        ..MountAttributes::default()
    };
    set_attributes(&mount, false, &attributes)?;
    Ok(attach(mount.as_fd(), target.as_fd())?)
}

fn mask(rootfs: &Rootfs, path: &Path, null: &OwnedFd) -> std::io::Result<()> {
    let target = match rootfs.resolve(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result?,
    };
    let status = rustix::fs::fstat(&target)?;
    let cover = if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
        empty_directory()?
    } else {
        clone_mount(null.as_fd(), false)?
    };
    Ok(attach(cover.as_fd(), target.as_fd())?)
}

fn empty_directory() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", "tmpfs")?;
    fsconfig_set_flag(context.as_fd(), "ro")?;
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY,
    )
}

/// Opens the container's /dev/null, if it is that device.
fn open_null(rootfs: &Rootfs) -> Result<OwnedFd> {
    let null = rootfs
        .resolve_nofollow(Path::new("/dev/null"))
        .step(|| "open /dev/null to mask paths with it")?;
    let status = rustix::fs::fstat(&null).step(|| "look at /dev/null")?;
    let device = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice
        && status.st_rdev == rustix::fs::makedev(1, 3);
    if !device {
        return Err(Failure::failed(
            "mask paths with /dev/null",
            "it is not the null device (1:3) but another file",
        ));
    }
    Ok(null)
}
