//! Each row with a spec that it refuses, and the table against the document.

use std::collections::BTreeSet;

use kata_like_failure::Kind;
use serde_json::{Value, json};

use super::*;

/// What `ctr run` writes, shortened.
fn plain() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/a", "type": "none", "source": "/a", "options": ["rbind", "ro"]}],
        "linux": {
            "resources": {"unified": {"memory.high": "1"}, "memory": {"limit": 5}},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
                           {"type": "mount"}, {"type": "network"}],
        },
    })
}

/// Sets what `pointer` names, whose parents are made.
fn with(pointer: &str, value: Value) -> Value {
    let mut spec = plain();
    let mut place = &mut spec;
    for part in pointer.split('/').skip(1) {
        place = match part.parse::<usize>() {
            Ok(index) => &mut place[index],
            Err(_) => &mut place[part],
        };
    }
    *place = value;
    spec
}

fn without_namespace(kind: &str) -> Value {
    let mut spec = plain();
    let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
    list.retain(|entry| entry["type"] != kind);
    spec
}

fn refused(spec: Value) -> Option<Failure> {
    refuse(&serde_json::from_value(spec).unwrap()).err()
}

/// The field as the error names it, and a spec that asks for it.
type Examples = Vec<(&'static str, Value)>;

fn linux(name: &str, value: Value) -> Value {
    with(&format!("/linux/{name}"), value)
}

fn examples() -> Examples {
    [of_the_process(), of_places(), of_resources()].concat()
}

fn of_the_process() -> Examples {
    let process = |name: &str, value| with(&format!("/process/{name}"), value);
    let rules = |action: &str| json!([{"names": ["a"], "action": action}]);
    let filter = |name: &str, value: Value| {
        let mut profile = json!({"defaultAction": "SCMP_ACT_ALLOW"});
        profile[name] = value;
        linux("seccomp", profile)
    };
    vec![
        ("vm", with("/vm", json!({"kernel": {"path": "/k"}}))),
        ("solaris", with("/solaris", json!({}))),
        (
            "process.execCPUAffinity",
            process("execCPUAffinity", json!({"initial": "0"})),
        ),
        ("process.commandLine", process("commandLine", json!("a b"))),
        (
            "process.scheduler.policy",
            process("scheduler", json!({"policy": "SCHED_ISO"})),
        ),
        ("linux.intelRdt", linux("intelRdt", json!({}))),
        (
            "linux.memoryPolicy",
            linux("memoryPolicy", json!({"mode": "MPOL_DEFAULT", "nodes": ""})),
        ),
        ("linux.netDevices", linux("netDevices", json!({"eth1": {}}))),
        (
            "linux.seccomp.listenerPath",
            filter("listenerPath", json!("/run/x.sock")),
        ),
        (
            "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY",
            filter("defaultAction", json!("SCMP_ACT_NOTIFY")),
        ),
        (
            "linux.seccomp.syscalls[0].action: SCMP_ACT_NOTIFY",
            filter("syscalls", rules("SCMP_ACT_NOTIFY")),
        ),
        (
            "linux.seccomp.flags",
            filter("flags", json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])),
        ),
        (
            "linux.personality.flags",
            linux("personality", json!({"domain": "LINUX", "flags": ["x"]})),
        ),
    ]
}

/// Namespaces and mounts.
fn of_places() -> Examples {
    let mount = |name: &str, value| with(&format!("/mounts/1/{name}"), value);
    vec![
        (
            "linux.namespaces without an entry of type mount",
            without_namespace("mount"),
        ),
        (
            "linux.namespaces without an entry of type network",
            without_namespace("network"),
        ),
        (
            "linux.namespaces without an entry of type pid",
            without_namespace("pid"),
        ),
        (
            "linux.namespaces without an entry of type ipc",
            without_namespace("ipc"),
        ),
        (
            "linux.namespaces without an entry of type uts",
            without_namespace("uts"),
        ),
        (
            "mounts[1] (/a).uidMappings",
            mount(
                "gidMappings",
                json!([{"containerID": 0, "hostID": 1, "size": 1}]),
            ),
        ),
        (
            "mounts[1] (/a).type \"nfs\"",
            with("/mounts/1", json!({"destination": "/a", "type": "nfs"})),
        ),
        (
            "mounts[1] (/a).options: \"ridmap\"",
            mount("options", json!(["bind", "ridmap"])),
        ),
        (
            "mounts[1] (/a).options rro with rslave",
            mount("options", json!(["rbind", "rslave", "rro"])),
        ),
    ]
}

fn of_resources() -> Examples {
    let resource = |name: &str, value| linux(&format!("resources/{name}"), value);
    vec![
        (
            "linux.resources.blockIO",
            resource("blockIO", json!({"weight": 1})),
        ),
        (
            "linux.resources.network",
            resource("network", json!({"classID": 1})),
        ),
        ("linux.resources.rdma", resource("rdma", json!({"a": {}}))),
        (
            "linux.resources.cpu.realtimeRuntime",
            resource("cpu", json!({"realtimePeriod": 1})),
        ),
        (
            "linux.resources.memory.kernel",
            resource("memory", json!({"kernel": 1})),
        ),
        (
            "linux.resources.memory.kernelTCP",
            resource("memory", json!({"kernelTCP": 1})),
        ),
        (
            "linux.resources.memory.swappiness",
            resource("memory", json!({"swappiness": 0})),
        ),
        (
            "linux.resources.memory.disableOOMKiller",
            resource("memory", json!({"disableOOMKiller": true})),
        ),
        (
            "linux.resources.unified[io.max]",
            resource("unified", json!({"io.max": "x"})),
        ),
        (
            "linux.resources.unified[rdma.max]",
            resource("unified", json!({"rdma.max": "x"})),
        ),
        (
            "linux.resources.unified[tea.max]",
            resource("unified", json!({"pids.max": "1", "tea.max": "x"})),
        ),
    ]
}

