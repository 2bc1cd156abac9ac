//! The shim as containerd calls it: the binary's verbs and the task API, in both versions,
//! directly.
//!
//! `ctr` can't ask for these: both versions, containerd 2.3's bootstrap, `-info`, a `delete` that
//! meets a living pod, and so many execs that a leak shows. `odd_states` has each call in each
//! state.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use kata_like_tests::host::NAMESPACE;
use kata_like_tests::process::{Process, until};
use kata_like_tests::shim_pod::ShimPod;
use kata_like_tests::task::{Streams, Task};
use kata_like_tests::task_api::{SERVICES, TaskApi, done, refused};
use kata_like_tests::{
    Call, CtrContainer, Host, Parts, TestResult, failure, figures, kata_like_only,
};

const DEADLINE: Duration = Duration::from_secs(10);

fn shim() -> PathBuf {
    let prefix = std::env::var("KATA_LIKE_PREFIX").unwrap_or_else(|_| "/run/installed".into());
    PathBuf::from(prefix).join("bin/containerd-shim-kata-like-v2")
}

/// The binary with the flags that containerd gives it.
fn verb(host: &Host, id: &str, bundle: &Path, verb: &str) -> Command {
    let mut command = Command::new(shim());
    command
        .args(["-namespace", NAMESPACE, "-address"])
        .arg(host.address())
        .args(["-publish-binary", "containerd", "-id", id])
        .current_dir(bundle);
    if verb == "delete" {
        command.arg("-bundle").arg(bundle);
    }
    command.arg(verb);
    command
}

/// One binary serves containerd 1.7 and 2.x: both services answer, and alike.
#[test]
fn both_versions_answer_alike() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod = host.start("versions", &[], &["sleep", "1000"])?;
    let (_, pid) = pod.status()?;
    let pid = u32::try_from(pid)?;
    let id = pod.id().to_owned();
    let mut parts = Parts::new();
    for service in SERVICES {
        parts.run(service, || answers_as_it_should(&host, &id, pid, service));
    }
    parts.run("a delete of another id", || {
        delete_of_another_id_leaves_it_alone(&host, &pod)
    });
    parts.run("the pod's end", || pod.remove());
    parts.end()
}

fn answers_as_it_should(host: &Host, id: &str, pid: u32, service: &'static str) -> TestResult {
    let api = TaskApi::connect(&host.bundle(id), service)?;
    let request = api::StateRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let state: api::StateResponse = done(api.call("State", &request, DEADLINE)?.0)?;
    assert_eq!(
        (state.pid, state.status),
        (pid, api::Status::RUNNING.into())
    );
    let request = api::ConnectRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let connected: api::ConnectResponse = done(api.call("Connect", &request, DEADLINE)?.0)?;
    assert_eq!(connected.task_pid, pid);
    assert!(Process::find(i32::try_from(connected.shim_pid)?).is_some());
    let request = api::PidsRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let pids: api::PidsResponse = done(api.call("Pids", &request, DEADLINE)?.0)?;
    assert!(
        pids.processes.iter().any(|process| process.pid == pid),
        "{pids:?}"
    );
    let request = api::StatsRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let stats: api::StatsResponse = done(api.call("Stats", &request, DEADLINE)?.0)?;
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    Ok(())
}

/// containerd calls `delete` after each container of a pod: it must not touch the VM of a living
/// pod.
fn delete_of_another_id_leaves_it_alone(host: &Host, pod: &CtrContainer) -> TestResult {
    let other = PathBuf::from(format!("/run/{}", host.name("bundle")));
    fs::create_dir(&other)?;
    let id = host.name("other");
    let output = Call::new(verb(host, &id, &other, "delete"))
        .deadline(DEADLINE)
        .ok()?;
    let answer = api::DeleteResponse::parse_from_bytes(&output.stdout)?;
    assert_eq!(answer.exit_status, 137, "{answer:?}");
    assert_eq!(pod.status()?.0, "RUNNING");
    assert_eq!(pod.exec(&["echo", "alive"])?.text(), "alive");
    Ok(fs::remove_dir(&other)?)
}

/// `-info` needs no KVM, no configuration, and makes nothing.
#[test]
fn info_tells_name_and_version() -> TestResult {
    kata_like_only!();
    let mut command = Command::new(shim());
    command.arg("-info");
    let output = Call::new(command).deadline(DEADLINE).ok()?;
    let info = RuntimeInfo::parse_from_bytes(&output.stdout)?;
    assert_eq!(info.name, "io.containerd.kata-like.v2");
    assert!(!info.version.version.is_empty());
    Ok(())
}

/// containerd 2.3 sends BootstrapParams and reads BootstrapResult; an address alone is for the
/// others.
#[test]
fn start_speaks_each_containerds_dialect() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    let mut parts = Parts::new();
    for (dialect, version) in [("2.1", 0), ("2.3", 3)] {
        parts.run(dialect, || a_shim_starts_and_ends(&host, dialect, version));
    }
    parts.run("the end", || host.leaves_nothing(&before));
    parts.end()
}

