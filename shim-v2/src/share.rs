//! The pod's share: all of the host's files that the fs server can see.
//!
//! Called by `pod`. The state folder's `share` directory is bound onto itself as a shared,
//! read-only mount with two directories, `rootfs` and `volumes`; each container's root file system
//! and each volume is a mount below. The fs server holds a slave of it, so what is mounted or
//! unmounted here follows there. All of it lives in the shim's own mount namespace, a slave of the
//! host's ([`own_namespace`]): nothing of it is seen outside, and it goes with the shim.
//!
//! What the host mounts below an `rslave` volume later comes as the host has it, without flags of
//! ours: the kernel can't add any on the way, and the fs server's copy is out of our reach. Two
//! layers do for it what NODEV and NOSUID do elsewhere: the server opens no device, and nothing is
//! run through the share. No layer does what RDONLY does, so `rro` with `rslave` is refused.
//!
//! Invariants: a guest can't write to the share itself, only to what is mounted below (the mount is
//! read-only; names are made through a descriptor from before the bind); no device node works and
//! no set-user-id bit counts through it on the host; a path below a root file system, which the
//! guest can write, is never resolved by name alone (openat2 without symbolic links).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kata_like_config::state::{StateFolder, name};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_bind, mount_change,
    move_mount, open_tree, unmount,
};

use crate::file_systems;
use crate::selinux::Labels;
use crate::spec::Volume;
use kata_like_failure::{Failure, Kind};
use kata_like_spec::ReadOnly;

mod filesystem;
mod mount;
mod staging;
pub mod volumes;

pub use filesystem::RootfsMount;
pub use mount::{Mounted, own_namespace};
pub use volumes::SharedVolume;

use mount::{NODEV, NOSUID, RDONLY, clone_tree, set_flags, set_following};

/// One of the two directories of the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Rootfs,
    Volumes,
}

/// The names of the share's directories: those of the fs server's shares.
pub const PARTS: [&str; 2] = [
    kata_like_agent_protocol::ROOTFS_TAG,
    kata_like_agent_protocol::VOLUMES_TAG,
];

impl Part {
    fn name(self) -> &'static str {
        let [rootfs, volumes] = PARTS;
        match self {
            Self::Rootfs => rootfs,
            Self::Volumes => volumes,
        }
    }
}

/// The pod's share. Dropped, it is unmounted with all that is in it.
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
    /// The directories as they are below the bind, where names can be made.
    rootfs: OwnedFd,
    volumes: OwnedFd,
    staging: staging::Staging,
    shared: Arc<volumes::Table>,
    gone: AtomicBool,
}

impl Share {
    /// Makes the share of a pod, its directories with the label of the pod's files. Blocks.
    pub fn create(state: &StateFolder, labels: &Labels) -> Result<Self, Failure> {
        let path = state.path().join(name::SHARE);
        let failed = |step: &str, cause: io::Error| {
            Failure::failed(format!("{step} {}", path.display()), cause)
        };
        let below = state
            .create_directory(name::SHARE)
            .map_err(|cause| Failure::failed("make the pod's share", cause))?;
        let [rootfs, volumes] = PARTS.map(|part| {
            rustix::fs::mkdirat(&below, part, Mode::RWXU)?;
            open_directory(below.as_fd(), part)
        });
        let rootfs = rootfs.map_err(|errno| failed("make directories in", errno.into()))?;
        let volumes = volumes.map_err(|errno| failed("make directories in", errno.into()))?;
        for directory in [&below, &rootfs, &volumes] {
            labels.mark("share", directory);
        }
        mount_bind(&path, &path).map_err(|errno| failed("bind onto itself", errno.into()))?;
        let share = Self {
            path: path.clone(),
            rootfs,
            volumes,
            staging: staging::Staging::create(state)?,
            shared: Arc::default(),
            gone: AtomicBool::new(false),
        };
        let here = open_directory(CWD, &path).map_err(|errno| failed("open", errno.into()))?;
        set_flags(here.as_fd(), RDONLY | NOSUID | NODEV, false)
            .map_err(|cause| failed("restrict", cause))?;
        // First private: the mount below /run is in a group with the host's.
        for kind in [
            MountPropagationFlags::PRIVATE,
            MountPropagationFlags::SHARED,
        ] {
            mount_change(&path, kind)
                .map_err(|errno| failed("set the propagation of", errno.into()))?;
        }
        Ok(share)
    }

