//! A container's `config.json`: read, checked, and split into the host's part and the guest's.
//!
//! Called by `sandbox`. What is the host's to do (cgroup, network namespace, sources of bind
//! mounts, the VM's size) is taken out into [`HostPart`]; the guest's part is the same spec with
//! names in place of host paths, as `agent.proto` describes. What can be done on neither side is
//! refused by the name of its field. No path of the host reaches the guest.
//!
//! The file comes from containerd, but users fill it: sizes are capped before parsing, and each
//! path is taken as text until `share` opens it.

use std::io::Read;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType, Mount, Spec};

use crate::error::SandboxError;

/// The name of the file in a bundle.
pub const FILE: &str = "config.json";

/// No spec is longer.
const MAX_LENGTH: u64 = 4 << 20;
/// The most bind mounts of one container.
const MAX_VOLUMES: usize = 512;

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
    /// What it may use, for the size of a VM that is made for it.
    pub size: SizePart,
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
}

/// Limits that a VM's size follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizePart {
    /// The memory limit in bytes.
    pub memory: Option<u64>,
    /// CPU quota and period in microseconds.
    pub cpu: Option<(u64, u64)>,
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
    /// A name that no volume of the pod has yet.
    pub volume_name: &'a mut dyn FnMut() -> String,
}

/// Reads a bundle's spec.
pub fn read(bundle: &Path) -> Result<Spec, SandboxError> {
    let path = bundle.join(FILE);
    let bytes = read_file(&path)
        .map_err(|cause| SandboxError::failed(format!("read {}", path.display()), cause))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        // serde_json's own text ends with line and column.
        SandboxError::new(
            crate::error::SandboxErrorKind::BadRequest,
            format!("parse {}: {error}", path.display()),
        )
    })
}

fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(MAX_LENGTH + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_LENGTH {
        return Err(std::io::Error::other(format!(
            "it is longer than {MAX_LENGTH} bytes"
        )));
    }
    Ok(bytes)
}

/// `cgroupsPath` of a spec.
pub fn cgroups_path(spec: &Spec) -> Result<Option<String>, SandboxError> {
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
pub fn split(mut spec: Spec, bundle: &Path, pod: Pod) -> Result<Split, SandboxError> {
    refuse_hooks(&spec)?;
    refuse_host_fields(&spec)?;
    let network = split_namespaces(&mut spec, pod.task_of)?;
    let volumes = split_mounts(&mut spec, bundle, pod.volume_name)?;
    let root = spec
        .root()
        .as_ref()
        .map(|root| absolute(bundle, root.path()));
    let size = size_of(&spec)?;
    let cgroups_path = cgroups_path(&spec)?;
    strip_host_paths(&mut spec);
    let guest = serde_json::to_vec(&spec)
        .map_err(|cause| SandboxError::failed("write the guest's part of the spec", cause))?;
    Ok(Split {
        host: HostPart {
            cgroups_path,
            network,
            root,
            volumes,
            size,
        },
        guest,
    })
}

/// An exec's process, as JSON, without what is loaded on the host.
pub fn guest_process(json: &[u8]) -> Result<Vec<u8>, SandboxError> {
    if json.len() as u64 > MAX_LENGTH {
        return Err(bad("the process of an exec is too long"));
    }
    let mut process: oci_spec::runtime::Process = serde_json::from_slice(json)
        .map_err(|error| bad(&format!("parse the process of an exec: {error}")))?;
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    serde_json::to_vec(&process)
        .map_err(|cause| SandboxError::failed("write the guest's part of a process", cause))
}

fn refuse_hooks(spec: &Spec) -> Result<(), SandboxError> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    #[allow(deprecated)]
    let of_the_host = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in of_the_host {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(SandboxError::unsupported(
                format_args!("hooks.{name}"),
                "hooks that run on the host are not run yet",
            ));
        }
    }
    Ok(())
}

/// Fields whose meaning lies on the host and that nothing here gives them.
fn refuse_host_fields(spec: &Spec) -> Result<(), SandboxError> {
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    if linux.intel_rdt().is_some() {
        return Err(SandboxError::unsupported(
            "linux.intelRdt",
            "the guest has no resource control of the host's caches",
        ));
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|list| !list.is_empty())
    {
        return Err(SandboxError::unsupported(
            "linux.netDevices",
            "devices of the host can't be moved into the guest",
        ));
    }
    if let Some(seccomp) = linux.seccomp()
        && seccomp.listener_path().is_some()
    {
        return Err(SandboxError::unsupported(
            "linux.seccomp.listenerPath",
            "a socket of the host can't be reached from the guest",
        ));
    }
    for (index, device) in linux.devices().iter().flatten().enumerate() {
        if !is_in_every_kernel(device.typ(), device.major(), device.minor()) {
            return Err(SandboxError::unsupported(
                format_args!("linux.devices[{index}] ({})", device.path().display()),
                "devices of the host can't be passed into the guest",
            ));
        }
    }
    Ok(())
}

