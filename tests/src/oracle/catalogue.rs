//! The specs: one for each field of the OCI runtime spec or option of `ctr`, and difficult
//! combinations.

use std::path::Path;

use serde_json::{Value, json};

use super::Kind::InPod;
use super::{Case, Kind, Spec};
use crate::rootfs::join_namespace;

mod files;
mod linux;
mod mounts;
mod process;

/// The cases by topic.
const GROUPS: [(&str, &[Case]); 4] = [
    ("process", process::CASES),
    ("mounts", mounts::CASES),
    ("files", files::CASES),
    ("linux", linux::CASES),
];

/// All cases, or those selected by a part of `GROUP: NAME`.
pub fn cases() -> Vec<&'static Case> {
    let only = std::env::var(super::ONLY).unwrap_or_default();
    let wanted = |group: &str, name: &str| {
        let name = format!("{group}: {name}");
        only.split(';').any(|part| name.contains(part))
    };
    let of = |(group, cases): &(&str, &'static [Case])| -> Vec<&'static Case> {
        cases
            .iter()
            .filter(|case| wanted(group, case.name))
            .collect()
    };
    GROUPS.iter().flat_map(of).collect()
}

/// Ten that also run under containerd 1.7.
pub const TEN: [&str; 10] = [
    "containerd's default",
    "terminal",
    "exec",
    "user, capabilities, no_new_privs and a filter",
    "limits",
    "read-only root, tmpfs and volumes",
    "a volume, read-only with all below",
    "masked and read-only paths of its own",
    "limits of memory, pids and cpu",
    "a device outside of /dev",
];

/// The refused cases, and the words of the error that name the field.
pub const REFUSED: [(&str, Case); 13] = [
    (
        "make device /dev/zero: another file is in its place",
        case("a file in the place of a device", InPod, |spec| {
            for mount in ["/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"] {
                spec.without_mount(mount);
            }
            let _ = std::fs::write(spec.root.join("dev/zero"), "not a device");
        }),
    ),
    (
        "mount bind on /data/../../../opt: make the mount point",
        case("a volume over the root's parent", InPod, |spec| {
            spec.volume("", "/data/../../../opt", &["rbind"]);
        }),
    ),
    (
        "CAP_OF_TOMORROW",
        case("a capability that is not known", InPod, |spec| {
            spec.capabilities(&["CAP_CHOWN", "CAP_OF_TOMORROW"]);
        }),
    ),
    (
        "mount bind on /srv: make the mount point",
        case("a volume on a link to a magic link", InPod, |spec| {
            spec.plant("srv", "/proc/self/root/opt");
            spec.volume("", "/srv", &["rbind"]);
        }),
    ),
    (
        "process.execCPUAffinity",
        case("affinity of execs", InPod, |spec| {
            spec.process("execCPUAffinity", json!({"initial": "0", "final": "0"}));
        }),
    ),
    (
        "uidMappings",
        case("a mount with mapped ids", InPod, |spec| {
            spec.volume("", "/data", &["rbind"]);
            if let Some(mount) = spec.json["mounts"]
                .as_array_mut()
                .and_then(|all| all.last_mut())
            {
                mount["uidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
                mount["gidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
            }
        }),
    ),
    (
        "options: \"idmap\"",
        case("a mount mapped as the container", InPod, |spec| {
            spec.volume("", "/data", &["rbind", "idmap"]);
        }),
    ),
    (
        "linux.namespaces",
        case("a user namespace of another", InPod, |spec| {
            if let Some(list) = spec.json["linux"]["namespaces"].as_array_mut() {
                list.push(json!({"type": "user", "path": "/proc/POD/ns/user"}));
            }
        }),
    ),
    (
        "linux.resources.blockIO",
        case("weight of input and output", InPod, |spec| {
            spec.resource("blockIO", json!({"weight": 100}));
        }),
    ),
    (
        "linux.resources.rdma",
        case("limits of rdma", InPod, |spec| {
            spec.resource("rdma", json!({"mlx5_0": {"hcaHandles": 1}}));
        }),
    ),
    (
        "linux.intelRdt",
        case("caches", InPod, |spec| {
            spec.linux("intelRdt", json!({"closID": "x"}))
        }),
    ),
    (
        "linux.seccomp",
        case("a filter that asks", InPod, |spec| {
            let listed = json!([{"names": ["chroot"], "action": "SCMP_ACT_NOTIFY"}]);
            spec.linux(
                "seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": listed}),
            );
        }),
    ),
    (
        "linux.devices[0]",
        case("a device of the host", InPod, |spec| {
            spec.linux(
                "devices",
                json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]),
            );
        }),
    ),
];

const fn case(name: &'static str, kind: Kind, change: fn(&mut Spec)) -> Case {
    Case { name, kind, change }
}