    /// A clone of the share for the fs server: what is mounted later follows there.
    pub fn tree(&self) -> Result<OwnedFd, Failure> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        open_tree(CWD, &self.path, flags).map_err(|errno| {
            let step = format!("clone the mounts at {}", self.path.display());
            Failure::failed(step, io::Error::from(errno))
        })
    }

    /// Mounts a container's root file system on its bundle's `rootfs`, in order, and binds that
    /// into the share under the container's name. The guards are to be dropped in reverse. Blocks.
    pub fn add_rootfs(
        &self,
        container: &str,
        bundle: &Path,
        mounts: &[RootfsMount],
    ) -> Result<Vec<Mounted>, Failure> {
        let mut made = Vec::new();
        let source = bundle.join("rootfs");
        for (index, mount) in mounts.iter().enumerate() {
            let one = mount_one(&source, mount).map_err(|error| {
                let what = format!(
                    "mount rootfs[{index}] ({}) on {}",
                    mount.kind,
                    source.display()
                );
                let error = error.during(what);
                // The first failure is what the caller hears; what was mounted goes in reverse.
                while made.pop().is_some() {}
                error
            })?;
            made.push(one);
        }
        let tree = clone_tree(&source, true).map_err(|cause| {
            Failure::failed(format!("open root file system {}", source.display()), cause)
        })?;
        if kind_of(&tree) != Some(FileType::Directory) {
            return Err(Failure::new(
                Kind::BadRequest,
                format!("root file system {} is not a directory", source.display()),
            ));
        }
        refuse_kernel_s("the root file system", &source, &tree)?;
        set_following(tree.as_fd(), false).map_err(|cause| {
            let step = format!("set the propagation of {}", source.display());
            Failure::failed(step, cause)
        })?;
        made.push(self.attach(Part::Rootfs, container, "the root file system", &tree)?);
        Ok(made)
    }

    /// Binds a file or directory of the host into the share, unless another container has it there
    /// already. Blocks.
    pub fn add_volume(&self, volume: &Volume) -> Result<SharedVolume, Failure> {
        SharedVolume::hold(&self.shared, &volume.name, || self.bind_volume(volume))
    }

    fn bind_volume(&self, volume: &Volume) -> Result<Mounted, Failure> {
        let source = &volume.source;
        let tree = clone_tree(source, volume.recursive).map_err(|cause| {
            let step = format!("{}: open source {}", volume.field, source.display());
            Failure::failed(step, cause)
        })?;
        let kind = kind_of(&tree);
        match kind {
            Some(FileType::Directory | FileType::RegularFile) => {}
            // As what it is: nobody of the host's is behind it for a process in the guest.
            Some(FileType::Socket | FileType::Fifo) => tracing::info!(
                "{}: {} is a socket or pipe of the host: from the guest nobody answers there",
                volume.field,
                source.display()
            ),
            _ => {
                return Err(Failure::unsupported(
                    format_args!("{} with source {}", volume.field, source.display()),
                    "a device of the host can't be mounted; name a block device in linux.devices (ctr --device)",
                ));
            }
        }
        // `spec` has looked at the path; this is what the path has led to.
        refuse_kernel_s(&volume.field, source, &tree)?;
        set_following(tree.as_fd(), volume.follows).map_err(|cause| {
            Failure::failed(format!("{}: set the propagation", volume.field), cause)
        })?;
        if volume.read_only != ReadOnly::No {
            // Of `ro` only the top, as under runc: below it is what the host has made so.
            let below = volume.read_only == ReadOnly::All;
            set_flags(tree.as_fd(), RDONLY, below).map_err(|cause| {
                Failure::failed(format!("{}: make read-only", volume.field), cause)
            })?;
        }
        self.attach(Part::Volumes, &volume.name, &volume.field, &tree)
    }

    /// Puts a detached tree, from which nothing propagates, into the share: without what is of the
    /// host's kernel.
    fn attach(
        &self,
        part: Part,
        name: &str,
        field: &str,
        tree: &OwnedFd,
    ) -> Result<Mounted, Failure> {
        let path = self.path.join(part.name()).join(name);
        let failed = |step: &str, cause: io::Error| {
            Failure::failed(format!("{step} {}", path.display()), cause)
        };
        if !kata_like_agent_protocol::is_name(name) {
            return Err(Failure::new(
                Kind::BadRequest,
                format!("{name:?} is not a name of a container or volume"),
            ));
        }
        if self.gone.load(Ordering::SeqCst) {
            return Err(Failure::new(
                Kind::WrongState,
                format!("mount {}: the pod ends", path.display()),
            ));
        }
        set_flags(tree.as_fd(), NOSUID | NODEV, true)
            .map_err(|cause| failed("restrict the mount for", cause))?;
        let directory = match part {
            Part::Rootfs => &self.rootfs,
            Part::Volumes => &self.volumes,
        };
        let place = directory
            .try_clone()
            .map_err(|cause| failed("make", cause))?;
        let is_directory = kind_of(tree) == Some(FileType::Directory);
        // To the end of this: from there the tree is moved, or goes.
        let _staged = match is_directory {
            true => Some(self.staging.strip(tree, field)?),
            false => None, // nothing can be mounted below a file
        };
        let made = if is_directory {
            rustix::fs::mkdirat(directory, name, Mode::RWXU)
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(directory, name, flags, Mode::RUSR).map(drop)
        };
        made.map_err(|errno| match errno {
            Errno::EXIST => Failure::new(
                Kind::AlreadyExists,
                format!("make {}: it exists already", path.display()),
            ),
            errno => failed("make", errno.into()),
        })?;
        // From here on the guard takes the name away again.
        let mounted = Mounted {
            path: path.clone(),
            place: Some((place, name.to_owned())),
        };
        // Through the bind, not below it: there lies the mount that the fs server follows.
        move_mount(
            tree,
            "",
            CWD,
            &path,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .map_err(|errno| failed("mount", errno.into()))?;
        Ok(mounted)
    }
}

