//! The container's root: a mount of its own. Every path in it is resolved inside it, and it becomes
//! `/` at the end.
//!
//! Called by `init` in the container's process, whose mount namespace is its own. The image is
//! hostile: a path may lead through any symlink that it has planted. So we resolve a path once,
//! with the root as its `/` and without magic links, and then use only the file descriptor.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use kata_like_failure::{Failure, Step};
use kata_like_linux::mount::{MountAttributes, set_attributes};
use oci_spec::runtime::Spec;
use pathrs::Root;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::error::Result;
use super::options;

/// As many symlinks as the kernel follows in one path.
const MOST_LINKS: u32 = 40;

/// What must be at a path before something is mounted there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Directory,
    File,
}

/// The tree that becomes the container's root.
pub(super) struct Rootfs {
    root: Root,
    mount: OwnedFd,
    path: PathBuf,
}

impl Rootfs {
    /// Cuts the process's mounts off from the agent's, and makes `path` a mount of its own.
    pub(super) fn prepare(path: &Path) -> Result<Self> {
        let step = || format!("prepare the container's root {}", path.display());
        // What the agent mounts later still arrives here. What is mounted here stays here.
        rustix::mount::mount_change(
            "/",
            rustix::mount::MountPropagationFlags::DOWNSTREAM
                | rustix::mount::MountPropagationFlags::REC,
        )
        .step(step)?;
        let opened = rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step(step)?;
        let mount = clone_mount(opened.as_fd(), true).step(step)?;
        let private = MountAttributes {
            propagation: libc::MS_PRIVATE,
            ..MountAttributes::default()
        };
        set_attributes(&mount, true, &private).step(step)?;
        attach(mount.as_fd(), opened.as_fd()).step(step)?;
        let handle = mount.try_clone().step(step)?;
        let path = real_path(mount.as_fd()).step(step)?;
        Ok(Self {
            root: Root::from_fd(handle),
            mount,
            path,
        })
    }

    /// Finds the existing file or directory at `path`. Symlinks are followed inside the root.
    pub(super) fn resolve(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.root.resolve(path).map(OwnedFd::from).map_err(errno)
    }

    /// The same, but a symlink at the end is not followed.
    pub(super) fn resolve_nofollow(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.root
            .resolve_nofollow(path)
            .map(OwnedFd::from)
            .map_err(errno)
    }

    /// Finds what is at `path`, and makes it with all its parents if it is not there.
    ///
    /// A dangling symlink is followed to where it points inside the root, as images have them for
    /// `/etc/resolv.conf`.
    pub(super) fn ensure(&self, path: &Path, target: Target) -> rustix::io::Result<OwnedFd> {
        self.ensure_within(path, target, &mut MOST_LINKS.clone())
    }

    fn ensure_within(
        &self,
        path: &Path,
        target: Target,
        links: &mut u32,
    ) -> rustix::io::Result<OwnedFd> {
        match self.resolve(path) {
            Err(Errno::NOENT) => {}
            result => return result,
        }
        let (parent, name) = split(path).ok_or(Errno::NOENT)?;
        let directory = self.ensure_within(parent, Target::Directory, links)?;
        if let Ok(link) = rustix::fs::readlinkat(&directory, name, Vec::new()) {
            *links = links.checked_sub(1).ok_or(Errno::LOOP)?;
            let link = Path::new(OsStr::from_bytes(link.to_bytes()));
            // Not cleaned of `..`: the parent may itself be a symlink, which the kernel resolves.
            return self.ensure_within(&parent.join(link), target, links);
        }
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match target {
            Target::Directory => match rustix::fs::mkdirat(&directory, name, Mode::from(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            },
            Target::File => {
                let create = flags | OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
                match rustix::fs::openat(&directory, name, create, Mode::from(0o755)) {
                    Ok(_) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        rustix::fs::openat(&directory, name, flags | OFlags::PATH, Mode::empty())
    }

    /// Finds where in the container a file descriptor is.
    pub(super) fn path_of(&self, fd: BorrowedFd<'_>) -> Result<PathBuf> {
        let step = || "find out where in the container's root a file is";
        let path = real_path(fd).step(step)?;
        match path.strip_prefix(&self.path) {
            Ok(inside) => Ok(Path::new("/").join(inside)),
            Err(_) => Err(Failure::failed(
                step(),
                format!("{} is outside of it", path.display()),
            )),
        }
    }

    /// Makes the tree the process's root, and lets go of everything else.
    pub(super) fn pivot(&self) -> Result<()> {
        let step = || "make the container's root the root of its mounts (pivot_root)";
        let old = rustix::fs::open(
            "/",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step(step)?;
        rustix::process::fchdir(&self.mount).step(step)?;
        // The old root ends up on top of the new one, and is unmounted from there.
        rustix::process::pivot_root(".", ".").step(step)?;
        rustix::process::fchdir(&old).step(step)?;
        rustix::mount::mount_change(
            ".",
            rustix::mount::MountPropagationFlags::PRIVATE
                | rustix::mount::MountPropagationFlags::REC,
        )
        .step(step)?;
        rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH).step(step)?;
        rustix::process::chdir("/").step(step)
    }

    /// Applies what the spec says of the root itself, after everything is mounted and done in it.
    pub(super) fn finish(self, spec: &Spec, propagation: Option<(u64, bool)>) -> Result<()> {
        if let Some(propagation) = propagation {
            self.propagate(propagation)?;
        }
        let root = spec.root().as_ref();
        if root.and_then(|root| root.readonly()).unwrap_or(false) {
            self.make_read_only()?;
        }
        Ok(())
    }

    /// Makes the root itself, and nothing mounted below it, read-only.
    fn make_read_only(&self) -> Result<()> {
        let attributes = MountAttributes {
            set: options::READ_ONLY,
            ..MountAttributes::default()
        };
        set_attributes(&self.mount, false, &attributes)
            .step(|| "make the container's root read-only")
    }

    /// Gives the root the propagation that the spec wants.
    fn propagate(&self, (propagation, recursive): (u64, bool)) -> Result<()> {
        let attributes = MountAttributes {
            propagation,
            ..MountAttributes::default()
        };
        set_attributes(&self.mount, recursive, &attributes)
            .step(|| "set the propagation of the container's root")
    }
}

/// Makes a detached copy of the mount at `fd`, seen from there.
pub(super) fn clone_mount(fd: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(fd, "", flags)
}

/// Puts a detached mount onto what `target` is.
pub(super) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

/// Finds the path of an open file in the agent's procfs.
fn real_path(fd: BorrowedFd<'_>) -> rustix::io::Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let path = rustix::fs::readlinkat(CWD, link, Vec::new())?;
    Ok(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

/// The parent and the last name. `None`: there is no name to make.
pub(super) fn split(path: &Path) -> Option<(&Path, &OsStr)> {
    match path.components().next_back()? {
        Component::Normal(name) => Some((path.parent()?, name)),
        _ => None,
    }
}

/// Finds the error number behind an error of pathrs, which keeps the kernel's in its kind.
fn errno(error: pathrs::error::Error) -> Errno {
    match error.kind() {
        pathrs::error::ErrorKind::OsError(Some(number)) => Errno::from_raw_os_error(number),
        pathrs::error::ErrorKind::SafetyViolation => Errno::XDEV,
        _ => Errno::INVAL,
    }
}

/// Reads `linux.rootfsPropagation`.
pub(super) fn propagation(spec: &Spec) -> Result<Option<(u64, bool)>> {
    let linux = spec.linux().as_ref();
    let name = linux.and_then(|linux| linux.rootfs_propagation().as_deref());
    options::root_propagation(name.unwrap_or_default())
}
