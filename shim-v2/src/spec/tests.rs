//! Specs as containerd writes them, each with one thing changed.

use kata_like_agent_protocol::agent::{bind, join::Whose};
use kata_like_failure::Kind;

use kata_like_spec::ReadOnly;

use super::size::{LEAST, MIB, SANDBOX_MEMORY, SANDBOX_PERIOD, SANDBOX_QUOTA};
use super::*;
use crate::file_systems;

/// What `ctr run` writes, shortened.
const PLAIN: &str = r#"{"ociVersion":"1.2.0","process":{"user":{"uid":0,"gid":0},"args":["sh"],
  "cwd":"/","apparmorProfile":"x","selinuxLabel":"y"},
  "root":{"path":"rootfs"},
  "mounts":[{"destination":"/proc","type":"proc","source":"proc"},
            {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["size=65536k"]}],
  "linux":{"cgroupsPath":"/default/a","mountLabel":"z",
    "namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"}]}}"#;

fn edited(edit: impl FnOnce(&mut serde_json::Value)) -> Spec {
    let mut value = serde_json::from_str(PLAIN).unwrap();
    edit(&mut value);
    serde_json::from_value(value).unwrap()
}

fn try_split(edit: impl FnOnce(&mut serde_json::Value)) -> Result<Split, Failure> {
    let mut owners = Owners::default();
    owners.tasks.insert(42, "sandbox".to_owned());
    let halves = split(edited(edit), Path::new("/bundle"), &owners)?;
    let found = halves.binds.iter().zip(1..).map(found).collect();
    halves.with(found)
}

/// What lies at a source, as far as these tests go.
fn found((bind, number): (&Bind, usize)) -> Source {
    let source = &bind.volume.source;
    if bind.shared_memory && source.starts_with("/run") {
        return Source::Memory(memory());
    }
    if (source.starts_with("/proc") || source.ends_with("cgroup"))
        && let Some(found) = file_systems::of_path(source).unwrap()
    {
        return Source::Kernel(found);
    }
    Source::Volume(format!("volume-{number}"))
}

fn memory() -> agent::MemoryVolume {
    agent::MemoryVolume {
        name: "memory-1".into(),
        size_bytes: 64 << 20,
        mode: 0o1777,
        ..Default::default()
    }
}

/// The spec in the guest's part.
fn guest(split: &Split) -> serde_json::Value {
    serde_json::from_slice(&split.guest.spec).unwrap()
}

fn refused(edit: impl FnOnce(&mut serde_json::Value)) -> String {
    let error = try_split(edit).unwrap_err();
    assert!(
        matches!(error.kind(), Kind::Unsupported | Kind::BadRequest),
        "{error}"
    );
    error.one_line()
}

#[test]
fn a_plain_container_is_split() {
    let split = try_split(|_| {}).unwrap();
    assert_eq!(split.host.cgroups_path.as_deref(), Some("/default/a"));
    assert_eq!(split.host.network, NetworkPart::New);
    assert_eq!(
        split.host.root.as_deref(),
        Some(Path::new("/bundle/rootfs"))
    );
    assert!(split.host.volumes.is_empty());
    let labels = &split.host.labels;
    assert_eq!(labels.process.as_deref(), Some("y"));
    assert_eq!(labels.file.as_deref(), Some("z"));
    let unlabelled = try_split(|spec| spec["process"]["selinuxLabel"] = "".into()).unwrap();
    assert_eq!(unlabelled.host.labels.process, None);
    let guest = String::from_utf8(split.guest.spec).unwrap();
    for word in [
        "/default/a",
        "apparmorProfile",
        "selinuxLabel",
        "mountLabel",
    ] {
        assert!(!guest.contains(word), "{word} in {guest}");
    }
}

#[test]
fn a_cri_container_joins_its_sandbox() {
    let split = try_split(|spec| {
        let namespaces = &mut spec["linux"]["namespaces"];
        let users = serde_json::json!({"type": "user"});
        namespaces.as_array_mut().unwrap().push(users);
        for (index, kind) in [(1, "ipc"), (2, "uts"), (3, "mnt"), (4, "net"), (5, "user")] {
            namespaces[index]["path"] = format!("/proc/42/ns/{kind}").into();
        }
    })
    .unwrap();
    assert_eq!(split.host.network, NetworkPart::Pod);
    let own = guest(&split);
    for index in 0..6 {
        let namespace = &own["linux"]["namespaces"][index];
        assert!(namespace.get("path").is_none(), "{namespace}");
    }
    let joins = split.guest.joins.iter();
    let joined: Vec<_> = joins.map(|join| (join.namespace, &join.whose)).collect();
    let whose = Some(Whose::Container("sandbox".into()));
    assert_eq!(joined, [1, 2, 3, 4, 5].map(|index| (index, &whose)));
}

