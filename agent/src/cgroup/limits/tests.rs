//! What becomes of `linux.resources`, field by field.

use super::*;
use kata_like_failure::Kind;
use serde_json::{Value, json};

fn limits(resources: Value) -> Result<Vec<(String, String)>, Failure> {
    let resources: LinuxResources = serde_json::from_value(resources).unwrap();
    let Limits(settings) = Limits::of(&resources)?;
    Ok(settings.into_iter().map(|it| (it.file, it.value)).collect())
}

fn line(file: &str, value: &str) -> (String, String) {
    (file.into(), value.into())
}

#[test]
fn shares_become_weights_as_in_runc() {
    for (shares, weight) in [
        (1, 1),
        (2, 1),
        (102, 17),
        (1024, 100),
        (262_144, 10_000),
        (u64::MAX, 10_000),
    ] {
        assert_eq!(weight_of_shares(shares), Some(weight), "{shares}");
    }
    assert_eq!(weight_of_shares(0), None);
    let weights: Vec<_> = (2..262_144).step_by(97).map(weight_of_shares).collect();
    assert!(weights.is_sorted());
}

#[test]
fn what_kubelet_sends_is_translated() {
    let lines = limits(json!({
        "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-3", "mems": "0"},
        "memory": {"limit": 134217728, "swap": 134217728},
        "pids": {"limit": 100},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        "unified": {"memory.oom.group": "1"},
        "devices": [{"allow": false, "access": "rwm"}],
    }));
    assert_eq!(
        lines.unwrap(),
        [
            line("cpu.weight", "100"),
            line("cpu.max", "50000 100000"),
            line("cpuset.cpus", "0-3"),
            line("cpuset.mems", "0"),
            line("memory.swap.max", "0"),
            line("memory.max", "134217728"),
            line("pids.max", "100"),
            line("hugetlb.2MB.max", "0"),
            line("memory.oom.group", "1"),
        ]
    );
}

#[test]
fn no_limit_has_many_spellings() {
    let lines = limits(json!({
        "cpu": {"quota": -1, "period": 100000},
        "memory": {"limit": -1},
        "pids": {"limit": -1},
    }));
    assert_eq!(
        lines.unwrap(),
        [
            line("cpu.max", "max 100000"),
            line("memory.swap.max", "max"),
            line("memory.max", "max"),
            line("pids.max", "max"),
        ]
    );
    assert_eq!(
        limits(json!({"pids": {"limit": 0}, "memory": {}, "cpu": {}})).unwrap(),
        []
    );
    assert_eq!(
        limits(json!({"cpu": {"quota": 20000}})).unwrap(),
        [line("cpu.max", "20000 100000")]
    );
}

#[test]
fn an_unsupported_field_is_named() {
    for (resources, field) in [
        (
            json!({"blockIO": {"weight": 10}}),
            "linux.resources.blockIO",
        ),
        (
            json!({"cpu": {"realtimeRuntime": 5}}),
            "linux.resources.cpu.realtimeRuntime",
        ),
        (
            json!({"memory": {"swappiness": 60}}),
            "linux.resources.memory.swappiness",
        ),
        (
            json!({"memory": {"disableOOMKiller": true}}),
            "linux.resources.memory.disableOOMKiller",
        ),
        (
            json!({"network": {"classID": 1}}),
            "linux.resources.network",
        ),
        (
            json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}),
            "linux.resources.rdma",
        ),
        (
            json!({"unified": {"io.max": "x"}}),
            "linux.resources.unified[io.max]",
        ),
    ] {
        let error = limits(resources).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
        assert!(
            error.to_string().starts_with(&format!("{field} ")),
            "{error}"
        );
    }
    assert!(limits(json!({"blockIO": {}, "network": {}, "rdma": {}})).is_ok());
}

#[test]
fn a_unified_key_is_never_a_path() {
    for key in [
        "memory/../../x",
        "memory.",
        "memory./x",
        "..",
        "cpu.a/b",
        "memory",
        "cgroup.freeze",
        "cgroup.subtree_control",
        "rdma.max",
    ] {
        assert!(limits(json!({"unified": {key: "1"}})).is_err(), "{key}");
    }
    assert!(limits(json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]})).is_err());
}

#[test]
fn an_idle_group_has_no_weight() {
    let idle = limits(json!({"cpu": {"shares": 512, "idle": 1}}));
    assert_eq!(idle.unwrap(), [line("cpu.idle", "1")]);
    let other = limits(json!({"cpu": {"shares": 1024, "idle": 0}}));
    assert_eq!(
        other.unwrap(),
        [line("cpu.idle", "0"), line("cpu.weight", "100")]
    );
    assert!(limits(json!({"cpu": {"idle": 2}})).is_err());
}

#[test]
fn a_burst_is_no_more_than_the_quota() {
    let burst = |burst| limits(json!({"cpu": {"quota": 50000, "burst": burst}}));
    assert_eq!(
        burst(50000).unwrap(),
        [
            line("cpu.max", "50000 100000"),
            line("cpu.max.burst", "50000")
        ]
    );
    assert_eq!(
        burst(50001).unwrap_err().one_line(),
        "linux.resources.cpu.burst: 50001 is more than cpu.quota, 50000"
    );
}

#[test]
fn processors_are_a_list_of_numbers() {
    assert_eq!(ranges("0-3,7\n").unwrap(), [(0, 3), (7, 7)]);
    for bad in ["", "-1", "3-1", "0,", "a", "0-3:2/4", "4294967296"] {
        assert_eq!(ranges(bad), None, "{bad}");
    }
    for (resources, field) in [
        (json!({"cpu": {"cpus": "a"}}), "cpu.cpus"),
        (json!({"cpu": {"mems": "0-"}}), "cpu.mems"),
        (
            json!({"unified": {"cpuset.cpus": "x"}}),
            "unified[cpuset.cpus]",
        ),
    ] {
        let error = limits(resources).unwrap_err().one_line();
        let start = format!("linux.resources.{field}: ");
        assert!(error.starts_with(&start), "{error}");
    }
}

#[test]
fn swap_needs_a_memory_limit_below_it() {
    assert!(limits(json!({"memory": {"swap": 5}})).is_err());
    assert!(limits(json!({"memory": {"swap": 5, "limit": 6}})).is_err());
    assert!(limits(json!({"memory": {"swap": 7, "limit": 6}})).is_ok());
}
