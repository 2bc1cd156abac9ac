//! Changed limits, and stats: the API reports what the container reads itself.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::disk::LoopDevice;
use crate::shim_pod::ShimPod;
use crate::task::{Streams, Task};
use crate::task_api::{done, refused};
use crate::{TestResult, failure, is_oracle};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use serde_json::{Value, json};

/// A container's own cgroup, with or without a namespace for it.
const OWN: &str = "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)";

/// The spec of a container with its cgroup mounted.
fn with_cgroup(pod: &ShimPod) -> TestResult<Value> {
    let mut spec = pod.spec(&["sleep", "1000"]);
    let mounts = spec["mounts"].as_array_mut();
    let mounts = mounts.ok_or_else(|| failure("no mounts"))?;
    mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
    mounts.push(
        json!({"type": "cgroup", "source": "cgroup", "destination": "/sys/fs/cgroup",
        "options": ["ro"]}),
    );
    Ok(spec)
}

fn started(pod: &ShimPod, spec: &Value) -> TestResult<Task> {
    let task = pod.task("limited");
    done(task.create(spec, &Streams::default())?)?;
    done(task.start("")?)?;
    Ok(task)
}

/// A container with these limits.
fn start(pod: &ShimPod, resources: Value) -> TestResult<Task> {
    let mut spec = with_cgroup(pod)?;
    for (key, value) in resources.as_object().into_iter().flatten() {
        spec["linux"]["resources"][key] = value.clone();
    }
    started(pod, &spec)
}

/// Limits change while the container runs. A limit that can't be changed is refused, and changes
/// nothing.
pub fn update(pod: &ShimPod) -> TestResult {
    let task = start(pod, json!({"memory": {"limit": 134_217_728}}))?;
    let limits = || -> TestResult<Vec<String>> {
        let text = task.output(&format!("{OWN}; cat memory.max cpu.max pids.max"))?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    assert_eq!(limits()?[0], "134217728");
    done(task.update(&json!({
        "memory": {"limit": 67_108_864},
        "cpu": {"quota": 50_000, "period": 100_000},
        "pids": {"limit": 64},
    }))?)?;
    assert_eq!(limits()?, ["67108864", "50000 100000", "64"]);
    // One field alone leaves the others.
    done(task.update(&json!({"pids": {"limit": 32}}))?)?;
    assert_eq!(limits()?, ["67108864", "50000 100000", "32"]);
    if !is_oracle() {
        let bad = json!({"pids": {"limit": 16}, "rdma": {"a": {"hcaHandles": 1}}});
        let refusal = refused(task.update(&bad)?)?;
        assert!(refusal.text.contains("linux.resources.rdma"), "{refusal:?}");
        assert_eq!(limits()?[2], "32");
    }
    task.end()
}

/// Stats that only grow, by the file and key that the container reads.
const GROWING: [(&str, &str); 8] = [
    ("cpu.stat", "usage_usec"),
    ("cpu.stat", "user_usec"),
    ("cpu.stat", "system_usec"),
    ("cpu.stat", "nr_periods"),
    ("memory.stat", "pgfault"),
    ("memory.stat", "pgmajfault"),
    ("memory.events", "max"),
    ("memory.events", "oom_kill"),
];

fn growing(metrics: &Metrics) -> [u64; 8] {
    let (cpu, memory, events) = (&metrics.cpu, &metrics.memory, &metrics.memory_events);
    [
        cpu.usage_usec,
        cpu.user_usec,
        cpu.system_usec,
        cpu.nr_periods,
        memory.pgfault,
        memory.pgmajfault,
        events.max,
        events.oom_kill,
    ]
}

/// Each growing number lies between what the container reads before and after. The others equal its
/// own up to what an exec takes.
pub fn stats(pod: &ShimPod) -> TestResult {
    let limits = json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 48},
        "cpu": {"quota": 90_000, "period": 100_000}});
    let task = start(pod, limits)?;
    // Something to see: a file in memory, some work, and a process that takes too much memory.
    task.output("dd if=/dev/zero of=/dev/shm/file bs=1024k count=8; i=0; while [ $i -lt 300 ]; do i=$((i+1)); done")?;
    assert_eq!(task.run(&["tail", "/dev/zero"])?, 137);

    let read = || -> TestResult<Vec<u64>> {
        let keys = GROWING.map(|(file, key)| format!("sed -n 's/^{key} //p' {file}"));
        let text = task.output(&format!("{OWN}; {}", keys.join("; ")))?;
        text.lines().map(|line| Ok(line.parse()?)).collect()
    };
    let before = read()?;
    let packed = done(task.stats()?)?;
    assert_eq!(packed.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&packed.value)?;
    let after = read()?;
    let told = growing(&metrics);
    assert_eq!(
        (before.len(), after.len()),
        (told.len(), told.len()),
        "{before:?}, {after:?}"
    );
    for (((file, key), told), (before, after)) in
        GROWING.iter().zip(told).zip(before.iter().zip(&after))
    {
        let range = before..=after;
        assert!(
            range.contains(&&told),
            "{file} {key}: {told} is not in {range:?}"
        );
    }
    for must in [0, 1, 4, 6, 7] {
        assert!(told[must] > 0, "{:?}: {told:?}", GROWING[must]);
    }

    let script =
        format!("{OWN}; cat memory.max pids.max memory.current; sed -n 's/^shmem //p' memory.stat");
    let text = task.output(&script)?;
    let own: Vec<u64> = text
        .lines()
        .map(|line| Ok(line.trim().parse()?))
        .collect::<TestResult<_>>()?;
    let [memory_max, pids_max, current, shmem] = own[..] else {
        return Err(failure(text));
    };
    assert_eq!(
        (metrics.memory.usage_limit, metrics.pids.limit),
        (memory_max, pids_max)
    );
    // Only the init.
    assert_eq!(metrics.pids.current, 1);
    // The kernel keeps memory counts per CPU, so two readings differ a little.
    const MOST: u64 = 4 << 20;
    let memory = &metrics.memory;
    assert!(
        memory.usage.abs_diff(current) < MOST,
        "{memory:?}: {current}"
    );
    assert!(
        memory.shmem.abs_diff(shmem) < MOST && shmem >= 7 << 20,
        "{memory:?}: {shmem}"
    );
    assert!(
        memory.file + MOST > shmem && memory.usage + MOST > shmem,
        "{memory:?}"
    );
    assert!(
        memory.max_usage == 0 || memory.max_usage >= 60 << 20,
        "{memory:?}"
    );
    task.end()
}