fn a_shim_starts_and_ends(host: &Host, dialect: &str, version: i32) -> TestResult {
    let id = host.name("dialect");
    let bundle = PathBuf::from(format!("/run/{id}"));
    fs::create_dir(&bundle)?;
    let spec = format!(
        r#"{{"ociVersion":"1.1.0","process":{{"user":{{"uid":0,"gid":0}},"args":["true"],"cwd":"/"}},"root":{{"path":"rootfs"}},"linux":{{"cgroupsPath":"/{NAMESPACE}/{id}","namespaces":[{{"type":"network"}},{{"type":"mount"}}]}}}}"#
    );
    fs::write(bundle.join("config.json"), spec)?;
    let socket = host.address().display().to_string();
    let params = BootstrapParams {
        instance_id: id.clone(),
        namespace: NAMESPACE.into(),
        containerd_version: "2.3.0".into(),
        containerd_ttrpc_address: format!("{socket}.ttrpc"),
        containerd_grpc_address: socket.clone(),
        containerd_binary: "containerd".into(),
        ..Default::default()
    };
    let mut command = verb(host, &id, &bundle, "start");
    command.env("TTRPC_ADDRESS", format!("{socket}.ttrpc"));
    let input = if version == 3 {
        params.write_to_bytes()?
    } else {
        Vec::new()
    };
    let output = Call::new(command).input(input).deadline(DEADLINE).ok()?;
    assert_eq!(output.error_text(), "", "{dialect}");
    let address = if version == 3 {
        let result = BootstrapResult::parse_from_bytes(&output.stdout)?;
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
        result.address
    } else {
        output.text()
    };
    assert!(address.starts_with("unix:///"), "{dialect}: {address:?}");
    assert_eq!(
        fs::read_to_string(bundle.join("address"))?,
        address,
        "{dialect}"
    );
    let api = TaskApi::connect(&bundle, SERVICES[1])?;
    let request = api::ConnectRequest {
        id: id.clone(),
        ..Default::default()
    };
    let connected: api::ConnectResponse = done(api.call("Connect", &request, DEADLINE)?.0)?;
    let request = api::ShutdownRequest {
        id: id.clone(),
        ..Default::default()
    };
    let _: api::Empty = done(api.call("Shutdown", &request, DEADLINE)?.0)?;
    let pid = i32::try_from(connected.shim_pid)?;
    until("the shim ends after Shutdown", DEADLINE, || {
        Process::find(pid).is_none()
    })?;
    Call::new(verb(host, &id, &bundle, "delete"))
        .deadline(DEADLINE)
        .ok()?;
    Ok(fs::remove_dir_all(&bundle)?)
}

/// What a pod uses, on the host and in the guest.
#[derive(Debug)]
struct InUse {
    /// Open files of shim, fsd and VMM.
    open_files: Vec<usize>,
    /// Their threads.
    threads: Vec<u64>,
    /// Their own memory in KiB.
    memory_kib: Vec<u64>,
    /// In the guest: open files, and tasks.
    guest: [u64; 2],
    /// The agent's own memory, and what the guest's kernel holds for it, in KiB.
    agent_kib: [u64; 2],
}

impl InUse {
    fn of(pod: &ShimPod, task: &Task) -> TestResult<Self> {
        let processes = ["shim", "fsd", "vmm", "proxy"].map(|role| pod.first().process(role));
        let processes: Vec<Process> = processes.into_iter().collect::<TestResult<_>>()?;
        // Without a cgroup namespace of its own a container sees the guest's cgroups.
        let script = "cut -f 1 /proc/sys/fs/file-nr; cut -d / -f 2 /proc/loadavg | cut -d ' ' -f 1; \
            sed -n 's/^anon //p; s/^kernel //p' /sys/fs/cgroup/agent/memory.stat";
        let text = task.output(script)?;
        let numbers: Vec<u64> = text
            .lines()
            .map(|line| Ok(line.trim().parse()?))
            .collect::<TestResult<_>>()?;
        let [files, tasks, anon, kernel] = numbers[..] else {
            return Err(failure(text));
        };
        Ok(Self {
            open_files: least_open_files(&processes)?,
            threads: processes
                .iter()
                .map(Process::threads)
                .collect::<TestResult<_>>()?,
            memory_kib: processes
                .iter()
                .map(Process::anonymous_kib)
                .collect::<TestResult<_>>()?,
            guest: [files, tasks],
            agent_kib: [anon >> 10, kernel >> 10],
        })
    }
}