#[test]
fn each_field_is_refused_by_its_name() {
    assert!(refused(plain()).is_none());
    let mut seen = BTreeSet::new();
    for (field, spec) in examples() {
        let error = refused(spec).unwrap_or_else(|| panic!("{field} passes"));
        assert_eq!(error.kind(), Kind::Unsupported);
        let line = error.one_line();
        assert!(
            line.starts_with(&format!("{field} is not supported: ")),
            "{line}"
        );
        let why = line.split_once(" is not supported: ").unwrap().1.to_owned();
        seen.insert((why, field.split('[').next().unwrap().to_owned()));
    }
    let asked = TABLE
        .iter()
        .filter(|row| !matches!(row.find, Find::Elsewhere));
    // Windows and z/OS have too many fields that a spec of theirs must have.
    let without = asked.clone().filter(|row| {
        let start = row.field.split('[').next().unwrap();
        let known = |(why, field): &(String, String)| why == row.why && field.starts_with(start);
        !seen.iter().any(known)
    });
    let without: Vec<_> = without.map(|row| row.field).collect();
    assert_eq!(without, ["windows", "zos"]);
}

#[test]
fn what_means_nothing_passes() {
    for (pointer, value) in [
        ("/linux/netDevices", json!({})),
        ("/linux/personality", json!({"domain": "LINUX32"})),
        ("/linux/resources/blockIO", json!({})),
        ("/linux/resources/rdma", json!({})),
        (
            "/linux/resources/cpu",
            json!({"realtimeRuntime": 0, "realtimePeriod": 0}),
        ),
        (
            "/linux/resources/memory",
            json!({"kernel": 0, "disableOOMKiller": false}),
        ),
        // No names of files: the agent says so.
        (
            "/linux/resources/unified",
            json!({"io": "", "tea": "", "io./": ""}),
        ),
        ("/mounts/1/type", json!("ext4")),
    ] {
        let spec = with(pointer, value);
        assert!(refused(spec).is_none(), "{pointer}");
    }
}

#[test]
fn an_exec_and_an_update_are_asked_for_their_part() {
    let part = |field: &str| {
        let (_, spec) = examples()
            .into_iter()
            .find(|(name, _)| *name == field)
            .unwrap();
        serde_json::from_value::<Spec>(spec).unwrap()
    };
    let spec = part("process.execCPUAffinity");
    assert!(refuse_process(spec.process().as_ref().unwrap()).is_err());
    let spec = part("linux.resources.rdma");
    let resources = spec.linux().as_ref().unwrap().resources().clone().unwrap();
    assert!(refuse_resources(&resources).is_err());
    assert!(refuse_process(spec.process().as_ref().unwrap()).is_ok());
}

#[test]
fn what_is_below_is_told_from_the_top() {
    let cases = [
        (json!(["rbind"]), ReadOnly::No),
        (json!(["rbind", "ro"]), ReadOnly::Top),
        (json!(["rbind", "ro", "rw"]), ReadOnly::No),
        (json!(["rbind", "rro"]), ReadOnly::All),
        (json!(["rbind", "rro", "rw"]), ReadOnly::All),
        (json!(["rbind", "ro", "rro", "rrw"]), ReadOnly::No),
    ];
    for (options, wanted) in cases {
        let spec = with("/mounts/1/options", options.clone());
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!(read_only(&mounts[1]), wanted, "{options}");
    }
    for fine in [json!(["rbind", "rslave", "ro"]), json!(["rslave", "rro"])] {
        let mut spec = with("/mounts/1/options", fine.clone());
        spec["mounts"][1]["type"] = "tmpfs".into();
        assert!(refused(spec).is_none(), "{fine}");
    }
}

#[test]
fn the_document_has_the_same_fields() {
    const HEADING: &str = "## Fields of the spec that are refused\n";
    let text = include_str!("../../docs/limitations.md");
    let section = text
        .split_once(HEADING)
        .expect("the section of the refused fields")
        .1;
    let section = section.split("\n## ").next().unwrap();
    let cells = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(" |").next());
    // Of the first cell every second part stands between backticks.
    let told: BTreeSet<_> = cells.flat_map(|cell| cell.split('`').step_by(2)).collect();
    let told: BTreeSet<_> = told.into_iter().filter(|field| !field.is_empty()).collect();
    let refused: BTreeSet<_> = TABLE.iter().map(|row| row.field).collect();
    let only = |one: &BTreeSet<&'static str>, other: &BTreeSet<&'static str>| {
        one.difference(other).copied().collect::<Vec<_>>()
    };
    assert_eq!(
        only(&told, &refused),
        [""; 0],
        "in docs/limitations.md alone"
    );
    assert_eq!(only(&refused, &told), [""; 0], "in the table alone");
}
