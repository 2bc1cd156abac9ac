//! The life of a pod and of its containers.

use std::fs;
use std::time::Instant;

use crate::cri::{self, HANDLER, Kubelet, MINUTE, text_of_log, volume};
use crate::{Host, Parts, TestResult, failure, in_time, is_oracle};
use kata_like_cri_client::messages::*;
use protobuf::MessageField;

/// In seconds: the grace of a container that does not heed SIGTERM. It must be enough for a slow
/// emulated host to deliver the signal.
const GRACE: i64 = 5;

/// The memory that the main container holds beside its processes, in bytes.
const HELD: u64 = 20 << 20;

/// A pod's life with everything that may happen to its containers; afterwards the host is as
/// before.
pub fn pods_live_and_leave_nothing(host: &Host) -> TestResult {
    let kubelet = Kubelet::new(host)?;
    let before = host.footprint();
    let pod = kubelet.pod(
        "lives",
        r#"hostname: "the-pod"
           dns_config { servers: "10.1.2.3" searches: "cluster.local" }
           linux {
               sysctls { key: "kernel.shm_rmid_forced" value: "1" }
               sysctls { key: "net.ipv4.tcp_keepalive_time" value: "654" }
           }"#,
    )?;
    let work = pod.volume("work")?;
    let work = volume(&work, "/work", "");

    let mut parts = Parts::new();
    parts.run("the pod's status", || the_pod_is_ready(&pod));
    parts.run("an init container", || an_init_container_ends(&pod, &work));
    let main = parts.run("the main container", || main_container(&pod, &work));
    if let Some(main) = &main {
        parts.run("its surroundings", || the_pods_config_is_seen(main));
        parts.run("its log", || logs_are_rotated(&kubelet, main));
        parts.run("commands", || commands_are_run(&kubelet, main));
        parts.run("memory to be counted", || hold_memory(main));
        parts.run("its figures", || figures_of_a_container(&kubelet, main));
        parts.run("the pod's figures", || {
            figures_of_a_pod(&kubelet, &pod, main)
        });
        parts.run("its limits", || limits_change(&kubelet, main));
    }
    parts.run("ends", || containers_end(&pod));
    parts.run("sidecars", || sidecars_are_started_again(&kubelet, &pod));
    parts.run("a failed start", || a_start_fails(&kubelet, &pod));
    if let Some(main) = &main {
        parts.run("a stop that is heeded", || a_stop_is_heeded(main));
    }
    parts.run("a stop that is not heeded", || a_stop_becomes_a_kill(&pod));
    parts.run("the pod's end", || {
        containers_end_with_the_pod(&pod)?;
        pod.remove()?;
        host.leaves_nothing(&before)?;
        nothing_is_listed(&kubelet)
    });
    parts.end()
}

/// The virtual machine follows the pod's limits, which the kubelet sends with the pod.
pub fn the_machine_is_as_large_as_the_pods_limits(host: &Host) -> TestResult {
    let kubelet = Kubelet::new(host)?;
    let before = host.footprint();
    let small = "linux { resources { memory_limit_in_bytes: 268435456 } }";
    let mut parts = Parts::new();
    for (name, config, mib) in [
        ("without limits", "", 1500..=2048),
        ("a limit of 256 MiB", small, 300..=400),
    ] {
        parts.run(name, || {
            let pod = kubelet.pod("again", config)?;
            let text = pod.run("memory", "grep MemTotal /proc/meminfo", "")?;
            let kib = text.split_whitespace().nth(1).unwrap_or_default();
            let found = kib.parse::<u64>()? / 1024;
            assert!(
                is_oracle() || mib.contains(&found),
                "{config:?}: {found} MiB"
            );
            pod.remove()?;
            host.leaves_nothing(&before)
        });
    }
    parts.run("the list of pods", || nothing_is_listed(&kubelet));
    parts.end()
}

