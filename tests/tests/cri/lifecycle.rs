//! A pod's life and that of its containers.

use std::fs;
use std::time::Instant;

use kata_like_cri_client::messages::*;
use kata_like_tests::cri::{self, HANDLER, Kubelet, MINUTE, text_of_log, volume};
use kata_like_tests::{TestResult, failure, is_oracle};
use protobuf::MessageField;

use super::host;

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
           linux { sysctls { key: "kernel.shm_rmid_forced" value: "1" } }"#,
    )?;
    let status = pod.status()?;
    assert_eq!(status.state, PodSandboxState::SANDBOX_READY.into());
    assert_eq!(status.runtime_handler, HANDLER);
    assert!(status.network.ip.starts_with("10.88.0."), "{status}");

    // An init container leaves something for the others.
    let work = pod.volume("work")?;
    let work = volume(&work, "/work", "");
    let init = pod.start("init", &["sh", "-c", "echo prepared >/work/file"], &work)?;
    let status = init.wait_exit()?;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert!(status.finished_at >= status.started_at && status.started_at > 0);

    let script = "trap 'echo stops; exit 42' TERM; cat /work/file
        i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";
    let limits = "linux { resources { memory_limit_in_bytes: 134217728 oom_score_adj: 999 } }";
    let main = pod.start("main", &["sh", "-c", script], &format!("{work}{limits}"))?;
    main.wait_log("prepared\ntick 1\n")?;
    let seen = main.exec(
        "hostname; cat /proc/sys/kernel/shm_rmid_forced /proc/1/oom_score_adj
         cat /etc/resolv.conf; uname -r",
    )?;
    let hosts = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kernel = seen.lines().last().unwrap_or_default();
    assert_eq!(kernel == hosts.trim(), is_oracle(), "{seen}");
    let wanted = "the-pod\n1\n999\nsearch cluster.local\nnameserver 10.1.2.3";
    assert!(seen.starts_with(wanted), "{seen}");

    logs_are_rotated(&kubelet, &main)?;
    commands_are_run(&kubelet, &main)?;
    figures_and_limits(&kubelet, &pod, &main)?;
    containers_end(&kubelet, &pod)?;

    // The grace of a stop: the first heeds SIGTERM, the second does not.
    let began = Instant::now();
    let status = main.stop(600)?;
    assert_eq!((status.exit_code, status.reason.as_str()), (42, "Error"));
    assert!(began.elapsed() < 5 * MINUTE, "the stop was a kill");
    assert!(
        main.log_text()?.ends_with("stops\n"),
        "{}",
        main.log_text()?
    );
    let deaf = "trap '' TERM; echo deaf; while :; do sleep 1; done";
    let deaf = pod.start("deaf", &["sh", "-c", deaf], "")?;
    deaf.wait_log("deaf")?;
    let status = deaf.stop(1)?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));

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
    let used = |stats: &ContainerStats| {
        let memory = stats.memory.working_set_bytes.value;
        let time = stats.cpu.usage_core_nano_seconds.value;
        assert!(
            (1 << 12..1 << 27).contains(&memory) && time > 1_000_000,
            "{stats}"
        );
    };
    used(&main.stats()?);
    let all = kubelet.call(ListContainerStatsRequest::new())?.stats;
    let of_main = all.iter().find(|one| one.attributes.id == main.id());
    used(of_main.ok_or_else(|| failure(format!("no {} in {all:?}", main.id())))?);

    let stats = pod.stats()?;
    assert!(
        stats.cpu.usage_core_nano_seconds.value > 1_000_000,
        "{stats}"
    );
    assert!(stats.memory.usage_bytes.value > 1 << 17, "{stats}");
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
