//! The rows, in the order in which they are asked.

use oci_spec::runtime::{
    LinuxBlockIo, LinuxNamespaceType, LinuxNetwork, LinuxResources, LinuxSchedulerPolicy,
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, Mount, Spec,
};

use crate::refusal::{Find, Refusal};

/// File systems that the guest makes itself. All other mounts are bind mounts.
pub const OF_THE_GUEST: [&str; 8] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs",
];

const LINUX_ONLY: &str = "this is a Linux container";
const MAPPED_IDS: &str = "mounts with mapped ids are not made yet";
const NO_LIMIT: &str = "cgroup v2 has no such limit";
const NO_SETTING: &str = "cgroup v2 has no such setting";
const NO_DISK: &str = "it numbers the host's disks, which the guest does not have";
const NO_RDMA: &str = "the guest has no such device";
const LISTENER: &str = "a listener on the host can't be reached from the guest";
const NOT_LISTED: &str = "linux.namespaces without an entry of type";
const UNIFIED: &str = "linux.resources.unified[]";

/// A mount of a type that neither side makes.
pub const MOUNT_TYPE: Refusal = row(
    "mounts[].type",
    "only bind mounts and the kernel's own file systems are mounted",
    Find::Spec(mount_type),
);
/// A mount option that asks for mapped ids.
pub const MAPPED_OPTION: Refusal = row("mounts[].options", MAPPED_IDS, Find::Spec(mapped_option));
/// A bind mount that is read-only for ever, and gets what the host mounts later.
pub const READ_ONLY_SLAVE: Refusal = row(
    "mounts[].options rro",
    "what the host mounts there later comes as the host has it, and can't be made read-only: \
     leave out rslave, or ask for ro",
    Find::Spec(|spec| {
        mounts(spec, |mount| {
            let found = last_of(mount, &["rslave", "slave"])?;
            let refused = is_bind(mount) && read_only(mount) == ReadOnly::All;
            refused.then(|| format!(".options rro with {found}"))
        })
    }),
);
/// A bind mount that is to be propagated to the host.
pub const SHARED_MOUNT: Refusal = row(
    "mounts[].options rshared",
    "mounts made in the guest can't be propagated to the host",
    Find::Elsewhere,
);
/// A bind mount from a file system of the host's kernel, or of a device.
pub const MOUNT_SOURCE: Refusal = row(
    "mounts[] with source",
    "its files act on the host's kernel, not on the guest's",
    Find::Elsewhere,
);
/// The host's own network.
pub const HOST_NETWORK: Refusal = row(
    "linux.namespaces of type network with path",
    "it is the host's own network (hostNetwork), which a guest can't be given",
    Find::Elsewhere,
);
/// A further container of a pod with another network.
pub const OTHER_NETWORK: Refusal = row(
    "linux.namespaces of type network",
    "a container of a pod shares the pod's network namespace",
    Find::Elsewhere,
);
/// A namespace of nobody in the pod.
pub const FOREIGN_NAMESPACE: Refusal = row(
    "linux.namespaces of type … with path",
    "it is not that of a container of this pod",
    Find::Elsewhere,
);
/// A namespace that the container to be joined does not have.
pub const JOINED_NAMESPACE: Refusal = row(
    "linux.namespaces[].path",
    "the container has no namespace of this kind",
    Find::Elsewhere,
);
/// Clocks of the pause container's own.
pub const PAUSE_CLOCKS: Refusal = row(
    "linux.namespaces",
    "a pod's placeholder can't have a time namespace of its own",
    Find::Elsewhere,
);
/// A device of the host.
pub const HOST_DEVICE: Refusal = row(
    "linux.devices[]",
    "only block devices of the host can be given to the guest, which has its own null, zero, full, random, \
     urandom, tty, console, ptmx, kmsg, net/tun, fuse and loop-control",
    Find::Elsewhere,
);
/// A disk that is read-only for the whole pod.
pub const DISK_FOR_WRITING: Refusal = row(
    "linux.devices[] for writing",
    "another container of the pod has it read-only",
    Find::Elsewhere,
);
/// A device rule that the filter can't express.
pub const DEVICE_RULE: Refusal = row(
    "linux.resources.devices[]",
    "can't take one device out of an earlier rule for many",
    Find::Elsewhere,
);
/// An update above the VM's memory.
pub const MEMORY_OF_THE_VM: Refusal = row(
    "linux.resources.memory.limit",
    "a running virtual machine can't be made larger",
    Find::Elsewhere,
);
/// An update above the VM's vCPUs.
pub const VCPUS: Refusal = row(
    "linux.resources.cpu.quota",
    "a running virtual machine can't be given more vCPUs",
    Find::Elsewhere,
);
/// A limit without a file in the guest's cgroups.
pub const MISSING_FILE: Refusal = row(
    "linux.resources",
    "the guest's kernel has no file for it",
    Find::Elsewhere,
);
/// A sysctl that would be the whole machine's.
pub const SYSCTL: Refusal = row(
    "linux.sysctl[]",
    "it is not in a kernel namespace of the container's own",
    Find::Elsewhere,
);
/// A scheduling policy that no kernel has.
pub const SCHED_ISO: Refusal = row(
    "process.scheduler.policy",
    "no kernel has SCHED_ISO",
    Find::Process(|process| {
        let iso =
            |it: &&oci_spec::runtime::Scheduler| *it.policy() == LinuxSchedulerPolicy::SchedIso;
        let found = process.scheduler().as_ref().filter(iso);
        found.map(|_| "process.scheduler.policy".into())
    }),
);
/// A filter that asks somebody else.
pub const NOTIFY_BY_DEFAULT: Refusal = row(
    "linux.seccomp.defaultAction",
    LISTENER,
    Find::Spec(|spec| {
        let found = seccomp(spec).map(LinuxSeccomp::default_action);
        (found == Some(LinuxSeccompAction::ScmpActNotify))
            .then(|| "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY".into())
    }),
);
/// A rule of a filter that asks somebody else.
pub const NOTIFY: Refusal = row(
    "linux.seccomp.syscalls[].action",
    LISTENER,
    Find::Spec(|spec| {
        let rules = seccomp(spec)?.syscalls().as_deref()?;
        let notify = |rule: &oci_spec::runtime::LinuxSyscall| {
            rule.action() == LinuxSeccompAction::ScmpActNotify
        };
        let index = rules.iter().position(notify)?;
        Some(format!(
            "linux.seccomp.syscalls[{index}].action: SCMP_ACT_NOTIFY"
        ))
    }),
);
/// A flag of filters that ask somebody else.
pub const SECCOMP_FLAG: Refusal = row(
    "linux.seccomp.flags",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is for notification",
    Find::Spec(|spec| {
        let flags = seccomp(spec)?.flags().as_ref()?;
        flags
            .contains(&LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv)
            .then(|| "linux.seccomp.flags".into())
    }),
);
/// A flag of the personality.
pub const PERSONALITY_FLAG: Refusal = row(
    "linux.personality.flags",
    "no flag is known",
    Find::Spec(|spec| {
        let personality = spec.linux().as_ref()?.personality().as_ref()?;
        some(personality.flags()).then(|| "linux.personality.flags".into())
    }),
);

