//! The spec's bind mounts: what the host carries into the guest, and what the guest has itself
//! instead.

use std::path::{Path, PathBuf};

use kata_like_agent_protocol::agent::{self, MemoryVolume, bind};
use kata_like_failure::Failure;
use kata_like_spec::{ReadOnly, SHARED_MOUNT, is_bind, mount_field};
use oci_spec::runtime::{Mount, Spec};

use super::parts::{absolute, bad};
use crate::file_systems::Found;

/// The most bind mounts of one container.
const MAX_VOLUMES: usize = 512;

/// A bind mount of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// What it shows, as a volume without a name.
    pub volume: Volume,
    /// Whether it is the container's shared memory, which a file server would make neither shared
    /// nor memory.
    pub shared_memory: bool,
    index: u32,
}

/// What was found at the source of a bind mount.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A file or directory. The name is the same for all of the pod that show the same files in the
    /// same way.
    Volume(String),
    /// A tmpfs of the host, in whose place the guest has memory of its own.
    Memory(MemoryVolume),
    /// A file system that no guest can have.
    Kernel(Found),
}

/// A file or directory of the host that is bound into the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name in the share.
    pub name: String,
    /// Which entry of `mounts` it is of, for messages.
    pub field: String,
    /// Where it lies on the host.
    pub source: PathBuf,
    /// How much of it the host itself keeps from being written.
    pub read_only: ReadOnly,
    /// Whether what is mounted below it comes along.
    pub recursive: bool,
    /// Whether what the host mounts below it later comes along, too.
    pub follows: bool,
}

/// The bind mounts of a spec.
pub(super) fn binds_of(spec: &Spec, bundle: &Path) -> Result<Vec<Bind>, Failure> {
    let mounts = (0..).zip(spec.mounts().iter().flatten());
    let binds = mounts.filter(|(_, mount)| is_bind(mount));
    let bind = |(index, mount): (u32, &Mount)| {
        let shared_memory = mount.destination() == Path::new("/dev/shm");
        let bind = Bind {
            volume: volume_of(mount, mount_field(index as usize, mount), bundle)?,
            shared_memory,
            index,
        };
        if !shared_memory {
            refuse_shared(mount, &bind.volume)?;
        }
        Ok(bind)
    };
    binds.map(bind).collect()
}

/// Puts what was found for each bind mount in its place in the guest's part. What lies on a file
/// system of the host's kernel becomes the guest's own, or is refused.
pub(super) fn place(
    spec: &mut Spec,
    binds: Vec<Bind>,
    found: Vec<Source>,
) -> Result<(Vec<Volume>, Vec<agent::Bind>), Failure> {
    let (mut volumes, mut placed) = (Vec::new(), Vec::new());
    let mut mounts = (0..).zip(spec.mounts_mut().iter_mut().flatten());
    for (bind, found) in binds.into_iter().zip(found) {
        let Some((_, mount)) = mounts.find(|(index, _)| *index == bind.index) else {
            break;
        };
        let source = match found {
            Source::Memory(memory) => bind::Source::Memory(memory),
            Source::Kernel(found) => {
                refuse_shared(mount, &bind.volume)?;
                become_own(mount, &bind.volume, found)?;
                continue;
            }
            Source::Volume(name) => {
                refuse_shared(mount, &bind.volume)?;
                if volumes.len() >= MAX_VOLUMES {
                    return Err(bad(&format!(
                        "mounts holds more than {MAX_VOLUMES} bind mounts"
                    )));
                }
                volumes.push(Volume {
                    name: name.clone(),
                    ..bind.volume
                });
                bind::Source::Volume(name)
            }
        };
        mount.set_source(None);
        mount.set_typ(Some("bind".into()));
        placed.push(agent::Bind {
            mount: bind.index,
            source: Some(source),
            ..Default::default()
        });
    }
    Ok((volumes, placed))
}

/// What a container has as `/etc/resolv.conf`, if it is a file of the host: the last mount there
/// counts.
pub(super) fn resolv_conf(spec: &Spec, bundle: &Path) -> Option<PathBuf> {
    let mut mounts = spec.mounts().iter().flatten();
    let there = |mount: &&Mount| mount.destination() == Path::new("/etc/resolv.conf");
    let last = mounts.rfind(|mount| there(mount) && is_bind(mount))?;
    last.source()
        .as_ref()
        .map(|source| absolute(bundle, source))
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

/// Makes a bind mount one of the guest's own kind, if the host's can only have meant that, or
/// refuses it.
fn become_own(mount: &mut Mount, volume: &Volume, found: Found) -> Result<(), Failure> {
    let Some(kind) = found.own_kind() else {
        return Err(found.refusal(&volume.field, &volume.source));
    };
    mount.set_typ(Some(kind.into()));
    mount.set_source(Some(kind.into()));
    let left: Vec<String> = options(mount)
        .filter(|option| !matches!(*option, "bind" | "rbind"))
        .map(str::to_owned)
        .collect();
    mount.set_options(Some(left));
    Ok(())
}

fn refuse_shared(mount: &Mount, volume: &Volume) -> Result<(), Failure> {
    match options(mount).any(|option| option == "rshared" || option == "shared") {
        true => Err(SHARED_MOUNT.of(format_args!("{}.options rshared", volume.field))),
        false => Ok(()),
    }
}

fn volume_of(mount: &Mount, field: String, bundle: &Path) -> Result<Volume, Failure> {
    let source = mount
        .source()
        .as_ref()
        .filter(|source| !source.as_os_str().is_empty())
        .ok_or_else(|| bad(&format!("{field} is a bind mount without a source")))?;
    let recursive = options(mount).any(|option| option == "rbind");
    let follows = options(mount).any(|option| option == "rslave" || option == "slave");
    let read_only = match kata_like_spec::read_only(mount) {
        ReadOnly::All if !recursive => ReadOnly::Top, // there is nothing below
        read_only => read_only,
    };
    Ok(Volume {
        name: String::new(),
        source: absolute(bundle, source),
        field,
        read_only,
        recursive,
        follows,
    })
}
