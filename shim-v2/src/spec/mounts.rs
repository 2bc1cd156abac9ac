//! The spec's mounts: what the guest makes itself, and what comes from the host as a volume.

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};

use super::{Pod, absolute, bad};
use crate::file_systems::Found;
use kata_like_failure::Failure;

/// The most bind mounts of one container.
const MAX_VOLUMES: usize = 512;

/// A file or directory of the host that is bound into the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name in the share.
    pub name: String,
    /// Which entry of `mounts` it is of, for messages.
    pub field: String,
    /// Where it lies on the host.
    pub source: PathBuf,
    /// Whether the host itself refuses writes.
    pub read_only: bool,
    /// Whether what is mounted below it comes along.
    pub recursive: bool,
    /// Whether what the host mounts below it later comes along, too.
    pub follows: bool,
}

/// A tmpfs of the pod's own in the guest, in the place of one of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryVolume {
    /// Its name, the same for every container of the pod that mounts it.
    pub name: String,
    /// Its size in bytes; 0: half of the guest's memory, as the host's has no limit.
    pub size_bytes: u64,
    /// The mode of its root directory.
    pub mode: u32,
}

/// File systems that the guest makes itself.
const OF_THE_GUEST: [&str; 8] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs",
];

/// Gives each bind mount a name in the place of its source. Answers what is behind the names: files
/// of the host, and memory. What lies on a file system of the host's kernel becomes the guest's own, or is refused.
pub(super) fn split_mounts(
    spec: &mut Spec,
    bundle: &Path,
    pod: Pod,
) -> Result<(Vec<Volume>, Vec<MemoryVolume>), Failure> {
    let (mut volumes, mut memory) = (Vec::new(), Vec::<MemoryVolume>::new());
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let field = format!("mounts[{index}] ({})", mount.destination().display());
        if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
            return Err(Failure::unsupported(
                format_args!("{field}.uidMappings"),
                "mounts with mapped ids are not made yet",
            ));
        }
        if !is_bind(mount) {
            let kind = mount.typ().as_deref().unwrap_or_default();
            if !OF_THE_GUEST.contains(&kind) {
                return Err(Failure::unsupported(
                    format_args!("{field}.type {kind:?}"),
                    "only bind mounts and the kernel's own file systems are mounted",
                ));
            }
            continue;
        }
        // Shared memory through a file server would be neither shared nor memory.
        if mount.destination() == Path::new("/dev/shm")
            && let Some(source) = mount.source()
            && let Some(volume) = (pod.memory_of)(&absolute(bundle, source))
                .map_err(|error| error.during(field.clone()))?
        {
            mount.set_source(Some(format!("memory:{}", volume.name).into()));
            mount.set_typ(Some("bind".into()));
            if !memory.contains(&volume) {
                memory.push(volume);
            }
            continue;
        }
        let mut volume = volume_of(mount, field, bundle)?;
        if become_own(mount, &volume, pod.system_of)? {
            continue;
        }
        volume.name = (pod.volume_name)(&volume)?;
        if volumes.len() >= MAX_VOLUMES {
            return Err(bad(&format!(
                "mounts holds more than {MAX_VOLUMES} bind mounts"
            )));
        }
        mount.set_source(Some(format!("volume:{}", volume.name).into()));
        mount.set_typ(Some("bind".into()));
        volumes.push(volume);
    }
    Ok((volumes, memory))
}

/// What a container has as `/etc/resolv.conf`, if it is a file of the host: the last mount there counts.
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

/// As runc has it: the options decide, whatever the type says.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || options(mount).any(|o| o == "bind" || o == "rbind")
}

/// Whether a bind mount has become one of the guest's own kind: the host's can't be had. Others of the host's kernel
/// are refused.
fn become_own(
    mount: &mut Mount,
    volume: &Volume,
    system_of: &dyn Fn(&Path) -> io::Result<Option<Found>>,
) -> Result<bool, Failure> {
    let found = system_of(&volume.source).map_err(|cause| {
        let step = format!("{}: open source {}", volume.field, volume.source.display());
        Failure::failed(step, cause)
    })?;
    let Some(found) = found else {
        return Ok(false);
    };
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
    Ok(true)
}

fn volume_of(mount: &Mount, field: String, bundle: &Path) -> Result<Volume, Failure> {
    let source = mount
        .source()
        .as_ref()
        .filter(|source| !source.as_os_str().is_empty())
        .ok_or_else(|| bad(&format!("{field} is a bind mount without a source")))?;
    if options(mount).any(|option| option == "rshared" || option == "shared") {
        return Err(Failure::unsupported(
            format_args!("{field}.options rshared"),
            "mounts made in the guest can't be propagated to the host",
        ));
    }
    let recursive = options(mount).any(|option| option == "rbind");
    let follows = options(mount).any(|option| option == "rslave" || option == "slave");
    // The last one counts, as with mount(8).
    let read_only = options(mount)
        .filter(|option| matches!(*option, "ro" | "rw" | "rro"))
        .last()
        .is_some_and(|option| option != "rw");
    Ok(Volume {
        name: String::new(),
        source: absolute(bundle, source),
        field,
        read_only,
        recursive,
        follows,
    })
}
