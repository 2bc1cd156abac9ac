//! Specs as containerd writes them, each with one thing changed.

use super::size::{LEAST, MIB, SANDBOX_MEMORY, SANDBOX_QUOTA};
use super::*;
use crate::error::SandboxErrorKind;

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

fn try_split(edit: impl FnOnce(&mut serde_json::Value)) -> Result<Split, SandboxError> {
    let mut number = 0;
    let pod = Pod {
        task_of: &|pid| (pid == 42).then(|| "sandbox".to_owned()),
        volume_name: &mut || {
            number += 1;
            format!("volume-{number}")
        },
    };
    split(edited(edit), Path::new("/bundle"), pod)
}

fn refused(edit: impl FnOnce(&mut serde_json::Value)) -> String {
    let error = try_split(edit).unwrap_err();
    assert!(
        matches!(
            error.kind(),
            SandboxErrorKind::Unsupported | SandboxErrorKind::BadRequest
        ),
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
    let guest = String::from_utf8(split.guest).unwrap();
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
        for (index, kind) in [(1, "ipc"), (2, "uts"), (4, "net")] {
            namespaces[index]["path"] = format!("/proc/42/ns/{kind}").into();
        }
    })
    .unwrap();
    assert_eq!(split.host.network, NetworkPart::Pod);
    let guest: serde_json::Value = serde_json::from_slice(&split.guest).unwrap();
    let namespaces = &guest["linux"]["namespaces"];
    assert_eq!(namespaces[1]["path"], "container:sandbox");
    assert_eq!(namespaces[2]["path"], "container:sandbox");
    assert!(namespaces[4].get("path").is_none());
}

#[test]
fn a_foreign_or_missing_namespace_is_refused() {
    let line = refused(|spec| spec["linux"]["namespaces"][1]["path"] = "/proc/7/ns/ipc".into());
    assert!(line.contains("type ipc with path /proc/7/ns/ipc"), "{line}");
    let line = refused(|spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().pop();
    });
    assert!(line.contains("without an entry of type network"), "{line}");
    let path = try_split(|spec| spec["linux"]["namespaces"][4]["path"] = "/run/netns/x".into());
    let network = path.unwrap().host.network;
    assert_eq!(network, NetworkPart::Path("/run/netns/x".into()));
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
        ]);
    })
    .unwrap();
    let [hosts, data] = split.host.volumes.as_slice() else {
        panic!("{:?}", split.host.volumes);
    };
    assert_eq!(hosts.source, Path::new("/host/hosts"));
    assert!(hosts.read_only && hosts.recursive);
    assert_eq!(data.source, Path::new("/bundle/data"));
    assert!(!data.read_only && !data.recursive);
    let guest = String::from_utf8(split.guest).unwrap();
    assert!(
        !guest.contains("/host/") && !guest.contains("/run/shm"),
        "{guest}"
    );
    let guest: serde_json::Value = serde_json::from_str(&guest).unwrap();
    assert_eq!(guest["mounts"][0]["source"], "volume:volume-1");
    assert_eq!(guest["mounts"][1]["source"], "volume:volume-2");
    assert_eq!(guest["mounts"][2]["type"], "tmpfs");
    let options = guest["mounts"][2]["options"].as_array().unwrap();
    assert!(options.contains(&"size=65536k".into()) && options.contains(&"ro".into()));
}

#[test]
fn what_is_not_done_is_refused_by_its_field() {
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit); 8] = [
        ("hooks.prestart", |s| {
            s["hooks"]["prestart"] = serde_json::json!([{"path": "/x"}])
        }),
        ("hooks.poststop", |s| {
            s["hooks"]["poststop"] = serde_json::json!([{"path": "/x"}])
        }),
        ("linux.intelRdt", |s| {
            s["linux"]["intelRdt"] = serde_json::json!({})
        }),
        ("linux.devices[0] (/dev/sda)", |s| {
            s["linux"]["devices"] =
                serde_json::json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
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
    assert_eq!(none.memory_bytes(2 * gib, 16 * gib), 2 * gib);
    assert_eq!(none.vcpus(2, 8), 2);
    let limited = |memory| SizePart {
        memory: Some(memory),
        cpu: None,
    };
    assert_eq!(limited(1).memory_bytes(gib, 16 * gib), LEAST);
    assert_eq!(limited(gib).memory_bytes(gib, 16 * gib), gib + 144 * MIB);
    assert_eq!(limited(u64::MAX).memory_bytes(gib, 3 * gib + 5), 3 * gib);
    let odd = limited(300 * MIB + 1).memory_bytes(gib, 16 * gib);
    assert!(odd % (2 * MIB) == 0 && odd > 428 * MIB, "{odd}");
    let quota = |cpu| SizePart {
        memory: None,
        cpu: Some(cpu),
    };
    assert_eq!(quota((150_000, 100_000)).vcpus(4, 8), 2);
    assert_eq!(quota((1, 100_000)).vcpus(4, 8), 1);
    assert_eq!(quota((9_000_000, 100_000)).vcpus(4, 8), 8);
    assert_eq!(quota((5, 0)).vcpus(4, 8), 4);
}

#[test]
fn the_pod_s_sums_go_before_the_container_s_own_limit() {
    let split = try_split(|s| {
        s["linux"]["resources"] = serde_json::json!({"memory": {"limit": 5}, "cpu": {"quota": 7}});
        s["annotations"] = serde_json::json!({SANDBOX_MEMORY: "1000", SANDBOX_QUOTA: "0"});
    })
    .unwrap();
    assert_eq!(
        split.host.size,
        SizePart {
            memory: Some(1000),
            cpu: Some((7, 100_000))
        }
    );
    let line = refused(|s| s["annotations"] = serde_json::json!({SANDBOX_MEMORY: "1G"}));
    assert!(line.contains("\"1G\" is not a number"), "{line}");
}

#[test]
fn only_a_pid_s_namespace_is_one() {
    assert_eq!(pid_of(Path::new("/proc/42/ns/net")), Some(42));
    for other in [
        "/proc/self/ns/net",
        "proc/42/ns/net",
        "/proc/42/net",
        "/x/42/ns/net",
        "/proc/../42/ns",
    ] {
        assert_eq!(pid_of(Path::new(other)), None, "{other}");
    }
}