const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

impl Spec {
    /// `process.NAME`.
    fn process(&mut self, name: &str, value: Value) {
        self.json["process"][name] = value;
    }

    /// `linux.NAME`.
    fn linux(&mut self, name: &str, value: Value) {
        self.json["linux"][name] = value;
    }

    /// `linux.resources.NAME`.
    fn resource(&mut self, name: &str, value: Value) {
        self.json["linux"]["resources"][name] = value;
    }

    /// The same list in three of the sets, as containerd does it, and none in the others.
    fn capabilities(&mut self, list: &[&str]) {
        let sets = json!({"bounding": list, "effective": list, "permitted": list});
        self.process("capabilities", sets);
    }

    fn user(&mut self, uid: u32) {
        self.process(
            "user",
            json!({"uid": uid, "gid": uid, "additionalGids": [900]}),
        );
    }

    /// A further mount.
    fn mount(&mut self, kind: &str, source: &Path, destination: &str, options: &[&str]) {
        if let Some(mounts) = self.json["mounts"].as_array_mut() {
            mounts.push(json!({
                "destination": destination, "type": kind, "source": source, "options": options,
            }));
        }
    }

    /// The volume, or a part of it.
    fn volume(&mut self, inside: &str, destination: &str, options: &[&str]) {
        let source = match inside {
            "" => self.volume.clone(),
            inside => self.volume.join(inside),
        };
        self.mount("bind", &source, destination, options);
    }

    fn tmpfs(&mut self, destination: &str, options: &[&str]) {
        self.mount("tmpfs", Path::new("tmpfs"), destination, options);
    }

    /// Other options for one of the default mounts.
    fn options(&mut self, destination: &str, options: &[&str]) {
        for mount in self.json["mounts"].as_array_mut().into_iter().flatten() {
            if mount["destination"] == destination {
                mount["options"] = json!(options);
            }
        }
    }

    fn without_mount(&mut self, destination: &str) {
        if let Some(mounts) = self.json["mounts"].as_array_mut() {
            mounts.retain(|mount| mount["destination"] != destination);
        }
    }

    fn without_namespace(&mut self, kind: &str) {
        if let Some(namespaces) = self.json["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != kind);
        }
    }

    /// Joins the namespace of the pod's first process.
    fn of_pod(&mut self, kind: &str, file: &str) {
        join_namespace(&mut self.json, kind, &format!("/proc/POD/ns/{file}"));
    }

    /// A hook that stores what it sees.
    fn hook(&mut self, list: &str) {
        let file = format!("/tmp/hook-{list}");
        self.json["hooks"][list] = json!([{
            "path": "/probe", "args": ["probe", "hook", file], "env": ["A=of the hook"], "timeout": 20,
        }]);
    }

    /// An executable file of the image.
    fn program(&mut self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.root.join(name);
        let mode = std::fs::Permissions::from_mode(0o755);
        let made = std::fs::write(&path, text);
        if let Err(error) = made.and_then(|()| std::fs::set_permissions(&path, mode)) {
            panic!("make {}: {error}", path.display());
        }
    }

    /// A symlink of the image, in place of what is there.
    fn plant(&mut self, name: &str, target: &str) {
        let path = self.root.join(name);
        let _ = std::fs::remove_dir_all(&path);
        let _ = std::fs::remove_file(&path);
        if let Err(error) = std::os::unix::fs::symlink(target, &path) {
            panic!("plant {}: {error}", path.display());
        }
    }
}

/// The first number, outside a user namespace, of the users in it.
const FIRST_ID: u32 = 100_000;

impl Spec {
    /// A user namespace, and a root whose files are its users'.
    fn in_user_namespace(&mut self) {
        let mapping = json!([{"containerID": 0, "hostID": FIRST_ID, "size": 65536}]);
        self.linux("uidMappings", mapping.clone());
        self.linux("gidMappings", mapping);
        if let Some(list) = self.json["linux"]["namespaces"].as_array_mut() {
            list.push(json!({"type": "user"}));
        }
        for path in [self.root.clone(), self.volume.clone()] {
            give(&path);
        }
    }

    /// Mounts the cgroup, so that the probe reads its limits.
    fn see_cgroup(&mut self) {
        let options = ["ro", "nosuid", "noexec", "nodev"];
        self.mount("cgroup", Path::new("cgroup"), "/sys/fs/cgroup", &options);
    }
}

/// Gives a tree of files to the first user of the namespace.
fn give(path: &Path) {
    if std::os::unix::fs::lchown(path, Some(FIRST_ID), Some(FIRST_ID)).is_err() {
        panic!("give {} away", path.display());
    }
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        give(&entry.path());
    }
}