impl Share {
    /// Unmounts the share; nothing can be put into it any more.
    pub fn unmount(&self) {
        if !self.gone.swap(true, Ordering::SeqCst) {
            let _ = unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// One mount of a root file system.
fn mount_one(rootfs: &Path, mount: &RootfsMount) -> Result<Mounted, Failure> {
    let target = target_in(rootfs, &mount.target)?;
    match mount.kind.as_str() {
        "overlay" => filesystem::overlay(mount, &target)?,
        "bind" | "rbind" => filesystem::bind(mount, &target)?,
        kind => {
            return Err(Failure::unsupported(
                format_args!("a root file system of type {kind:?}"),
                "only overlay and bind mounts are; choose the overlayfs or native snapshotter",
            ));
        }
    }
    Ok(Mounted {
        path: target,
        place: None,
    })
}

/// A path for a mount's target below `rootfs`, which a guest may have written: resolved without
/// links, and given as a path that leads to what was resolved.
fn target_in(rootfs: &Path, target: &str) -> Result<PathBuf, Failure> {
    let target = target.trim_matches('/');
    if target.is_empty() {
        return Ok(rootfs.to_path_buf());
    }
    let failed = |cause: Errno| {
        let step = format!("find target {target:?} in {}", rootfs.display());
        Failure::failed(step, io::Error::from(cause))
    };
    let root = open_directory(CWD, rootfs).map_err(failed)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(&root, target, flags, Mode::empty(), inside).map_err(failed)?;
    // No link on the way, and nobody but us runs on these files yet: the path is what it says.
    Ok(rootfs.join(target))
}

fn refuse_kernel_s(field: &str, source: &Path, tree: &OwnedFd) -> Result<(), Failure> {
    let found = file_systems::of(tree).map_err(|cause| {
        let step = format!("{field}: look at source {}", source.display());
        Failure::failed(step, cause)
    })?;
    found.map_or(Ok(()), |found| Err(found.refusal(field, source)))
}

fn kind_of(fd: &OwnedFd) -> Option<FileType> {
    let stat = rustix::fs::fstat(fd).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}

fn open_directory(at: impl AsFd, path: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

#[cfg(test)]
mod tests;
