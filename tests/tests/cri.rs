//! Kubernetes' pods, made through containerd's CRI plugin as a kubelet makes them.
//!
//! What is asked of pods and containers is in protobuf's text format, by the names of CRI. The guest has no network
//! here: CNI makes the pod's on the host.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use kata_like_cri_client::messages::*;
use kata_like_cri_client::{Channel, Stream};
use kata_like_tests::cri::{self, HANDLER, Kubelet, text_of_log};
use kata_like_tests::process::until;
use kata_like_tests::{Host, TestResult, Version, failure, is_oracle};
use protobuf::MessageField;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sha2::{Digest, Sha256};

const MINUTE: Duration = Duration::from_secs(60);

/// For one test at a time: several guests at work take an emulated host many times as long.
fn host() -> TestResult<Host> {
    Host::on(Version::V2_1Cri, true)
}

/// A mount of a container's.
fn volume(source: &Path, target: &str, more: &str) -> String {
    format!("mounts {{ host_path: {source:?} container_path: {target:?} {more} }} ")
}

/// What a node has to know before it takes a pod, and what it can't run here is told in the pod's own words.
#[test]
fn a_node_offers_the_handler_and_refuses_what_is_the_hosts() -> TestResult {
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let version = kubelet.call(VersionRequest::new())?;
    assert_eq!(version.runtime_name, "containerd");
    let status = kubelet.call(StatusRequest::new())?;
    for condition in ["RuntimeReady", "NetworkReady"] {
        let ready = status.status.conditions.iter();
        let ready = ready
            .filter(|one| one.type_ == condition)
            .any(|one| one.status);
        assert!(ready, "{condition}: {status}");
    }
    let handlers: Vec<_> = status
        .runtime_handlers
        .iter()
        .map(|one| &one.name)
        .collect();
    assert!(handlers.iter().any(|name| *name == HANDLER), "{handlers:?}");
    if is_oracle() {
        return Ok(());
    }

    let before = host.footprint();
    for (option, kind, name) in [
        ("network: NODE", "network", "hostNetwork"),
        ("pid: NODE", "pid", "hostPID"),
        ("ipc: NODE", "ipc", "hostIPC"),
    ] {
        let config = format!("linux {{ security_context {{ namespace_options {{ {option} }} }} }}");
        let text = kubelet.no_pod("refused", &config)?;
        let field = format!("linux.namespaces without an entry of type {kind}");
        assert!(
            text.contains(&field) && text.contains(name),
            "{option}: {text}"
        );
    }
    host.leaves_nothing(&before)
}

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