#[test]
fn a_foreign_or_missing_namespace_is_refused() {
    // That of no container of this pod, and that of another kind.
    for (index, kind, path) in [
        (1, "ipc", "/proc/7/ns/ipc"),
        (3, "mount", "/proc/7/ns/mnt"),
        (3, "mount", "/proc/42/ns/ipc"),
    ] {
        let line = refused(|spec| spec["linux"]["namespaces"][index]["path"] = path.into());
        let text = format!("linux.namespaces of type {kind} with path {path}");
        assert!(line.contains(&text), "{line}");
    }
    let line = refused(|spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().pop();
    });
    assert!(line.contains("without an entry of type network"), "{line}");
    let path = try_split(|spec| spec["linux"]["namespaces"][4]["path"] = "/run/netns/x".into());
    let split = path.unwrap();
    assert_eq!(split.host.network, NetworkPart::Path("/run/netns/x".into()));
    // In the guest that is the guest's own, and no new one.
    let [join] = split.guest.joins.as_slice() else {
        panic!("{:?}", split.guest.joins);
    };
    assert_eq!(join.namespace, 4);
    assert!(matches!(join.whose, Some(Whose::Guest(_))));
    assert!(!String::from_utf8_lossy(&split.guest.spec).contains("/run/netns"));
}

#[test]
fn a_spec_without_a_process_is_refused_for_that() {
    let line = refused(|spec| {
        spec["linux"]["namespaces"] = serde_json::json!([{"type": "mount"}]);
        spec.as_object_mut().unwrap().remove("process");
    });
    assert_eq!(line, "process property must not be empty");
}