/// Device numbers that mean the same in any Linux (Documentation/admin-guide/devices.txt).
fn is_in_every_kernel(kind: LinuxDeviceType, major: i64, minor: i64) -> bool {
    let is_character = matches!(kind, LinuxDeviceType::C | LinuxDeviceType::U);
    is_character
        && matches!(
            (major, minor),
            // null, zero, full, random, urandom; tty, console, ptmx; net/tun, fuse
            (1, 3 | 5 | 7 | 8 | 9) | (5, 0..=2) | (10, 200 | 229)
        )
}

/// Which of a pod's namespaces a container must at least have of its own or share with its pod:
/// without an entry the host's is meant, which no guest can give.
const NEEDED: [LinuxNamespaceType; 5] = [
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Network,
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
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
) -> Result<NetworkPart, SandboxError> {
    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or_else(|| bad("linux is missing: the spec is not of a Linux container"))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for needed in NEEDED {
        if !namespaces.iter().any(|namespace| namespace.typ() == needed) {
            return Err(SandboxError::unsupported(
                format_args!(
                    "linux.namespaces without an entry of type {}",
                    name_of(needed)
                ),
                "the host's own namespace can't be given to a guest",
            ));
        }
    }
    let mut network = NetworkPart::New;
    for namespace in &mut namespaces {
        let (kind, Some(path)) = (namespace.typ(), namespace.path().clone()) else {
            continue;
        };
        let task = pid_of(&path).and_then(task_of);
        let joined = match (kind, task) {
            (LinuxNamespaceType::Network, task) => {
                network = match task {
                    Some(_) => NetworkPart::Pod,
                    None => NetworkPart::Path(path),
                };
                None
            }
            (_, Some(task)) => Some(PathBuf::from(format!("container:{task}"))),
            (_, None) => {
                return Err(SandboxError::unsupported(
                    format_args!(
                        "linux.namespaces of type {} with path {}",
                        name_of(kind),
                        path.display()
                    ),
                    "it is not that of a container of this pod",
                ));
            }
        };
        namespace.set_path(joined);
    }
    linux.set_namespaces(Some(namespaces));
    Ok(network)
}

/// The pid in `/proc/PID/ns/KIND`.
fn pid_of(path: &Path) -> Option<u32> {
    let mut parts = path.components();
    let mut next = || match parts.next() {
        Some(Component::Normal(part)) => part.to_str(),
        Some(Component::RootDir) => Some("/"),
        _ => None,
    };
    let (root, proc, pid, ns, _kind) = (next()?, next()?, next()?, next()?, next()?);
    ((root, proc, ns) == ("/", "proc", "ns")).then(|| pid.parse().ok())?
}

/// File systems that the guest makes itself.
const OF_THE_GUEST: [&str; 8] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs",
];

fn split_mounts(
    spec: &mut Spec,
    bundle: &Path,
    name: &mut dyn FnMut() -> String,
) -> Result<Vec<Volume>, SandboxError> {
    let mut volumes = Vec::new();
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let field = format!("mounts[{index}] ({})", mount.destination().display());
        if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
            return Err(SandboxError::unsupported(
                format_args!("{field}.uidMappings"),
                "mounts with mapped ids are not made yet",
            ));
        }
        if !is_bind(mount) {
            let kind = mount.typ().as_deref().unwrap_or_default();
            if !OF_THE_GUEST.contains(&kind) {
                return Err(SandboxError::unsupported(
                    format_args!("{field}.type {kind:?}"),
                    "only bind mounts and the kernel's own file systems are mounted",
                ));
            }
            continue;
        }
        if mount.destination() == Path::new("/dev/shm") {
            *mount = shared_memory(mount);
            continue;
        }
        let volume = volume_of(mount, field, bundle, name)?;
        if volumes.len() >= MAX_VOLUMES {
            return Err(bad(&format!(
                "mounts holds more than {MAX_VOLUMES} bind mounts"
            )));
        }
        mount.set_source(Some(format!("volume:{}", volume.name).into()));
        mount.set_typ(Some("bind".into()));
        volumes.push(volume);
    }
    Ok(volumes)
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