fn nothing_is_listed(kubelet: &Kubelet) -> TestResult {
    let pods = kubelet.call(ListPodSandboxRequest::new())?.items;
    let containers = kubelet.call(ListContainersRequest::new())?.containers;
    assert!(
        pods.is_empty() && containers.is_empty(),
        "{pods:?} {containers:?}"
    );
    Ok(())
}

fn the_pod_is_ready(pod: &cri::Pod) -> TestResult {
    let status = pod.status()?;
    assert_eq!(status.state, PodSandboxState::SANDBOX_READY.into());
    assert_eq!(status.runtime_handler, HANDLER);
    assert!(status.network.ip.starts_with("10.88.0."), "{status}");
    Ok(())
}

/// It leaves a file for the others.
fn an_init_container_ends(pod: &cri::Pod, work: &str) -> TestResult {
    let script = "echo prepared >/work/file; echo out; echo err >&2; printf unended";
    let init = pod.start("init", &["sh", "-c", script], work)?;
    let status = init.wait_exit()?;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert!(status.created_at > 0 && status.started_at >= status.created_at);
    assert!(status.finished_at >= status.started_at);
    assert_eq!(init.log_text_of("stdout")?, "out\nunended");
    assert_eq!(init.log_text_of("stderr")?, "err\n");
    Ok(())
}

/// A container that reads what the init container has left, and counts until it is stopped.
fn main_container<'pod>(pod: &'pod cri::Pod, work: &str) -> TestResult<cri::Container<'pod>> {
    let script = "trap 'echo stops; exit 42' TERM; cat /work/file
        i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";
    let limits = "linux { resources { memory_limit_in_bytes: 134217728 oom_score_adj: 999 } }";
    let main = pod.start("main", &["sh", "-c", script], &format!("{work}{limits}"))?;
    main.wait_log("prepared\ntick 1\n")?;
    Ok(main)
}

fn the_pods_config_is_seen(main: &cri::Container) -> TestResult {
    let seen = main.exec(
        "hostname; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/tcp_keepalive_time
         cat /proc/1/oom_score_adj /etc/resolv.conf; uname -r",
    )?;
    let hosts = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kernel = seen.lines().last().unwrap_or_default();
    assert_eq!(kernel == hosts.trim(), is_oracle(), "{seen}");
    let wanted = "the-pod\n1\n654\n999\nsearch cluster.local\nnameserver 10.1.2.3";
    assert!(seen.starts_with(wanted), "{seen}");
    Ok(())
}

fn a_stop_is_heeded(main: &cri::Container) -> TestResult {
    let began = Instant::now();
    let status = main.stop(600)?;
    assert_eq!((status.exit_code, status.reason.as_str()), (42, "Error"));
    assert!(in_time(began.elapsed(), 5 * MINUTE), "the stop was a kill");
    assert!(
        main.log_text()?.ends_with("stops\n"),
        "{}",
        main.log_text()?
    );
    Ok(())
}

/// The container hears SIGTERM and goes on until its grace is over.
fn a_stop_becomes_a_kill(pod: &cri::Pod) -> TestResult {
    let stubborn = "trap 'echo goes on' TERM; echo waits; while :; do sleep 0.1; done";
    let stubborn = pod.start("stubborn", &["sh", "-c", stubborn], "")?;
    stubborn.wait_log("waits")?;
    let began = Instant::now();
    let status = stubborn.stop(GRACE)?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    let took = began.elapsed();
    assert!((GRACE as u64..60).contains(&took.as_secs()), "{took:?}");
    assert_eq!(stubborn.log_text()?, "waits\ngoes on\n");
    Ok(())
}

fn containers_end_with_the_pod(pod: &cri::Pod) -> TestResult {
    let left = pod.start("left", &["sleep", "1000"], "")?;
    pod.stop()?;
    assert_eq!(left.wait_exit()?.exit_code, 137);
    assert_eq!(
        pod.status()?.state,
        PodSandboxState::SANDBOX_NOTREADY.into()
    );
    Ok(())
}