#[test]
fn bind_mounts_become_volumes() {
    let split = try_split(|spec| {
        spec["mounts"] = serde_json::json!([
            {"destination": "/etc/hosts", "type": "bind", "source": "/host/hosts", "options": ["rbind", "ro"]},
            {"destination": "/data", "type": "none", "source": "data", "options": ["bind", "ro", "rw"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/shm", "options": ["rbind", "ro"]},
            {"destination": "/dev/shm/", "type": "bind", "source": "/run/shm", "options": ["rbind"]},
        ]);
    })
    .unwrap();
    let [hosts, data] = split.host.volumes.as_slice() else {
        panic!("{:?}", split.host.volumes);
    };
    assert_eq!(hosts.source, Path::new("/host/hosts"));
    assert!(hosts.read_only == ReadOnly::Top && hosts.recursive);
    assert_eq!(data.source, Path::new("/bundle/data"));
    assert!(data.read_only == ReadOnly::No && !data.recursive);
    let text = String::from_utf8_lossy(&split.guest.spec);
    assert!(
        !text.contains("/host/") && !text.contains("/run/shm"),
        "{text}"
    );
    let guest = guest(&split);
    let mounts = guest["mounts"].as_array().unwrap();
    assert!(mounts.iter().all(|mount| mount["type"] == "bind"));
    assert_eq!(mounts[2]["options"], serde_json::json!(["rbind", "ro"]));
    let volume = |name: &str| Some(bind::Source::Volume(name.into()));
    let memory = || Some(bind::Source::Memory(memory()));
    let binds = split.guest.binds.into_iter();
    let sources: Vec<_> = binds.map(|bind| (bind.mount, bind.source)).collect();
    let wanted = [
        (0, volume("volume-1")),
        (1, volume("volume-2")),
        (2, memory()),
        (3, memory()),
    ];
    assert_eq!(sources, wanted);
    assert_eq!(
        (hosts.name.as_str(), data.name.as_str()),
        ("volume-1", "volume-2")
    );
}

/// A directory that is no memory of the host's is a volume, there too.
#[test]
fn shared_memory_from_a_disk_stays_a_volume() {
    let split = try_split(|spec| {
        spec["mounts"] = serde_json::json!([
            {"destination": "/dev/shm", "type": "bind", "source": "/var/shm", "options": ["rbind"]},
        ]);
    })
    .unwrap();
    assert_eq!(split.host.volumes.len(), 1);
    let source = &split.guest.binds[0].source;
    assert!(matches!(source, Some(bind::Source::Volume(_))));
}

/// What is the host kernel's is refused by its field. A whole cgroup file system is meant as the
/// guest's own.
#[test]
fn file_systems_of_the_host_s_kernel_are_no_volumes() {
    let bind = |source: &str| {
        let source = source.to_owned();
        try_split(move |spec| {
            spec["mounts"] = serde_json::json!([{"destination": "/x", "type": "none", "source": source,
                "options": ["rbind", "rslave", "ro"]}]);
        })
    };
    let line = bind("/proc/self/status").unwrap_err().one_line();
    let wanted = "mounts[0] (/x) with source /proc/self/status of type proc is not supported: ";
    assert!(line.starts_with(wanted), "{line}");
    let all = file_systems::mount_table::read().unwrap();
    let mut all = all.iter();
    let Some(cgroup) = all.find(|mount| mount.kind == "cgroup2" && mount.path.ends_with("cgroup"))
    else {
        return; // a machine without it
    };
    let split = bind(cgroup.path.to_str().unwrap()).unwrap();
    assert!(split.host.volumes.is_empty() && split.guest.binds.is_empty());
    let guest = guest(&split);
    let wanted = serde_json::json!({"destination": "/x", "type": "cgroup", "source": "cgroup",
        "options": ["rslave", "ro"]});
    assert_eq!(guest["mounts"][0], wanted);
}

#[test]
fn hooks_of_the_host_are_taken_out_and_the_guest_s_stay() {
    let split = try_split(|spec| {
        spec["annotations"] = serde_json::json!({"a": "b"});
        spec["hooks"] = serde_json::json!({
            "prestart": [{"path": "/pre", "args": ["pre", "x"], "env": ["A=b"], "timeout": 3}],
            "createRuntime": [{"path": "/create"}],
            "startContainer": [{"path": "/inside"}],
            "poststart": [{"path": "/post"}],
            "poststop": [{"path": "/stop"}],
        });
    })
    .unwrap();
    let hooks = &split.host.hooks;
    let prestart = HostHook {
        path: "/pre".into(),
        arguments: vec!["pre".into(), "x".into()],
        environment: Some(vec!["A=b".into()]),
        timeout: Some(std::time::Duration::from_secs(3)),
    };
    assert_eq!(hooks.prestart, [prestart]);
    let [create] = hooks.create_runtime.as_slice() else {
        panic!("{hooks:?}");
    };
    assert_eq!(create.arguments, ["/create"]);
    assert_eq!((&create.environment, create.timeout), (&None, None));
    assert_eq!((hooks.poststart.len(), hooks.poststop.len()), (1, 1));
    assert_eq!(hooks.version, "1.2.0");
    assert_eq!(hooks.annotations["a"], "b");
    let guest = guest(&split);
    let left: Vec<_> = guest["hooks"].as_object().unwrap().keys().collect();
    assert_eq!(left, ["startContainer"]);
}

fn rule(device: &str, access: &str) -> serde_json::Value {
    let (kind, numbers) = device.split_once(' ').unwrap();
    let (major, minor) = numbers.split_once(':').unwrap();
    let mut rule = serde_json::json!({"allow": true, "type": kind, "access": access});
    for (name, number) in [("major", major), ("minor", minor)] {
        if let Ok(number) = number.parse::<i64>() {
            rule[name] = number.into();
        }
    }
    rule
}

#[test]
fn a_block_device_becomes_a_disk_as_its_rules_say() {
    let disks = |rules: Vec<serde_json::Value>| {
        let mut all = vec![serde_json::json!({"allow": false, "access": "rwm"})];
        all.extend(rules);
        let split = try_split(|spec| {
            spec["linux"]["devices"] = serde_json::json!([
                {"path": "/dev/sdb", "type": "b", "major": 8, "minor": 16},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            ]);
            spec["linux"]["resources"] = serde_json::json!({"devices": all});
        })
        .unwrap();
        let guest = guest(&split);
        assert_eq!(guest["linux"]["devices"].as_array().unwrap().len(), 2);
        split.host.disks
    };
    let found = disks(vec![rule("b 8:16", "rwm")]);
    let [disk] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!((disk.major, disk.minor, disk.read_only), (8, 16, false));
    assert_eq!(disk.field, "linux.devices[0] (/dev/sdb)");
    for (rules, read_only) in [
        (vec![rule("b 8:16", "r")], true),
        (vec![], true),
        (vec![rule("b 8:*", "rw")], false),
        (vec![rule("b 8:17", "rw"), rule("c 8:16", "rw")], true),
        (vec![rule("a *:*", "rwm")], false),
    ] {
        assert_eq!(disks(rules.clone())[0].read_only, read_only, "{rules:?}");
    }
}

#[test]
fn a_privileged_container_goes_without_the_host_s_devices() {
    let with = |count: u32, access: &str| {
        let mut devices = vec![
            serde_json::json!({"path": "/dev/full", "type": "c", "major": 1, "minor": 7}),
            serde_json::json!({"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}),
            serde_json::json!({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}),
        ];
        devices.extend((0..count).map(|minor| {
            serde_json::json!({"path": format!("/dev/tty{minor}"), "type": "c", "major": 4, "minor": minor})
        }));
        try_split(|spec| {
            spec["linux"]["devices"] = devices.into();
            spec["linux"]["resources"] = serde_json::json!({"devices": [rule("a *:*", access)]});
        })
    };
    let split = with(20, "rwm").unwrap();
    assert_eq!(split.host.left_out.len(), 22);
    assert!(split.host.disks.is_empty());
    let guest = guest(&split);
    assert_eq!(guest["linux"]["devices"].as_array().unwrap().len(), 1);
    for refused in [with(20, "r"), with(0, "rwm")] {
        let line = refused.unwrap_err().one_line();
        assert!(
            line.starts_with("linux.devices[1] (/dev/kvm) is not"),
            "{line}"
        );
    }
}

#[test]
fn what_is_not_done_is_refused_by_its_field() {
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit); 8] = [
        ("hooks.prestart[0].path: \"x\" is not absolute", |s| {
            s["hooks"]["prestart"] = serde_json::json!([{"path": "x"}])
        }),
        ("hooks.poststop[0].timeout: 0 is not", |s| {
            s["hooks"]["poststop"] = serde_json::json!([{"path": "/x", "timeout": 0}])
        }),
        ("linux.intelRdt", |s| {
            s["linux"]["intelRdt"] = serde_json::json!({})
        }),
        ("linux.devices[0] (/dev/rtc0)", |s| {
            s["linux"]["devices"] =
                serde_json::json!([{"path": "/dev/rtc0", "type": "c", "major": 251, "minor": 0}]);
        }),
        ("mounts[0] (/proc).type \"ext4\"", |s| {
            s["mounts"][0]["type"] = "ext4".into()
        }),
        ("mounts[0] (/proc).options rshared", |s| {
            s["mounts"][0]["options"] = serde_json::json!(["rbind", "rshared"]);
        }),
        ("mounts[0] (/x) is a bind mount without a source", |s| {
            s["mounts"] = serde_json::json!([{"destination": "/x", "type": "bind"}]);
        }),
        ("linux.seccomp.listenerPath", |s| {
            s["linux"]["seccomp"] = serde_json::json!(
                {"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/run/x.sock"});
        }),
    ];
    for (field, edit) in cases {
        let line = refused(edit);
        assert!(line.starts_with(field), "{line}");
    }
    // Hooks that run in the guest, and devices of every kernel, pass.
    try_split(|s| s["hooks"]["startContainer"] = serde_json::json!([{"path": "/x"}])).unwrap();
    try_split(|s| {
        s["linux"]["devices"] =
            serde_json::json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
    })
    .unwrap();
}

#[test]
fn a_file_that_is_no_spec_is_named_with_the_place() {
    let bundle = tempfile::tempdir().unwrap();
    let line = read(bundle.path()).unwrap_err().one_line();
    assert!(
        line.ends_with("config.json: No such file or directory (os error 2)"),
        "{line}"
    );
    let file = bundle.path().join(FILE);
    std::fs::write(&file, "{\n \"linux\": 7 }").unwrap();
    let error = read(bundle.path()).unwrap_err();
    assert!(
        error.one_line().ends_with("at line 2 column 11"),
        "{}",
        error.one_line()
    );
    assert!(error.one_line().contains(&file.display().to_string()));
    std::fs::write(&file, vec![b' '; MAX_LENGTH as usize + 1]).unwrap();
    let line = read(bundle.path()).unwrap_err().one_line();
    assert!(line.ends_with("longer than 4194304 bytes"), "{line}");
}

#[test]
fn the_vm_follows_the_limits() {
    let gib = 1 << 30;
    let none = SizePart::default();
    let bytes = |part: SizePart, default, host| part.memory(default, host).unwrap().bytes;
    assert_eq!(bytes(none, 2 * gib, 16 * gib), 2 * gib);
    assert_eq!(bytes(none, 64 * MIB, 16 * gib), 64 * MIB);
    let line = none.memory(4 * gib, 3 * gib).unwrap_err().one_line();
    assert_eq!(
        line,
        "`memory_mib` of the configuration: 4096 MiB is more than this host has, 3072 MiB"
    );
    assert_eq!(none.vcpus(2, 8), 2);
    let limited = |memory| SizePart {
        memory: Some((memory, SANDBOX_MEMORY)),
        ..SizePart::default()
    };
    assert_eq!(bytes(limited(1), gib, 16 * gib), LEAST);
    assert_eq!(bytes(limited(gib), gib, 16 * gib), gib + 144 * MIB);
    assert_eq!(bytes(limited(u64::MAX), gib, 3 * gib + 5), 3 * gib);
    let size = limited(1).memory(gib, 16 * gib).unwrap();
    assert_eq!(
        size.to_string(),
        "the pod's virtual machine has 256 MiB, sized by io.kubernetes.cri.sandbox-memory"
    );
    let odd = bytes(limited(300 * MIB + 1), gib, 16 * gib);
    assert!(odd % (2 * MIB) == 0 && odd > 428 * MIB, "{odd}");
    let quota = |cpu| SizePart {
        cpu: Some(cpu),
        ..SizePart::default()
    };
    let with_huge_pages = SizePart {
        huge_pages: 64 * MIB,
        ..limited(gib)
    };
    assert_eq!(bytes(with_huge_pages, gib, 16 * gib), gib + 210 * MIB);
    assert_eq!(quota((150_000, 100_000)).vcpus(4, 8), 2);
    assert_eq!(quota((1, 100_000)).vcpus(4, 8), 1);
    assert_eq!(quota((9_000_000, 100_000)).vcpus(4, 8), 8);
    assert_eq!(quota((5, 0)).vcpus(4, 8), 4);
}

#[test]
fn the_pod_s_sums_go_before_the_container_s_own_limit() {
    let split = try_split(|s| {
        s["linux"]["resources"] = serde_json::json!({"memory": {"limit": 5}, "cpu": {"quota": 7},
            "hugepageLimits": [{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 4096}]});
        s["annotations"] = serde_json::json!({SANDBOX_MEMORY: "1000", SANDBOX_QUOTA: "0"});
    })
    .unwrap();
    assert_eq!(
        split.host.size,
        SizePart {
            memory: Some((1000, SANDBOX_MEMORY)),
            huge_pages: 4096,
            cpu: Some((7, 100_000))
        }
    );
    let line = refused(|s| s["annotations"] = serde_json::json!({SANDBOX_MEMORY: "1G"}));
    assert!(line.contains("\"1G\" is not a number"), "{line}");
    for (key, number) in [
        (SANDBOX_MEMORY, "-1"),
        (SANDBOX_PERIOD, "999"),
        (SANDBOX_PERIOD, "1000001"),
        (SANDBOX_PERIOD, "-5"),
        (SANDBOX_QUOTA, "many"),
    ] {
        let line = refused(|s| s["annotations"] = serde_json::json!({key: number}));
        assert!(line.starts_with(&format!("annotation {key}: ")), "{line}");
    }
    let pod = try_split(|s| {
        s["annotations"] = serde_json::json!({SANDBOX_QUOTA: "150000", SANDBOX_PERIOD: "50000"});
    });
    assert_eq!(pod.unwrap().host.size.cpu, Some((150_000, 50_000)));
    let unlimited = try_split(|s| {
        s["annotations"] = serde_json::json!({SANDBOX_QUOTA: "-1", SANDBOX_MEMORY: "0"});
    });
    assert_eq!(unlimited.unwrap().host.size, SizePart::default());
}