/// As runc has it: the options decide, whatever the type says.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || options(mount).any(|o| o == "bind" || o == "rbind")
}

fn volume_of(
    mount: &Mount,
    field: String,
    bundle: &Path,
    name: &mut dyn FnMut() -> String,
) -> Result<Volume, SandboxError> {
    let source = mount
        .source()
        .as_ref()
        .filter(|source| !source.as_os_str().is_empty())
        .ok_or_else(|| bad(&format!("{field} is a bind mount without a source")))?;
    if options(mount).any(|option| option == "rshared" || option == "shared") {
        return Err(SandboxError::unsupported(
            format_args!("{field}.options rshared"),
            "mounts made in the guest can't be propagated to the host",
        ));
    }
    let recursive = options(mount).any(|option| option == "rbind");
    // The last one counts, as with mount(8).
    let read_only = options(mount)
        .filter(|option| matches!(*option, "ro" | "rw" | "rro"))
        .last()
        .is_some_and(|option| option != "rw");
    Ok(Volume {
        name: name(),
        source: absolute(bundle, source),
        field,
        read_only,
        recursive,
    })
}

/// The pod's /dev/shm is a tmpfs of containerd's on the host; in the guest it is one of its own.
fn shared_memory(mount: &Mount) -> Mount {
    let mut tmpfs = mount.clone();
    tmpfs.set_typ(Some("tmpfs".into()));
    tmpfs.set_source(Some("shm".into()));
    let mut options: Vec<String> = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]
        .map(String::from)
        .into();
    if self::options(mount).any(|option| option == "ro") {
        options.push("ro".into());
    }
    tmpfs.set_options(Some(options));
    tmpfs
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

/// Sandbox-wide sums that kubelet passes on the sandbox container.
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

fn size_of(spec: &Spec) -> Result<SizePart, SandboxError> {
    let annotation = |key: &str| {
        let Some(text) = spec.annotations().as_ref().and_then(|all| all.get(key)) else {
            return Ok(None);
        };
        let number: i64 = text
            .parse()
            .map_err(|_| bad(&format!("annotation {key}: {text:?} is not a number")))?;
        Ok(u64::try_from(number).ok().filter(|number| *number > 0))
    };
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let own_memory = resources
        .and_then(|all| all.memory().as_ref())
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit > 0);
    let own_cpu = resources
        .and_then(|all| all.cpu().as_ref())
        .and_then(|cpu| {
            let quota = u64::try_from(cpu.quota()?)
                .ok()
                .filter(|quota| *quota > 0)?;
            // The kernel's default period (sched-bwc.rst).
            Some((quota, cpu.period().unwrap_or(100_000)))
        });
    let pod_cpu = annotation(SANDBOX_QUOTA)?.zip(annotation(SANDBOX_PERIOD)?);
    Ok(SizePart {
        memory: annotation(SANDBOX_MEMORY)?.or(own_memory),
        cpu: pod_cpu.or(own_cpu),
    })
}

const MIB: u64 = 1 << 20;
/// What the guest needs beside its containers: kernel, agent, and page cache to run them from.
const OVERHEAD: u64 = 128 * MIB;
/// The least memory of a VM.
const LEAST: u64 = 256 * MIB;
/// The most vCPUs that the VMM takes.
const MOST_VCPUS: u64 = 32;

impl SizePart {
    /// The VM's memory in bytes, a multiple of 2 MiB: `default` without a limit, else the limit and
    /// what the guest itself needs, which is 128 MiB and a 64th for its page structs (64 bytes for
    /// each 4 KiB); at least 256 MiB, and no more than the host has.
    pub fn memory_bytes(&self, default: u64, host: u64) -> u64 {
        let wanted = match self.memory {
            None => default,
            Some(limit) => limit.saturating_add(OVERHEAD).saturating_add(limit / 64),
        };
        let most = (host / (2 * MIB) * (2 * MIB)).max(LEAST);
        wanted.clamp(LEAST, most).div_ceil(2 * MIB) * (2 * MIB)
    }

    /// The VM's vCPUs: as many as the quota can keep busy, at least one, else `default`.
    pub fn vcpus(&self, default: u8, online: u8) -> u8 {
        let wanted = match self.cpu {
            None | Some((_, 0)) => u64::from(default),
            Some((quota, period)) => quota.div_ceil(period).min(u64::from(online)),
        };
        u8::try_from(wanted.clamp(1, MOST_VCPUS)).unwrap_or(1)
    }
}

fn bad(text: &str) -> SandboxError {
    SandboxError::new(crate::error::SandboxErrorKind::BadRequest, text)
}

#[cfg(test)]
mod tests;