/// As the kubelet rotates: rename, then Reopen. No line is lost, and none is later written to the
/// old file.
fn logs_are_rotated(kubelet: &Kubelet, main: &cri::Container) -> TestResult {
    let old = main.log().with_extension("log.1");
    fs::rename(main.log(), &old)?;
    kubelet.call(ReopenContainerLogRequest {
        container_id: main.id().to_owned(),
        ..Default::default()
    })?;
    let length = fs::metadata(&old)?.len();
    main.wait_log("tick")?;
    assert_eq!(fs::metadata(&old)?.len(), length);
    let all = text_of_log(&old)? + &main.log_text()?;
    let ticks = all.lines().filter_map(|line| line.strip_prefix("tick "));
    for (index, tick) in ticks.enumerate() {
        assert_eq!(tick, (index + 1).to_string(), "{all}");
    }
    Ok(())
}

/// ExecSync: both streams, the exit code, a command that can't run, and a time-out after which
/// nothing runs any more.
fn commands_are_run(kubelet: &Kubelet, main: &cri::Container) -> TestResult {
    let answer = kubelet.call(main.command(&["sh", "-c", "echo out; echo err >&2; exit 3"], 0))?;
    assert_eq!(answer.stdout, b"out\n");
    assert_eq!(answer.stderr, b"err\n");
    assert_eq!(answer.exit_code, 3);
    let text = kubelet.refused(main.command(&["/no/such"], 0))?;
    assert!(text.contains("no such file"), "{text}");
    let text = kubelet.refused(main.command(&["sleep", "7654"], 1))?;
    assert!(text.contains("timeout"), "{text}");
    let list = main.exec("ps -o args")?;
    assert!(!list.contains("sleep 7654"), "{list}");
    Ok(())
}

/// Memory that the stats of the container and of the pod must then show.
fn hold_memory(main: &cri::Container) -> TestResult {
    main.exec("dd if=/dev/zero of=/dev/shm/held bs=1048576 count=20 2>/dev/null")?;
    Ok(())
}

fn figures_of_a_container(kubelet: &Kubelet, main: &cri::Container) -> TestResult {
    // The CPU time only grows, so it lies between what the container itself sees before and after.
    let used = |ask: &dyn Fn() -> TestResult<ContainerStats>| -> TestResult {
        let before = seen_inside(main)?;
        let stats = ask()?;
        let after = seen_inside(main)?;
        let time = stats.cpu.usage_core_nano_seconds.value;
        assert!(
            (before.time..=after.time).contains(&time),
            "{before:?} {stats} {after:?}"
        );
        let memory = stats.memory.working_set_bytes.value;
        let differs = memory.abs_diff(before.memory);
        assert!(
            memory > HELD && differs < HELD / 4,
            "{before:?} {stats} {after:?}"
        );
        Ok(())
    };
    used(&|| main.stats())?;
    used(&|| {
        let all = kubelet.call(ListContainerStatsRequest::new())?.stats;
        let mut all = all.into_iter();
        let found = all.find(|one| one.attributes.id == main.id());
        found.ok_or_else(|| failure("main is not in the list"))
    })
}

/// They are the stats of its cgroup on the host, which contains its virtual machine.
fn figures_of_a_pod(kubelet: &Kubelet, pod: &cri::Pod, main: &cri::Container) -> TestResult {
    let before = seen_in(
        &fs::read_to_string(pod.cgroup().join("cpu.stat"))?,
        "usage_usec",
    )?;
    let stats = pod.stats()?;
    let after = seen_in(
        &fs::read_to_string(pod.cgroup().join("cpu.stat"))?,
        "usage_usec",
    )?;
    let time = stats.cpu.usage_core_nano_seconds.value;
    assert!(
        (before * 1000..=after * 1000).contains(&time),
        "{before} {stats} {after}"
    );
    assert!(time > seen_inside(main)?.time / 2, "{stats}");
    let memory: u64 = fs::read_to_string(pod.cgroup().join("memory.current"))?
        .trim()
        .parse()?;
    let told = stats.memory.usage_bytes.value;
    assert!(
        told > HELD && told.abs_diff(memory) < memory / 4,
        "{memory} {stats}"
    );
    assert_eq!(stats.network.default_interface.name, "eth0");
    assert!(stats.process.process_count.value > 0, "{stats}");
    let ids: Vec<_> = stats
        .containers
        .iter()
        .map(|one| &one.attributes.id)
        .collect();
    assert!(ids.iter().any(|id| *id == main.id()), "{ids:?}");
    assert_eq!(
        kubelet.call(ListPodSandboxStatsRequest::new())?.stats.len(),
        1
    );
    Ok(())
}

