//! A pod's life and that of its containers.

use std::fs;
use std::time::Instant;

use kata_like_cri_client::messages::*;
use kata_like_tests::cri::{self, HANDLER, Kubelet, MINUTE, text_of_log, volume};
use kata_like_tests::{TestResult, failure, is_oracle};
use protobuf::MessageField;

use super::host;

/// What a container gets that does not heed SIGTERM, in seconds. An emulated host must not be too slow for it to hear it.
const GRACE: i64 = 5;

/// What the main container has in memory beside its processes, in bytes.
const HELD: u64 = 20 << 20;

/// A pod's life with all that may happen to its containers, three times over; the host is then as before.
#[test]
fn pods_live_and_leave_nothing() -> TestResult {
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
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
    let status = pod.status()?;
    assert_eq!(status.state, PodSandboxState::SANDBOX_READY.into());
    assert_eq!(status.runtime_handler, HANDLER);
    assert!(status.network.ip.starts_with("10.88.0."), "{status}");

    // An init container leaves something for the others.
    let work = pod.volume("work")?;
    let work = volume(&work, "/work", "");
    let script = "echo prepared >/work/file; echo out; echo err >&2; printf unended";
    let init = pod.start("init", &["sh", "-c", script], &work)?;
    let status = init.wait_exit()?;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert!(status.created_at > 0 && status.started_at >= status.created_at);
    assert!(status.finished_at >= status.started_at);
    assert_eq!(init.log_text_of("stdout")?, "out\nunended");
    assert_eq!(init.log_text_of("stderr")?, "err\n");

    let script = "trap 'echo stops; exit 42' TERM; cat /work/file
        i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";
    let limits = "linux { resources { memory_limit_in_bytes: 134217728 oom_score_adj: 999 } }";
    let main = pod.start("main", &["sh", "-c", script], &format!("{work}{limits}"))?;
    main.wait_log("prepared\ntick 1\n")?;
    let seen = main.exec(
        "hostname; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/tcp_keepalive_time
         cat /proc/1/oom_score_adj /etc/resolv.conf; uname -r",
    )?;
    let hosts = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kernel = seen.lines().last().unwrap_or_default();
    assert_eq!(kernel == hosts.trim(), is_oracle(), "{seen}");
    let wanted = "the-pod\n1\n654\n999\nsearch cluster.local\nnameserver 10.1.2.3";
    assert!(seen.starts_with(wanted), "{seen}");

    logs_are_rotated(&kubelet, &main)?;
    commands_are_run(&kubelet, &main)?;
    figures_and_limits(&kubelet, &pod, &main)?;
    containers_end(&kubelet, &pod)?;

    // The grace of a stop: the first heeds SIGTERM, the second hears it and goes on.
    let began = Instant::now();
    let status = main.stop(600)?;
    assert_eq!((status.exit_code, status.reason.as_str()), (42, "Error"));
    assert!(began.elapsed() < 5 * MINUTE, "the stop was a kill");
    assert!(
        main.log_text()?.ends_with("stops\n"),
        "{}",
        main.log_text()?
    );
    let stubborn = "trap 'echo goes on' TERM; echo waits; while :; do sleep 0.1; done";
    let stubborn = pod.start("stubborn", &["sh", "-c", stubborn], "")?;
    stubborn.wait_log("waits")?;
    let began = Instant::now();
    let status = stubborn.stop(GRACE)?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    let took = began.elapsed();
    assert!((GRACE as u64..60).contains(&took.as_secs()), "{took:?}");
    assert_eq!(stubborn.log_text()?, "waits\ngoes on\n");

    // Containers that still run end with the pod.
    let left = pod.start("left", &["sleep", "1000"], "")?;
    pod.stop()?;
    assert_eq!(left.wait_exit()?.exit_code, 137);
    assert_eq!(
        pod.status()?.state,
        PodSandboxState::SANDBOX_NOTREADY.into()
    );
    pod.remove()?;
    host.leaves_nothing(&before)?;

    // The virtual machine is as large as the pod's limits, which the kubelet gives with the pod.
    let small = "linux { resources { memory_limit_in_bytes: 268435456 } }";
    for (config, mib) in [("", 1500..=2048), (small, 300..=400)] {
        let pod = kubelet.pod("again", config)?;
        let text = pod.run("memory", "grep MemTotal /proc/meminfo", "")?;
        let kib = text.split_whitespace().nth(1).unwrap_or_default();
        let found = kib.parse::<u64>()? / 1024;
        assert!(
            is_oracle() || mib.contains(&found),
            "{config:?}: {found} MiB"
        );
        pod.remove()?;
        host.leaves_nothing(&before)?;
    }
    let pods = kubelet.call(ListPodSandboxRequest::new())?.items;
    let containers = kubelet.call(ListContainersRequest::new())?.containers;
    assert!(
        pods.is_empty() && containers.is_empty(),
        "{pods:?} {containers:?}"
    );
    Ok(())
}

/// As the kubelet rotates: rename, then Reopen. No line is lost, none is written to the old file later.
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

/// ExecSync: both streams, the exit code, what can't be run, and a time-out after which nothing runs any more.
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

/// Figures of the container and of the pod, and limits that change while it runs.
fn figures_and_limits(kubelet: &Kubelet, pod: &cri::Pod, main: &cri::Container) -> TestResult {
    main.exec("dd if=/dev/zero of=/dev/shm/held bs=1048576 count=20 2>/dev/null")?;
    // Its processors' time only grows, and so lies between what the container itself sees before and after.
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
    })?;

    // A pod's are those of its cgroup on the host, in which its virtual machine is.
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
    /// In bytes, without files that were read but lately.
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

/// The figure of this name in what a cgroup's files say.
fn seen_in(text: &str, name: &str) -> TestResult<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find(|(found, _)| *found == name);
    let (_, figure) = found.ok_or_else(|| failure(format!("no {name} in {text:?}")))?;
    Ok(figure.parse()?)
}

/// Ends and their reasons, and what comes after them: a new container of the same name.
fn containers_end(kubelet: &Kubelet, pod: &cri::Pod) -> TestResult {
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
    // A sidecar that dies is started again, beside the one that goes on.
    let sidecar = ["sh", "-c", "echo serves; sleep 1000 & wait"];
    for _ in 0..2 {
        let sidecar = pod.start("sidecar", &sidecar, "")?;
        sidecar.wait_log("serves")?;
        // With its first process the command may end, too.
        kubelet.call(sidecar.command(&["sh", "-c", "kill -9 -1"], 0))?;
        sidecar.wait_exit()?;
        sidecar.remove()?;
    }
    let missing = pod.create("missing", &["/no/such"], "")?;
    let text = kubelet.refused(missing.start())?;
    assert!(text.contains("no such file"), "{text}");
    let status = missing.status()?;
    let found = (status.exit_code, status.reason.as_str());
    assert_eq!(found, (128, "StartError"), "{}", status.message);
    missing.remove()
}