/// Every field that is refused.
pub static TABLE: &[Refusal] = &[
    row(
        "windows",
        LINUX_ONLY,
        Find::Spec(|spec| present(spec.windows(), "windows")),
    ),
    row(
        "solaris",
        LINUX_ONLY,
        Find::Spec(|spec| present(spec.solaris(), "solaris")),
    ),
    row(
        "vm",
        LINUX_ONLY,
        Find::Spec(|spec| present(spec.vm(), "vm")),
    ),
    row(
        "zos",
        LINUX_ONLY,
        Find::Spec(|spec| present(spec.zos(), "zos")),
    ),
    row(
        "process.execCPUAffinity",
        "it numbers the host's CPUs",
        Find::Process(|it| present(it.exec_cpu_affinity(), "process.execCPUAffinity")),
    ),
    row(
        "process.commandLine",
        "it is for Windows",
        Find::Process(|it| present(it.command_line(), "process.commandLine")),
    ),
    SCHED_ISO,
    row(
        "linux.intelRdt",
        "the guest has no resource control of the host's caches",
        Find::Spec(|spec| present(spec.linux().as_ref()?.intel_rdt(), "linux.intelRdt")),
    ),
    row(
        "linux.memoryPolicy",
        "it numbers the host's nodes",
        Find::Spec(|spec| present(spec.linux().as_ref()?.memory_policy(), "linux.memoryPolicy")),
    ),
    row(
        "linux.netDevices",
        "devices of the host can't be moved into the guest",
        Find::Spec(|spec| {
            let devices = spec.linux().as_ref()?.net_devices().as_ref()?;
            (!devices.is_empty()).then(|| "linux.netDevices".into())
        }),
    ),
    row(
        "linux.seccomp.listenerPath",
        "a socket of the host can't be reached from the guest",
        Find::Spec(|spec| present(seccomp(spec)?.listener_path(), "linux.seccomp.listenerPath")),
    ),
    NOTIFY_BY_DEFAULT,
    NOTIFY,
    SECCOMP_FLAG,
    PERSONALITY_FLAG,
    row(
        NOT_LISTED,
        "the host's own namespace can't be given to a guest",
        Find::Spec(|spec| not_listed(spec, LinuxNamespaceType::Mount, "mount")),
    ),
    row(
        NOT_LISTED,
        "the host's own namespace can't be given to a guest (hostNetwork; with ctr, --cni in place of --net-host; \
         with BuildKit, networkMode = \"cni\")",
        Find::Spec(|spec| not_listed(spec, LinuxNamespaceType::Network, "network")),
    ),
    row(
        NOT_LISTED,
        "the host's own namespace can't be given to a guest (hostPID)",
        Find::Spec(|spec| not_listed(spec, LinuxNamespaceType::Pid, "pid")),
    ),
    row(
        NOT_LISTED,
        "the host's own namespace can't be given to a guest (hostIPC)",
        Find::Spec(|spec| not_listed(spec, LinuxNamespaceType::Ipc, "ipc")),
    ),
    row(
        NOT_LISTED,
        "the host's own namespace can't be given to a guest",
        Find::Spec(|spec| not_listed(spec, LinuxNamespaceType::Uts, "uts")),
    ),
    row(
        "mounts[].uidMappings",
        MAPPED_IDS,
        Find::Spec(|spec| {
            let mapped = |it: &Mount| it.uid_mappings().is_some() || it.gid_mappings().is_some();
            mounts(spec, |mount| mapped(mount).then(|| ".uidMappings".into()))
        }),
    ),
    MOUNT_TYPE,
    MAPPED_OPTION,
    READ_ONLY_SLAVE,
    SHARED_MOUNT,
    MOUNT_SOURCE,
    HOST_NETWORK,
    OTHER_NETWORK,
    FOREIGN_NAMESPACE,
    JOINED_NAMESPACE,
    PAUSE_CLOCKS,
    HOST_DEVICE,
    DISK_FOR_WRITING,
    row(
        "linux.resources.blockIO",
        NO_DISK,
        Find::Resources(|it| {
            let set = it.block_io().as_ref()? != &LinuxBlockIo::default();
            set.then(|| "linux.resources.blockIO".into())
        }),
    ),
    row(
        "linux.resources.network",
        NO_LIMIT,
        Find::Resources(|it| {
            let set = it.network().as_ref()? != &LinuxNetwork::default();
            set.then(|| "linux.resources.network".into())
        }),
    ),
    row(
        "linux.resources.rdma",
        NO_RDMA,
        Find::Resources(|it| {
            (!it.rdma().as_ref()?.is_empty()).then(|| "linux.resources.rdma".into())
        }),
    ),
    row(
        "linux.resources.cpu.realtimeRuntime",
        NO_LIMIT,
        Find::Resources(|it| {
            let cpu = it.cpu().as_ref()?;
            let set =
                cpu.realtime_runtime().unwrap_or(0) != 0 || cpu.realtime_period().unwrap_or(0) != 0;
            set.then(|| "linux.resources.cpu.realtimeRuntime".into())
        }),
    ),
    row(
        "linux.resources.memory.kernel",
        NO_LIMIT,
        Find::Resources(|it| {
            let limit = it.memory().as_ref()?.kernel()?;
            (limit > 0).then(|| "linux.resources.memory.kernel".into())
        }),
    ),
    row(
        "linux.resources.memory.kernelTCP",
        NO_LIMIT,
        Find::Resources(|it| {
            let limit = it.memory().as_ref()?.kernel_tcp()?;
            (limit > 0).then(|| "linux.resources.memory.kernelTCP".into())
        }),
    ),
    row(
        "linux.resources.memory.swappiness",
        NO_SETTING,
        Find::Resources(|it| {
            it.memory().as_ref()?.swappiness()?;
            Some("linux.resources.memory.swappiness".into())
        }),
    ),
    row(
        "linux.resources.memory.disableOOMKiller",
        NO_SETTING,
        Find::Resources(|it| {
            let set = it.memory().as_ref()?.disable_oom_killer() == Some(true);
            set.then(|| "linux.resources.memory.disableOOMKiller".into())
        }),
    ),
    row(
        UNIFIED,
        NO_DISK,
        Find::Resources(|it| unified(it, |name| name == "io")),
    ),
    row(
        UNIFIED,
        NO_RDMA,
        Find::Resources(|it| unified(it, |name| name == "rdma")),
    ),
    row(
        UNIFIED,
        "no controller of cgroup v2 has it",
        Find::Resources(|it| {
            let known = [
                "cpu", "cpuset", "hugetlb", "io", "memory", "misc", "pids", "rdma",
            ];
            unified(it, |name| !known.contains(&name))
        }),
    ),
    DEVICE_RULE,
    MEMORY_OF_THE_VM,
    VCPUS,
    MISSING_FILE,
    SYSCTL,
];

