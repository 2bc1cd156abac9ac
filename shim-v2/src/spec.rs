//! A container's `config.json`: read, checked, and split into the host's part and the guest's.
//!
//! Called by `pod`. What is the host's to do (cgroup, network namespace, sources of bind
//! mounts, the VM's size) is taken out into [`HostPart`]; the guest's part is the same spec with
//! names in place of host paths, as `agent.proto` describes. What can be done on neither side is
//! refused by the name of its field. No path of the host reaches the guest.
//!
//! The file comes from containerd, but users fill it: sizes are capped before parsing, and each
//! path is taken as text until `share` opens it.

use std::io::Read;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::file_systems::Found;
use crate::selinux::Labels;
use kata_like_failure::Failure;

mod devices;
mod hooks;
mod mounts;
mod size;

pub use devices::DiskPart;
pub use hooks::{HostHook, HostHooks};
pub use mounts::{MemoryVolume, Volume};
pub use size::{MemorySize, SizePart};

use devices::split_devices;
use mounts::split_mounts;
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
    /// The root file system where containerd names no mount for it: `root.path`.
    pub root: Option<PathBuf>,
    /// The sources of its bind mounts.
    pub volumes: Vec<Volume>,
    /// Memory of the pod that is mounted.
    pub memory: Vec<MemoryVolume>,
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
    /// What it may use, for the size of a VM that is made for it.
    pub size: SizePart,
    /// Its labels of SELinux.
    pub labels: Labels,
}

/// The network namespace that the spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkPart {
    /// A new one.
    New,
    /// That of this path on the host.
    Path(PathBuf),
    /// The pod's, by the pid of one of its stand-ins.
    Pod,
}

/// A spec that was split.
#[derive(Debug)]
pub struct Split {
    /// The host's part.
    pub host: HostPart,
    /// The guest's part, as JSON.
    pub guest: Vec<u8>,
}

/// What the split must know about the pod.
pub struct Pod<'a> {
    /// The container whose stand-in has this pid, if it is of this pod.
    pub task_of: &'a dyn Fn(u32) -> Option<String>,
    /// The name of a volume: the same for all of the pod that show the same files in the same way.
    pub volume_name: &'a dyn Fn(&Volume) -> Result<String, Failure>,
    /// The pod's memory in the place of a tmpfs of the host, if this path leads to one.
    pub memory_of: &'a mut dyn FnMut(&Path) -> Result<Option<MemoryVolume>, Failure>,
    /// What a path lies on, if no guest can have that.
    pub system_of: &'a dyn Fn(&Path) -> std::io::Result<Option<Found>>,
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

/// Splits a container's spec.
pub fn split(mut spec: Spec, bundle: &Path, pod: Pod) -> Result<Split, Failure> {
    if spec.process().is_none() {
        // In runc's words.
        return Err(bad("process property must not be empty"));
    }
    refuse_host_fields(&spec)?;
    let network = split_namespaces(&mut spec, pod.task_of)?;
    let hooks = HostHooks::take(&mut spec)?;
    let (disks, left_out) = split_devices(&mut spec)?;
    let resolv_conf = mounts::resolv_conf(&spec, bundle);
    let (volumes, memory) = split_mounts(&mut spec, bundle, pod)?;
    let root = spec
        .root()
        .as_ref()
        .map(|root| absolute(bundle, root.path()));
    let size = size_of(&spec)?;
    let cgroups_path = cgroups_path(&spec)?;
    let labels = labels_of(&spec);
    strip_host_paths(&mut spec);
    let guest = serde_json::to_vec(&spec)
        .map_err(|cause| Failure::failed("write the guest's part of the spec", cause))?;
    Ok(Split {
        host: HostPart {
            cgroups_path,
            network,
            root,
            volumes,
            memory,
            disks,
            left_out,
            hooks,
            resolv_conf,
            memory_limit: size::own_memory(&spec),
            cpu_quota: size::own_quota(&spec),
            size,
            labels,
        },
        guest,
    })
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
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    serde_json::to_vec(&process)
        .map_err(|cause| Failure::failed("write the guest's part of a process", cause))
}

