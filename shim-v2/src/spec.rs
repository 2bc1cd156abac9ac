//! A container's `config.json`: read, refused or split into the host's part and the guest's.
//!
//! Called by `pod`, in three steps. [`read`] parses the file. [`split`] refuses what is not done
//! (`kata-like-spec`) and takes out what is the host's to do: cgroup, network namespace, sources of
//! bind mounts, the VM's size. The caller looks up what lies at those sources, and [`Halves::with`]
//! completes the two parts. All of them are functions over values; only a pinned namespace is
//! looked at. The guest's part is the same spec without a path of the host, and beside it the
//! messages of `agent.proto` that say where its bind mounts and namespaces come from.
//!
//! The file comes from containerd, but users fill it: sizes are capped before parsing, and each
//! path is taken as text until `share` opens it.

use std::io::Read;
use std::path::{Path, PathBuf};

use kata_like_agent_protocol::agent;
use kata_like_failure::Failure;
use oci_spec::runtime::Spec;

use crate::selinux::Labels;

mod devices;
mod hooks;
mod mounts;
mod namespaces;
mod parts;
mod pinned;
mod size;

pub use devices::DiskPart;
pub use hooks::{HostHook, HostHooks};
pub use mounts::{Bind, Source, Volume};
pub use namespaces::Owners;
pub use parts::NetworkPart;
pub use pinned::Pinned;
pub use size::{MemorySize, SizePart};

use devices::split_devices;
use mounts::{binds_of, place};
use namespaces::split_namespaces;
use parts::{absolute, bad};
use size::size_of;

/// The name of the file in a bundle.
pub const FILE: &str = "config.json";

/// No spec is longer.
const MAX_LENGTH: u64 = 4 << 20;

/// What a container needs on the host.
#[derive(Debug, PartialEq, Eq)]
pub struct HostPart {
    /// `cgroupsPath` as it is given.
    pub cgroups_path: Option<String>,
    /// The network namespace.
    pub network: NetworkPart,
    /// The pinned namespaces in whose place it has new ones in the guest.
    pub pinned: Vec<Pinned>,
    /// The root file system where containerd names no mount for it: `root.path`.
    pub root: Option<PathBuf>,
    /// The sources of its bind mounts.
    pub volumes: Vec<Volume>,
    /// Block devices that become disks of the guest.
    pub disks: Vec<DiskPart>,
    /// Devices of the host that a privileged container goes without.
    pub left_out: Vec<PathBuf>,
    /// The hooks that run on the host.
    pub hooks: HostHooks,
    /// The file that names its name servers, where that is a mount.
    pub resolv_conf: Option<PathBuf>,
    /// Its own memory limit in bytes.
    pub memory_limit: Option<u64>,
    /// Its own CPU quota in microseconds.
    pub cpu_quota: Option<i64>,
    /// Its oom_score_adj, as it is given.
    pub oom_score: Option<i32>,
    /// What it may use, for the size of a VM that is made for it.
    pub size: SizePart,
    /// Its labels of SELinux.
    pub labels: Labels,
}

/// A spec that was split.
#[derive(Debug)]
pub struct Split {
    /// The host's part.
    pub host: HostPart,
    /// The guest's part.
    pub guest: GuestPart,
}

/// What the agent makes a container of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GuestPart {
    /// The spec as JSON.
    pub spec: Vec<u8>,
    /// Where its bind mounts are from.
    pub binds: Vec<agent::Bind>,
    /// Which of its namespaces are no new ones.
    pub joins: Vec<agent::Join>,
}

/// A spec that is split but for the sources of its bind mounts.
#[derive(Debug)]
pub struct Halves {
    /// The bind mounts, whose sources are to be looked up.
    pub binds: Vec<Bind>,
    host: HostPart,
    spec: Spec,
    joins: Vec<agent::Join>,
}

/// Reads a bundle's spec.
pub fn read(bundle: &Path) -> Result<Spec, Failure> {
    let path = bundle.join(FILE);
    let bytes = document(bundle)
        .map_err(|cause| Failure::failed(format!("read {}", path.display()), cause))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        // serde_json's own text ends with line and column.
        Failure::new(
            kata_like_failure::Kind::BadRequest,
            format!("parse {}: {error}", path.display()),
        )
    })
}

