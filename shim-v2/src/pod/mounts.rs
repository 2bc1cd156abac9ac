//! A container's root file system and volumes, mounted into the pod's share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::sandbox::Sandbox;
use crate::cgroup::limits::LATER;
use crate::file_systems::in_memory::{self, InMemory};
use crate::share::{Mounted, RootfsMount, SharedVolume, volumes};
use crate::spec::Volume;
use crate::steps::{Undo, blocking};
use kata_like_failure::Failure;
use kata_like_spec::ReadOnly;

/// A container's mounts in the pod's share.
pub(super) struct Mounts {
    /// Its root file system's, to be dropped from the last to the first.
    root: Vec<Mounted>,
    volumes: Vec<SharedVolume>,
    /// The volume that is its root, if it is one.
    pub(super) root_volume: Option<String>,
}

impl Mounts {
    /// Hands them to what undoes them.
    pub(super) async fn hand_over(self, undo: &Undo) -> Result<(), Failure> {
        undo.push(async move {
            let _ = tokio::task::spawn_blocking(move || drop(self)).await;
        })
        .await
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        while self.root.pop().is_some() {}
    }
}

/// Mounts a container's root file system and its volumes. Without `rootfs` the spec's `root` is a
/// volume.
pub(super) async fn make(
    sandbox: &Arc<Sandbox>,
    id: &str,
    bundle: &Path,
    rootfs: Vec<RootfsMount>,
    mut wanted: Vec<Volume>,
    root: Option<PathBuf>,
) -> Result<Mounts, Failure> {
    let sandbox = Arc::clone(sandbox);
    let (id, bundle) = (id.to_owned(), bundle.to_owned());
    blocking(move || {
        let mut mounts = Mounts {
            root: Vec::new(),
            volumes: Vec::new(),
            root_volume: None,
        };
        if rootfs.is_empty() {
            let root = volumes::of_root(root)?;
            wanted.push(root.clone());
            mounts.root_volume = Some(root.name);
        } else {
            sandbox.limits.make_room(in_root(&rootfs));
            mounts.root = sandbox.share.add_rootfs(&id, &bundle, &rootfs)?;
        }
        mounts.volumes = add_volumes(&sandbox, &wanted)?;
        Ok(mounts)
    })
    .await
}

/// Puts the sources of a container's bind mounts into the share.
fn add_volumes(sandbox: &Sandbox, volumes: &[Volume]) -> Result<Vec<SharedVolume>, Failure> {
    for volume in volumes {
        sandbox.limits.make_room(in_volume(volume));
    }
    volumes
        .iter()
        .map(|volume| sandbox.share.add_volume(volume))
        .collect()
}

/// Where a container that writes to a volume fills memory of the host.
fn in_volume(volume: &Volume) -> Vec<InMemory> {
    let top = volume.read_only == ReadOnly::No;
    let below = volume.recursive && volume.read_only != ReadOnly::All;
    let mut found = Vec::new();
    if top {
        found.extend(in_memory::at(&volume.source));
    }
    if below {
        found.extend(in_memory::below(&volume.source));
    }
    if volume.follows {
        found.push(LATER);
    }
    found
}

/// The same for its root: the directory that an overlay writes to, or the source of a bind mount.
fn in_root(rootfs: &[RootfsMount]) -> Vec<InMemory> {
    let written = rootfs.iter().filter_map(|mount| match mount.kind.as_str() {
        "overlay" => (mount.options.iter()).find_map(|option| option.strip_prefix("upperdir=")),
        _ => Some(mount.source.as_str()),
    });
    written
        .filter_map(|path| in_memory::at(Path::new(path)))
        .collect()
}