/// Fields whose meaning lies on the host and that nothing here gives them.
fn refuse_host_fields(spec: &Spec) -> Result<(), Failure> {
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    if linux.intel_rdt().is_some() {
        return Err(Failure::unsupported(
            "linux.intelRdt",
            "the guest has no resource control of the host's caches",
        ));
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|list| !list.is_empty())
    {
        return Err(Failure::unsupported(
            "linux.netDevices",
            "devices of the host can't be moved into the guest",
        ));
    }
    if let Some(seccomp) = linux.seccomp()
        && seccomp.listener_path().is_some()
    {
        return Err(Failure::unsupported(
            "linux.seccomp.listenerPath",
            "a socket of the host can't be reached from the guest",
        ));
    }
    Ok(())
}

/// Which of a pod's namespaces a container must at least have of its own or share with its pod:
/// without an entry the host's is meant, which no guest can give. Beside it, how users ask for that.
const NEEDED: [(LinuxNamespaceType, &str); 5] = [
    (LinuxNamespaceType::Mount, ""),
    (
        LinuxNamespaceType::Network,
        " (hostNetwork; with ctr, --cni in place of --net-host; with BuildKit, networkMode = \"cni\")",
    ),
    (LinuxNamespaceType::Pid, " (hostPID)"),
    (LinuxNamespaceType::Ipc, " (hostIPC)"),
    (LinuxNamespaceType::Uts, ""),
];

/// The type as the spec has it.
fn name_of(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

fn split_namespaces(
    spec: &mut Spec,
    task_of: &dyn Fn(u32) -> Option<String>,
) -> Result<NetworkPart, Failure> {
    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or_else(|| bad("linux is missing: the spec is not of a Linux container"))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for (needed, asked) in NEEDED {
        if !namespaces.iter().any(|namespace| namespace.typ() == needed) {
            return Err(Failure::unsupported(
                format_args!(
                    "linux.namespaces without an entry of type {}",
                    name_of(needed)
                ),
                format_args!("the host's own namespace can't be given to a guest{asked}"),
            ));
        }
    }
    let mut network = NetworkPart::New;
    for namespace in &mut namespaces {
        let (kind, Some(path)) = (namespace.typ(), namespace.path().clone()) else {
            continue;
        };
        let task = pid_of(&path, kind).and_then(task_of);
        let joined = match (kind, task) {
            (LinuxNamespaceType::Network, None) => {
                network = NetworkPart::Path(path);
                PathBuf::from("pod")
            }
            (LinuxNamespaceType::Network, Some(task)) => {
                network = NetworkPart::Pod;
                PathBuf::from(format!("container:{task}"))
            }
            (_, Some(task)) => PathBuf::from(format!("container:{task}")),
            (_, None) => {
                let asked = match kind {
                    LinuxNamespaceType::User => " (hostUsers: false)",
                    _ => "",
                };
                return Err(Failure::unsupported(
                    format_args!(
                        "linux.namespaces of type {} with path {}",
                        name_of(kind),
                        path.display()
                    ),
                    format_args!("it is not that of a container of this pod{asked}"),
                ));
            }
        };
        namespace.set_path(Some(joined));
    }
    linux.set_namespaces(Some(namespaces));
    Ok(network)
}

/// The pid in `/proc/PID/ns/KIND`, if the file is one of this kind.
fn pid_of(path: &Path, kind: LinuxNamespaceType) -> Option<u32> {
    let mut parts = path.components();
    let mut next = || match parts.next() {
        Some(Component::Normal(part)) => part.to_str(),
        Some(Component::RootDir) => Some("/"),
        _ => None,
    };
    let (root, proc, pid, ns, file) = (next()?, next()?, next()?, next()?, next()?);
    let name = match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Network => "net",
        kind => name_of(kind),
    };
    let is_one = (root, proc, ns) == ("/", "proc", "ns") && file == name;
    is_one.then(|| pid.parse().ok())?
}

fn absolute(bundle: &Path, path: &Path) -> PathBuf {
    // `join` with an absolute path is that path.
    bundle.join(path)
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

fn bad(text: &str) -> Failure {
    Failure::new(kata_like_failure::Kind::BadRequest, text)
}

#[cfg(test)]
mod tests;