/// The file of a bundle's spec, to be parsed: no longer than any spec, and no array, which serde
/// would take for a struct without a field.
pub fn document(bundle: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(bundle.join(FILE))?
        .take(MAX_LENGTH + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_LENGTH {
        return Err(std::io::Error::other(format!(
            "it is longer than {MAX_LENGTH} bytes"
        )));
    }
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(std::io::Error::other("it is a JSON array, not an object"));
    }
    Ok(bytes)
}

/// `cgroupsPath` of a spec.
pub fn cgroups_path(spec: &Spec) -> Result<Option<String>, Failure> {
    let path = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.cgroups_path().as_ref());
    match path.map(|path| path.to_str()) {
        None => Ok(None),
        Some(Some(path)) => Ok(Some(path.to_owned())),
        Some(None) => Err(bad("linux.cgroupsPath is not UTF-8")),
    }
}

/// Refuses or splits a container's spec. `owners` tells whose namespaces it names.
pub fn split(mut spec: Spec, bundle: &Path, owners: &Owners) -> Result<Halves, Failure> {
    if spec.process().is_none() {
        // In runc's words.
        return Err(bad("process property must not be empty"));
    }
    kata_like_spec::refuse(&spec)?;
    let parted = split_namespaces(&mut spec, owners)?;
    let hooks = HostHooks::take(&mut spec)?;
    let (disks, left_out) = split_devices(&mut spec)?;
    let host = HostPart {
        cgroups_path: cgroups_path(&spec)?,
        network: parted.network,
        pinned: parted.pinned,
        root: (spec.root().as_ref()).map(|root| absolute(bundle, root.path())),
        volumes: Vec::new(),
        disks,
        left_out,
        hooks,
        resolv_conf: mounts::resolv_conf(&spec, bundle),
        memory_limit: size::own_memory(&spec),
        cpu_quota: size::own_quota(&spec),
        oom_score: (spec.process().as_ref()).and_then(|process| process.oom_score_adj()),
        size: size_of(&spec)?,
        labels: labels_of(&spec),
    };
    let binds = binds_of(&spec, bundle)?;
    strip_host_paths(&mut spec);
    Ok(Halves {
        binds,
        host,
        spec,
        joins: parted.joins,
    })
}

impl Halves {
    /// Completes both parts with what was found for each of `binds`, in their order.
    pub fn with(mut self, found: Vec<Source>) -> Result<Split, Failure> {
        let (volumes, binds) = place(&mut self.spec, self.binds, found)?;
        self.host.volumes = volumes;
        let spec = serde_json::to_vec(&self.spec)
            .map_err(|cause| Failure::failed("write the guest's part of the spec", cause))?;
        Ok(Split {
            host: self.host,
            guest: GuestPart {
                spec,
                binds,
                joins: self.joins,
            },
        })
    }
}

/// The labels of SELinux; an empty one is none, as containerd writes it for a privileged container.
fn labels_of(spec: &Spec) -> Labels {
    let given = |label: &Option<String>| label.clone().filter(|label| !label.is_empty());
    Labels {
        process: (spec.process().as_ref()).and_then(|process| given(process.selinux_label())),
        file: (spec.linux().as_ref()).and_then(|linux| given(linux.mount_label())),
    }
}

/// An exec's process, as JSON, without what is loaded on the host.
pub fn guest_process(json: &[u8]) -> Result<Vec<u8>, Failure> {
    if json.len() as u64 > MAX_LENGTH {
        return Err(bad("the process of an exec is too long"));
    }
    let mut process: oci_spec::runtime::Process = serde_json::from_slice(json)
        .map_err(|error| bad(&format!("parse the process of an exec: {error}")))?;
    kata_like_spec::refuse_process(&process)?;
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    serde_json::to_vec(&process)
        .map_err(|cause| Failure::failed("write the guest's part of a process", cause))
}

/// Takes out what names something of the host and has been dealt with, or has its counterpart in
/// the VM's own boundary: profiles of AppArmor and labels of SELinux are loaded on the host.
fn strip_host_paths(spec: &mut Spec) {
    if let Some(root) = spec.root_mut() {
        root.set_path("rootfs".into());
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(None);
        linux.set_mount_label(None);
    }
    if let Some(process) = spec.process_mut() {
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
    }
}

#[cfg(test)]
mod tests;