/// Who a container runs as, what it may do, and what it finds: each said in CRI's words.
#[test]
fn security_contexts_and_volumes_are_as_asked() -> TestResult {
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let pod = kubelet.pod("secure", "linux { security_context { privileged: true } }")?;
    let context = |text: &str| format!("linux {{ security_context {{ {text} }} }} ");

    // The kubelet's work for fsGroup: the group of the volume, kept by what is made in it.
    let group = pod.volume("group")?;
    chown(&group, None, Some(2000))?;
    fs::set_permissions(&group, fs::Permissions::from_mode(0o2775))?;
    let user = context(
        "run_as_user { value: 1000 } run_as_group { value: 3000 } supplemental_groups: 2000
         no_new_privs: true seccomp { profile_type: RuntimeDefault }",
    );
    let text = pod.run(
        "user",
        "id -u; id -g; id -G | tr ' ' '\n' | sort -nu | tr '\n' ' '; echo
         touch /group/file && stat -c '%u %g' /group/file
         grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\t'",
        &(user + &volume(&group, "/group", "")),
    )?;
    assert_eq!(
        text,
        "1000\n3000\n900 2000 3000 \n1000 2000\n\
         CapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2\n"
    );
    let name = pod.run("name", "id -un", &context(r#"run_as_username: "app""#))?;
    assert_eq!(name, "app\n");

    // Capabilities, and a root that can't be written.
    let text = pod.run(
        "few",
        "grep ^CapEff /proc/self/status | tr -d '\t'; grep ^Seccomp: /proc/self/status | tr -d '\t'
         touch /file; mount -t tmpfs none /tmp; true",
        &context(
            r#"readonly_rootfs: true
               capabilities { add_capabilities: "NET_ADMIN" drop_capabilities: "ALL" }"#,
        ),
    )?;
    assert!(
        text.starts_with("CapEff:0000000000001000\nSeccomp:0\n"),
        "{text}"
    );
    assert!(text.contains("/file: Read-only file system"), "{text}");
    assert!(text.contains("permission denied"), "{text}");

    // Privileged is so within the guest.
    let text = pod.run(
        "privileged",
        "mkdir /mnt; mount -t tmpfs mine /mnt; stat -f -c %T /mnt
         echo 1 >/proc/sys/vm/overcommit_memory; cat /proc/sys/vm/overcommit_memory",
        &context("privileged: true"),
    )?;
    assert_eq!(text, "tmpfs\n1\n");

    // Masks are what is asked for, and none where none is (procMount: Unmasked).
    let look = "wc -c </proc/interrupts; v=$(cat /proc/sys/kernel/shmmni)
        echo $v >/proc/sys/kernel/shmmni && echo written || echo refused";
    let masked = r#"masked_paths: "/proc/interrupts" readonly_paths: "/proc/sys""#;
    let text = pod.run("masked", look, &context(masked))?;
    assert!(
        text.starts_with("0\n") && text.ends_with("refused\n"),
        "{text}"
    );
    let text = pod.run("unmasked", look, &context(""))?;
    assert!(
        !text.starts_with("0\n") && text.ends_with("written\n"),
        "{text}"
    );

    volumes(&pod)?;
    pod.remove()
}

/// A config map as the kubelet writes it, which changes by the switch of a link; an emptyDir in memory.
fn volumes(pod: &cri::Pod) -> TestResult {
    let map = pod.volume("map")?;
    let write = |version: &str| -> TestResult {
        fs::create_dir(map.join(version))?;
        fs::write(map.join(version).join("key"), version)?;
        symlink(version, map.join("..new"))?;
        Ok(fs::rename(map.join("..new"), map.join("..data"))?)
    };
    write("..first")?;
    symlink("..data/key", map.join("key"))?;
    let memory = Memory::on(pod.volume("memory")?)?;
    let mounts = volume(&map, "/etc/map", "readonly: true")
        + &volume(&memory.0, "/cache", "")
        + &volume(&map.join("key"), "/etc/one", "readonly: true");
    let container = pod.start("volumes", &["sleep", "1000"], &mounts)?;
    assert_eq!(
        container.exec("cat /etc/map/key /etc/one")?,
        "..first..first"
    );
    let refused = container.exec("echo x >/etc/map/key");
    assert!(refused.is_err_and(|error| error.to_string().contains("Read-only file system")));
    write("..second")?;
    let mut last = String::new();
    until("the config map's new version", MINUTE, || {
        last = container.exec("cat /etc/map/key").unwrap_or_default();
        last == "..second"
    })
    .map_err(|error| failure(format!("{error}: {last}")))?;
    // A file that is mounted itself stays what it was.
    assert_eq!(container.exec("cat /etc/one")?, "..first");

    let full = container.exec("dd if=/dev/zero of=/cache/big bs=1024 count=2048");
    assert!(full.is_err_and(|error| error.to_string().contains("No space left")));
    let big = fs::metadata(memory.0.join("big"))?.len();
    assert!((1 << 19..=1 << 20).contains(&big), "{big} bytes");
    container.stop(0).map(drop)
}

/// A tmpfs of 1 MiB.
struct Memory(PathBuf);

impl Memory {
    fn on(path: PathBuf) -> TestResult<Self> {
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), c"size=1m")?;
        Ok(Self(path))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Two pods that are started side by side: one whose containers see each other's processes, one where only a
/// debugging container sees its target's.
#[test]
fn processes_are_shared_as_asked() -> TestResult {
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let mode = |mode: &str| format!("namespace_options {{ {mode} }}");
    let config = |text: &str| format!("linux {{ security_context {{ {} }} }}", mode(text));
    let (shared, apart) = thread::scope(|scope| {
        let shared = scope.spawn(|| kubelet.pod("shared", &config("pid: POD")));
        let apart = kubelet.pod("apart", &config("pid: CONTAINER"));
        (shared.join(), apart)
    });
    let shared = shared.map_err(|_| failure("the thread of the shared pod"))??;
    let apart = apart?;

    let one = shared.start("one", &["sleep", "1111"], &config("pid: POD"))?;
    let list = shared.run("two", "ps -o args; echo $$", &config("pid: POD"))?;
    assert!(
        list.contains("sleep 1111") && !list.ends_with("\n1\n"),
        "{list}"
    );
    assert_eq!(one.stop(0)?.exit_code, 137);

    let target = apart.start("target", &["sleep", "2222"], &config("pid: CONTAINER"))?;
    let list = apart.run(
        "other",
        "ps -o pid,args; echo $$",
        &config("pid: CONTAINER"),
    )?;
    assert!(
        !list.contains("sleep 2222") && list.ends_with("\n1\n"),
        "{list}"
    );
    let joins = format!("pid: TARGET target_id: {:?}", target.id());
    let list = apart.run("debug", "ps -o pid,args", &config(&joins))?;
    assert!(list.contains("1 sleep 2222"), "{list}");
    assert!(!list.contains("sleep 1111"), "{list}");
    streams(&kubelet, &apart, &target)?;
    apart.remove()?;
    shared.remove()
}

/// Exec and Attach by the address of a stream, as `kubectl exec`, `cp` and `attach` have it.
fn streams(kubelet: &Kubelet, pod: &cri::Pod, target: &cri::Container) -> TestResult {
    let exec = |command: &[&str], tty: bool| -> TestResult<Stream> {
        let request = ExecRequest {
            container_id: target.id().to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        Ok(Stream::open(&kubelet.call(request)?.url, MINUTE)?)
    };
    let script = "read line; echo out $line; echo err >&2; exit 7";
    let mut stream = exec(&["sh", "-c", script], false)?;
    stream.send(Channel::Stdin, b"hello\n")?;
    let ended = stream.finish()?;
    assert_eq!(ended.stdout, b"out hello\n");
    assert_eq!(ended.stderr, b"err\n");
    assert_eq!(ended.exit_code(), Some(7), "{ended:?}");

    let mut stream = exec(&["sh"], true)?;
    stream.read_until("/ # ")?;
    stream.resize(100, 30)?;
    // The new size arrives beside the input.
    let script = "i=0; until stty size | grep '^30 100'; do i=$((i+1)); [ $i = 50 ] && exit; sleep 0.1; done; exit 9\n";
    stream.send(Channel::Stdin, script.as_bytes())?;
    stream.read_until("\n30 100")?;
    assert_eq!(stream.finish()?.exit_code(), Some(9));

    // `kubectl cp`: what tar writes comes byte by byte as it was.
    let made = "head -c 100000 /dev/urandom >/tmp/file; sha256sum </tmp/file | cut -c-64";
    let digest = target.exec(made)?;
    let archive = exec(&["tar", "-cf", "-", "-C", "/tmp", "file"], false)?.finish()?;
    let file = archive.stdout.get(512..512 + 100_000).unwrap_or_default();
    let found: String = Sha256::digest(file)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(found, digest, "{} bytes of tar", archive.stdout.len());
    assert_eq!(archive.exit_code(), Some(0));

    let script = "echo waits; read line; echo got $line";
    let attached = pod.start("attached", &["sh", "-c", script], "stdin: true")?;
    let request = AttachRequest {
        container_id: attached.id().to_owned(),
        stdin: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    let mut stream = Stream::open(&kubelet.call(request)?.url, MINUTE)?;
    stream.send(Channel::Stdin, b"hello\n")?;
    stream.read_until("got hello\n")?;
    stream.finish()?;
    assert_eq!(attached.wait_exit()?.exit_code, 0);
    assert_eq!(attached.log_text()?, "waits\ngot hello\n");
    Ok(())
}