fn limits_change(kubelet: &Kubelet, main: &cri::Container) -> TestResult {
    let limits = "cd /sys/fs/cgroup; cat memory.max cpu.max";
    assert!(main.exec(limits)?.starts_with("134217728\n"));
    kubelet.call(UpdateContainerResourcesRequest {
        container_id: main.id().to_owned(),
        linux: MessageField::some(LinuxContainerResources {
            memory_limit_in_bytes: 67_108_864,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            ..Default::default()
        }),
        ..Default::default()
    })?;
    assert_eq!(main.exec(limits)?, "67108864\n50000 100000");
    let shown = main.status()?.resources.linux.memory_limit_in_bytes;
    assert_eq!(shown, 67_108_864);
    Ok(())
}

/// What a container sees of itself.
#[derive(Debug)]
struct Seen {
    /// In nanoseconds.
    time: u64,
    /// In bytes, without the cache of files.
    memory: u64,
}

fn seen_inside(container: &cri::Container) -> TestResult<Seen> {
    let text = container
        .exec("cd /sys/fs/cgroup; cat cpu.stat memory.stat; echo current $(cat memory.current)")?;
    Ok(Seen {
        time: seen_in(&text, "usage_usec")? * 1000,
        memory: seen_in(&text, "current")? - seen_in(&text, "inactive_file")?,
    })
}

/// The number of this name in the text of a cgroup's files.
fn seen_in(text: &str, name: &str) -> TestResult<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find(|(found, _)| *found == name);
    let (_, figure) = found.ok_or_else(|| failure(format!("no {name} in {text:?}")))?;
    Ok(figure.parse()?)
}

/// Ends and their reasons, and then a new container of the same name.
fn containers_end(pod: &cri::Pod) -> TestResult {
    let limits = "linux { resources { memory_limit_in_bytes: 33554432 } }";
    for (command, limits, code, reason) in [
        (&["sh", "-c", "exit 3"][..], "", 3, "Error"),
        (&["tail", "/dev/zero"], limits, 137, "OOMKilled"),
    ] {
        let container = pod.start("ends", command, limits)?;
        let status = container.wait_reason(reason)?;
        assert_eq!(status.exit_code, code, "{command:?}");
        container.remove()?;
    }
    Ok(())
}

/// A sidecar that dies is started again while the main container goes on.
fn sidecars_are_started_again(kubelet: &Kubelet, pod: &cri::Pod) -> TestResult {
    let sidecar = ["sh", "-c", "echo serves; sleep 1000 & wait"];
    for _ in 0..2 {
        let sidecar = pod.start("sidecar", &sidecar, "")?;
        sidecar.wait_log("serves")?;
        // The command may end with the sidecar's first process.
        kubelet.call(sidecar.command(&["sh", "-c", "kill -9 -1"], 0))?;
        sidecar.wait_exit()?;
        sidecar.remove()?;
    }
    Ok(())
}

fn a_start_fails(kubelet: &Kubelet, pod: &cri::Pod) -> TestResult {
    let missing = pod.create("missing", &["/no/such"], "")?;
    let text = kubelet.refused(missing.start())?;
    assert!(text.contains("no such file"), "{text}");
    let status = missing.status()?;
    let found = (status.exit_code, status.reason.as_str());
    assert_eq!(found, (128, "StartError"), "{}", status.message);
    missing.remove()
}
