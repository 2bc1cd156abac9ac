//! Where a tree of mounts is looked through before it comes into the share.
//!
//! Called by `share`. A tree that was cloned with what is mounted below (`rbind`) may hold file
//! systems of the host's kernel: with the host's `/` come its `/proc` and `/sys`. The file server
//! must not see one (`file_systems`). Only a mounted tree can be looked through. So it is mounted
//! in the state folder first, where the file server sees nothing, and moved from there.
//!
//! No path decides what is unmounted: the host may rename directories meanwhile. A path from the
//! table of mounts leads to a candidate, the candidate's number says whether it is the one, and its
//! descriptor is what is unmounted.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use kata_like_config::state::{StateFolder, name};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

use super::mount::Mounted;
use crate::file_systems::mount_table::{self, Mount};
use crate::file_systems::named;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;

/// How often the table is read anew where the host's mounts change meanwhile.
const PASSES: usize = 10;

/// The place for one tree at a time.
#[derive(Debug)]
pub(super) struct Staging(Mutex<PathBuf>);

/// A tree in that place. Dropped, it is unmounted, if it has not been moved away.
#[derive(Debug)]
pub(super) struct Staged<'a> {
    _tree: Mounted, // before the place is free
    _place: MutexGuard<'a, PathBuf>,
}

impl Staging {
    /// Makes the place in a pod's state folder.
    pub(super) fn create(state: &StateFolder) -> Result<Self, Failure> {
        let made = state.create_directory(name::STAGING);
        made.map_err(|cause| Failure::failed("make a place for mounts", cause))?;
        Ok(Self(Mutex::new(state.path().join(name::STAGING))))
    }

    /// Mounts a detached tree, out of which nothing propagates, and takes out what is of the host's
    /// kernel, with all that is mounted below such. The log says what that was.
    pub(super) fn strip(&self, tree: &OwnedFd, field: &str) -> Result<Staged<'_>, Failure> {
        let place = lock(&self.0);
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(tree, "", CWD, place.as_path(), flags).map_err(|errno| {
            let step = format!("{field}: mount on {}", place.display());
            Failure::failed(step, io::Error::from(errno))
        })?;
        let staged = Staged {
            _tree: Mounted {
                path: place.clone(),
                place: None,
            },
            _place: place,
        };
        let failed = |cause| {
            let step = format!("{field}: take out file systems of the host's kernel");
            Failure::failed(step, cause)
        };
        let (mut left_out, mut hidden) = (Vec::new(), None::<Vec<Mount>>);
        for _ in 0..PASSES {
            let all = mount_table::read().map_err(failed)?;
            let below = tree_of(&all, number_of(tree).map_err(failed)?);
            let found = find(&below);
            let unfit = below.iter().any(|mount| named(&mount.kind).is_some());
            // Hidden ones stay, and nobody gets there. That is believed when it was so twice:
            // directories that are renamed between two lines of the table can make it look so.
            let same = hidden.as_deref().is_some_and(|last: &[Mount]| {
                last.len() == below.len() && last.iter().zip(&below).all(|(a, b)| a == *b)
            });
            if !unfit || found.is_empty() && same {
                tell(field, &left_out);
                return Ok(staged);
            }
            for (mount, way) in &found {
                if take_out(tree, mount, way).map_err(failed)? {
                    left_out.push(format!("/{} ({})", way.display(), mount.kind));
                }
            }
            hidden = found
                .is_empty()
                .then(|| below.into_iter().cloned().collect());
        }
        Err(Failure::new(
            Kind::Failed,
            format!("{field}: the host's mounts below change all the time"),
        ))
    }
}

fn tell(field: &str, left_out: &[String]) {
    if !left_out.is_empty() {
        tracing::info!(
            "{field}: left out with all below, since the host's kernel is behind it: {}",
            left_out.join(", ")
        );
    }
}

/// The mounts of the tree with this top, the top first and each before what is mounted on it.
fn tree_of(all: &[Mount], top: u64) -> Vec<&Mount> {
    let mut tree: Vec<_> = all.iter().filter(|mount| mount.id == top).collect();
    let mut next = 0;
    while let Some(parent) = tree.get(next).map(|mount| mount.id) {
        tree.extend(all.iter().filter(|mount| mount.parent == parent));
        next += 1;
    }
    tree
}

/// The mounts of a tree that are to be taken out, and the way to each from the top. None of those
/// that are below another one of them, which go with it, and none of those that another mount
/// hides.
fn find<'a>(tree: &[&'a Mount]) -> Vec<(&'a Mount, &'a Path)> {
    let Some(top) = tree.first() else {
        return Vec::new();
    };
    let mounted_on = |id: u64| tree.iter().skip(1).filter(move |mount| mount.parent == id);
    let (mut found, mut open) = (Vec::new(), vec![*top]);
    while let Some(parent) = open.pop() {
        for mount in mounted_on(parent.id) {
            // On a directory above: that leads into the other mount.
            let above =
                |other: &&&Mount| other.path != mount.path && mount.path.starts_with(&other.path);
            if mounted_on(parent.id).any(|other| above(&other)) {
                continue;
            }
            let covered = mounted_on(mount.id).any(|other| other.path == mount.path);
            match (named(&mount.kind), mount.path.strip_prefix(&top.path)) {
                (Some(_), Ok(way)) if !covered => found.push((*mount, way)),
                _ => open.push(mount),
            }
        }
    }
    found
}

/// Unmounts one with all below it. `false`: it is not there any more, or something else is.
fn take_out(tree: &OwnedFd, mount: &Mount, way: &Path) -> io::Result<bool> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let opened = match rustix::fs::openat2(tree, way, flags, Mode::empty(), inside) {
        Ok(opened) => opened,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::AGAIN) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    if number_of(&opened)? != mount.id {
        return Ok(false);
    }
    // Lazily: what is below goes with it. The link leads to the descriptor's own mount, whatever
    // its path is now.
    let link = format!("/proc/self/fd/{}", opened.as_raw_fd());
    unmount(link, UnmountFlags::DETACH)?;
    Ok(true)
}

/// The number of the mount that a file is open on.
fn number_of(file: &OwnedFd) -> io::Result<u64> {
    let status = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok(status.stx_mnt_id)
}

#[cfg(test)]
mod tests;