const fn row(field: &'static str, why: &'static str, find: Find) -> Refusal {
    Refusal { field, why, find }
}

fn present<T>(value: &Option<T>, field: &str) -> Option<String> {
    value.as_ref().map(|_| field.to_owned())
}

fn some<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

fn seccomp(spec: &Spec) -> Option<&LinuxSeccomp> {
    spec.linux().as_ref()?.seccomp().as_ref()
}

/// Without an entry the host's namespace is meant.
fn not_listed(spec: &Spec, kind: LinuxNamespaceType, name: &str) -> Option<String> {
    let listed = spec.linux().as_ref()?.namespaces().iter().flatten();
    let missing = !listed.into_iter().any(|it| it.typ() == kind);
    missing.then(|| format!("{NOT_LISTED} {name}"))
}

/// The first mount of which `find` says what is wrong with it.
fn mounts(spec: &Spec, find: impl Fn(&Mount) -> Option<String>) -> Option<String> {
    let mut all = spec.mounts().iter().flatten().enumerate();
    all.find_map(|(index, mount)| Some(mount_field(index, mount) + &find(mount)?))
}

/// An entry of `mounts`, as errors name it.
pub fn mount_field(index: usize, mount: &Mount) -> String {
    format!("mounts[{index}] ({})", mount.destination().display())
}