/// Disk traffic is counted by device, as in the container's own `io.stat`.
pub fn stats_of_a_disk(pod: &ShimPod) -> TestResult {
    if is_oracle() {
        return Ok(()); // On runc it is the host's device, to which others write, too.
    }
    let image = pod.files().join("image");
    fs::File::create(&image)?.set_len(4 << 20)?;
    let device = LoopDevice::attach(&image)?;
    let number = fs::metadata(device.path())?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let mut spec = with_cgroup(pod)?;
    spec["linux"]["devices"] = json!([{"path": device.path(), "type": "b", "major": major,
        "minor": minor, "fileMode": 0o600, "uid": 0, "gid": 0}]);
    let rules = spec["linux"]["resources"]["devices"].as_array_mut();
    rules
        .ok_or_else(|| failure("no rules"))?
        .push(json!({"allow": true, "type": "b",
        "major": major, "minor": minor, "access": "rwm"}));
    let path = device.path();
    let task = started(pod, &spec)?;
    let text = task.output(&format!(
        "dd if=/dev/zero of={path} bs=65536 count=16 conv=fsync 2>/dev/null; \
         dd if={path} of=/dev/null bs=65536 skip=32 count=8 2>/dev/null; {OWN}; cat io.stat"
    ))?;
    let packed = done(task.stats()?)?;
    let metrics = Metrics::parse_from_bytes(&packed.value)?;
    let figures: Vec<String> = metrics
        .io
        .usage
        .iter()
        .map(|io| {
            let (major, minor) = (io.major, io.minor);
            let (read, written, reads, writes) = (io.rbytes, io.wbytes, io.rios, io.wios);
            format!("{major}:{minor} rbytes={read} wbytes={written} rios={reads} wios={writes}")
        })
        .collect();
    let own: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split(" dbytes=").next())
        .collect();
    assert_eq!(figures, own, "{text}");
    let [io] = &metrics.io.usage[..] else {
        return Err(failure(text));
    };
    assert!(
        io.wbytes == 1 << 20 && io.rbytes >= 8 << 16 && io.wios > 0 && io.rios > 0,
        "{text}"
    );
    task.end()?;
    drop(device);
    Ok(())
}