/// The fewest open files of each process in half a second: the streams of an exec that was just
/// told to have ended may still be closing.
fn least_open_files(processes: &[Process]) -> TestResult<Vec<usize>> {
    let mut least = vec![usize::MAX; processes.len()];
    for _ in 0..10 {
        for (least, process) in least.iter_mut().zip(processes) {
            *least = process.open_files()?.min(*least);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(least)
}

/// How many hundreds of execs the sample has: set it for a longer run by hand.
const HUNDREDS: &str = "KATA_LIKE_HUNDREDS_OF_EXECS";

/// A container whose command is missing fails at once, and leaves nothing.
fn missing(host: &Host, task: &Task) -> TestResult {
    let exec = host.name("missing");
    let command = serde_json::json!({"args": ["nope"]});
    done(task.exec(&exec, &command, &Streams::default())?)?;
    let why = refused(task.start(&exec)?)?;
    let words = "executable file not found in $PATH";
    assert!(why.text.contains(words), "{why:?}");
    done(task.delete(&exec)?).map(drop)
}

/// A container that sees the guest's cgroups.
fn without_a_cgroup_namespace(pod: &ShimPod) -> TestResult<Task> {
    let mut spec = pod.spec(&["sleep", "1000"]);
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    namespaces
        .ok_or_else(|| failure("no namespaces"))?
        .retain(|namespace| namespace["type"] != "cgroup");
    let mounts = spec["mounts"].as_array_mut();
    mounts
        .ok_or_else(|| failure("no mounts"))?
        .push(serde_json::json!({
        "type": "cgroup", "source": "cgroup", "destination": "/sys/fs/cgroup", "options": ["ro"]}));
    let task = pod.task("churn");
    done(task.create(&spec, &Streams::default())?)?;
    done(task.start("")?)?;
    Ok(task)
}

/// `times` execs, two at a time. Every fifth can't be started.
fn churn(host: &Host, task: &Task, streams: &Streams, times: usize) -> TestResult {
    std::thread::scope(|scope| {
        let work = || -> TestResult {
            for number in 0..times / 2 {
                if number % 5 == 4 {
                    missing(host, task)?;
                    continue;
                }
                let code = number % 7;
                let script = format!("echo {code}; exit {code}");
                let status = task.run_with(&["sh", "-c", &script], streams)?;
                assert_eq!(status as usize, code);
            }
            Ok(())
        };
        let workers = [scope.spawn(work), scope.spawn(work)];
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| failure("a worker panicked"))?)
    })
}

/// A sample of ten thousand: an exec gives back what it takes, on the host and in the guest. Every
/// fifth can't be started.
#[test]
fn execs_give_back_what_they_take() -> TestResult {
    kata_like_only!();
    const FIRST: usize = 40;
    const MOST_KIB: u64 = 200;
    let hundreds: usize = match std::env::var(HUNDREDS) {
        Ok(number) => number.parse()?,
        Err(_) => 1,
    };
    let many = 100 * hundreds;
    let host = Host::alone()?;
    let pod = ShimPod::start(&host)?;
    let task = without_a_cgroup_namespace(&pod)?;
    let output = pod.files().join("all");
    fs::write(&output, "")?;
    let streams = Streams {
        stdout: output.display().to_string(),
        ..Streams::default()
    };
    let run = |times: usize| churn(&host, &task, &streams, times);
    run(FIRST)?; // what stays after the first time is no leak
    let bundle = || -> TestResult<Vec<_>> {
        let entries = fs::read_dir(pod.files().join(task.id()))?;
        let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        Ok(names)
    };
    let (before, footprint, files) = (InUse::of(&pod, &task)?, host.footprint(), bundle()?);
    let begun = std::time::Instant::now();
    for hundred in 1..=hundreds {
        run(100)?;
        println!("{hundred}00 execs: {:?}", InUse::of(&pod, &task)?);
    }
    figures::note(&format!(
        "{many} execs, two at a time: {:.1} s",
        begun.elapsed().as_secs_f32()
    ));
    host.leaves_nothing(&footprint)?;
    assert_eq!(bundle()?, files);
    let after = InUse::of(&pod, &task)?;
    let what = format!("{before:?} before {many} execs, {after:?} after them");
    let more = |(after, before): (&usize, &usize)| after > before;
    let mut files = after.open_files.iter().zip(&before.open_files);
    assert!(!files.any(more), "{what}");
    let grown = |after: &[u64], before: &[u64], most: u64| {
        after
            .iter()
            .zip(before)
            .any(|(after, before)| *after > before + most)
    };
    assert!(!grown(&after.guest, &before.guest, 2), "{what}");
    // Threads that wait for files come and go.
    assert!(!grown(&after.threads, &before.threads, 4), "{what}");
    assert!(
        !grown(&after.memory_kib, &before.memory_kib, MOST_KIB),
        "{what}"
    );
    assert!(
        !grown(&after.agent_kib, &before.agent_kib, MOST_KIB),
        "{what}"
    );
    let text = fs::read_to_string(&output)?;
    assert_eq!(text.lines().count(), (FIRST + many) * 4 / 5);
    task.end()?;
    pod.remove()
}