/// Whether it is a bind mount. As under runc the options decide, whatever the type says.
pub fn is_bind(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind") || options.any(|it| it == "bind" || it == "rbind")
}

/// How much of a bind mount is read-only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing but what the host has made so.
    #[default]
    No,
    /// The mount itself, and not those below it: `ro`.
    Top,
    /// The mount and all below it: `rro`.
    All,
}

/// How much of a bind mount its options make read-only. Of contrary options the last one counts,
/// and those for all mounts come after those for the top, as under runc.
pub fn read_only(mount: &Mount) -> ReadOnly {
    let top = last_of(mount, &["ro", "rw"]);
    match (last_of(mount, &["rro", "rrw"]), top) {
        (Some("rro"), _) => ReadOnly::All,
        (None, Some("ro")) => ReadOnly::Top,
        _ => ReadOnly::No,
    }
}

fn last_of<'a>(mount: &'a Mount, wanted: &[&str]) -> Option<&'a str> {
    let options = mount.options().as_deref().unwrap_or_default();
    let mut options = options.iter().map(String::as_str);
    options.rfind(|option| wanted.contains(option))
}

fn mount_type(spec: &Spec) -> Option<String> {
    mounts(spec, |mount| {
        let kind = mount.typ().as_deref().unwrap_or_default();
        let made = is_bind(mount) || OF_THE_GUEST.contains(&kind);
        (!made).then(|| format!(".type {kind:?}"))
    })
}

fn mapped_option(spec: &Spec) -> Option<String> {
    mounts(spec, |mount| {
        let mut options = mount.options().iter().flatten();
        let found = options.find(|it| matches!(it.as_str(), "idmap" | "ridmap"))?;
        Some(format!(".options: {found:?}"))
    })
}

/// The first file of `unified`, by its name, whose controller `refused` knows. What is no file's
/// name is another error.
fn unified(resources: &LinuxResources, refused: impl Fn(&str) -> bool) -> Option<String> {
    let mut files: Vec<_> = resources.unified().as_ref()?.keys().collect();
    files.sort();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_');
    let found = files.into_iter().find(|file| {
        let (controller, rest) = file.split_once('.').unwrap_or((file, ""));
        !rest.is_empty() && rest.bytes().all(plain) && refused(controller)
    });
    found.map(|file| format!("linux.resources.unified[{file}]"))
}
