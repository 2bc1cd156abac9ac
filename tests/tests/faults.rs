//! Whatever dies, the pod ends within a second, says why, and leaves nothing behind.
//!
//! Each test has the host alone, breaks one thing, and compares the host before and after. Where
//! runc has the same part (shim, containerd, a process killed for memory) it is the oracle.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api;
use kata_like_tests::annotations::{Role, annotate};
use kata_like_tests::process::{Process, until};
use kata_like_tests::rootfs::{Rootfs, join_namespace};
use kata_like_tests::task::{KILL, Streams, Task};
use kata_like_tests::task_api::{SERVICES, TaskApi, done};
use kata_like_tests::{
    Aftermath, CtrContainer, CtrPod, Host, Parts, TestResult, failure, figures, in_time, is_oracle,
    kata_like_only,
};
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);

/// Kills one of the pod's processes. The pod's end must be told within a second.
fn kill_and_expect_end(role: &str) -> TestResult {
    let host = Host::alone()?;
    let aftermath = Aftermath::expect(&host)?;
    let events = host.events()?;
    let pod = host.start("killed", &[], &["sleep", "1000"])?;
    let victim = pod.process(role)?;
    let killed = Instant::now();
    victim.signal(Signal::KILL)?;
    let took = Aftermath::killed_within(&events, pod.id(), killed, SECOND)?;
    figures::note(&format!(
        "{role} killed: exit event after {} ms",
        took.as_millis()
    ));
    pod.wait_status("STOPPED", 2 * SECOND)?;
    assert_eq!(pod.delete()?, 137);
    drop(events);
    aftermath.end()
}

#[test]
fn killing_the_vmm_ends_the_pod() -> TestResult {
    kata_like_only!();
    kill_and_expect_end("vmm")
}

#[test]
fn killing_the_fs_server_ends_the_pod() -> TestResult {
    kata_like_only!();
    kill_and_expect_end("fsd")
}

#[test]
fn killing_the_proxy_ends_the_pod() -> TestResult {
    kata_like_only!();
    kill_and_expect_end("proxy")
}

/// containerd runs `delete` for each container of a dead shim. Within five seconds the whole pod is
/// gone, its exits are told, and the hooks that undo others have run once each.
#[test]
fn killing_the_shim_ends_all_of_the_pod() -> TestResult {
    let host = Host::alone()?;
    let aftermath = Aftermath::expect(&host)?;
    let rootfs = Rootfs::mount(&host)?;
    let place = PathBuf::from(format!("/run/{}", host.name("hooks")));
    std::fs::create_dir(&place)?;
    let mut spec = rootfs.spec(&["sleep", "1000"])?;
    let (sandbox, container) = (host.name("sandbox"), host.name("container"));
    let mut start = |id: &str, role: Role, network: Option<&str>| {
        let script = format!("echo undone >>{}/{id}", place.display());
        spec["hooks"]["poststop"] =
            serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
        annotate(&mut spec, role, &sandbox);
        if let Some(network) = network {
            join_namespace(&mut spec, "network", network);
        }
        rootfs.start(id, &spec)
    };
    let first = start(&sandbox, Role::Sandbox, None)?;
    let network = format!("/proc/{}/ns/net", first.status()?.1);
    let second = start(&container, Role::Container, Some(&network))?;
    let events = host.events()?;
    let shim = first.process("shim")?;
    let roles: &[&str] = match is_oracle() {
        true => &[],
        false => &["vmm", "fsd", "proxy"],
    };
    let others = roles.iter().map(|role| first.process(role));
    let others: Vec<Process> = others.collect::<TestResult<_>>()?;
    let killed = Instant::now();
    shim.signal(Signal::KILL)?;
    for other in others {
        let gone = format!("{} is gone", other.name);
        until(&gone, SECOND, || !other.is_alive())?;
    }
    for id in [&sandbox, &container] {
        let took = Aftermath::killed_within(&events, id, killed, 5 * SECOND)?;
        figures::note(&format!(
            "shim killed: exit event of one of two after {} ms",
            took.as_millis()
        ));
        let undone = std::fs::read_to_string(place.join(id))
            .map_err(|error| failure(format!("hook of {id}: {error}")))?;
        assert_eq!(undone, "undone\n", "{id}");
    }
    // containerd has cleaned up; only the containers' records are left.
    second.remove_container()?;
    first.remove_container()?;
    std::fs::remove_dir_all(place)?;
    drop((events, rootfs));
    aftermath.end()
}

/// The stand-in's pid is the task: to kill it is to kill the task.
#[test]
fn killing_the_tasks_pid_ends_the_task() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let events = host.events()?;
    let pod = host.start("stood-for", &[], &["sleep", "1000"])?;
    let (_, pid) = pod.status()?;
    let victim = Process::find(pid).ok_or_else(|| failure(format!("no process {pid}")))?;
    let killed = Instant::now();
    victim.signal(Signal::KILL)?;
    let exit = events.exit(pod.id(), pod.id(), 10 * SECOND)?;
    assert_eq!(exit.status(), 137);
    assert!(
        exit.at.duration_since(killed) < SECOND,
        "{:?}",
        exit.at.duration_since(killed)
    );
    assert_eq!(pod.delete()?, 137);
    drop(events);
    host.leaves_nothing(&before)
}

/// The guest's kernel panics: its last words are in the log, and the pod ends.
#[test]
fn a_guest_that_panics_ends_the_pod() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let aftermath = Aftermath::expect(&host)?;
    let events = host.events()?;
    // OOM is a panic once this switch is 2. A proc of our own is writable.
    let script = "mkdir /tmp/proc && mount -t proc proc /tmp/proc && \
        echo 2 >/tmp/proc/sys/vm/panic_on_oom && echo set && read -r go && tail /dev/zero";
    let options = ["--cap-add", "CAP_SYS_ADMIN", "--memory-limit", "33554432"];
    let pod = host.start("panics", &options, &["sh", "-c", script])?;
    let attach = host.ctr(["task", "attach", pod.id()]).input("go\n");
    let attached = thread::spawn(move || attach.output());
    let exit = events.exit(pod.id(), pod.id(), 60 * SECOND)?;
    assert_eq!(exit.status(), 137, "{exit:?}");
    let _ = attached.join();
    let log = host.log();
    assert!(
        log.contains("Kernel panic") && log.contains("panic_on_oom"),
        "no panic in: {log}"
    );
    pod.remove_container()?;
    drop(events);
    aftermath.end()
}

/// The whole guest is out of memory, and the container has no limit of its own. Only the greedy
/// process is killed, and the log says what sized the guest.
#[test]
fn a_guest_out_of_memory_keeps_its_agent() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    let config = "/run/small.toml";
    std::fs::write(config, "memory_mib = 160\n")?;
    let options = ["--runtime-config-path", config];
    let pod = host.start("crowded", &options, &["sleep", "1000"])?;
    let hog = pod.exec(&["tail", "/dev/zero"])?;
    assert_eq!(hog.status, 137, "{}", hog.both());
    assert_eq!(pod.exec(&["echo", "lives"])?.text(), "lives");
    let words =
        "it has no limit of its own; the pod's virtual machine has 160 MiB, sized by `memory_mib`";
    assert!(
        host.log().contains(words),
        "no {words:?} in: {}",
        host.log()
    );
    pod.remove()?;
    host.leaves_nothing(&before)
}

/// containerd is killed and returns while containers run, are paused and have stopped. They don't
/// notice. Their shim answers all the while, and each exit meanwhile is told once.
#[test]
fn containerd_restarts_under_containers_in_every_state() -> TestResult {
    // runc's shim names no process of a stopped task, so containerd takes the task for lost and
    // deletes it.
    kata_like_only!();
    // At this level it logs each event that it receives.
    let host = Host::logging("trace")?;
    let before = host.footprint();
    let sandbox = CtrPod::start(&host, &[])?;
    let trapping = [
        "sh",
        "-c",
        "trap 'exit 23' TERM; while :; do sleep 0.1; done",
    ];
    let running = sandbox.container("runs", &[], &trapping)?;
    let ending = sandbox.container("ends", &[], &trapping)?;
    let paused = sandbox.container("paused", &[], &["sleep", "1000"])?;
    let stopped = sandbox.container("stopped", &[], &["sh", "-c", "exit 5"])?;
    host.ctr(["task", "pause", paused.id()]).ok()?;
    let all = [&running, &ending, &paused, &stopped];
    let tasks: Vec<Task> = all
        .iter()
        .map(|pod| Task::of(&host, pod.id()))
        .collect::<TestResult<_>>()?;
    let [runs, ends, _, stops] = &tasks[..] else {
        return Err(failure("not four tasks"));
    };
    assert_eq!(done(stops.wait("")?)?, 5);
    let pids: Vec<String> = tasks
        .iter()
        .map(|task| Ok(done(task.state("")?)?.pid.to_string()))
        .collect::<TestResult<_>>()?;

    host.kill_containerd()?;
    let before_the_gap = host.log().len();
    let exits = || {
        let log = host.log();
        let lines = log.get(before_the_gap..).unwrap_or_default().lines();
        lines
            .filter(|line| line.contains("topic=/tasks/exit") && !line.contains("level=error"))
            .count()
    };
    assert_eq!(runs.run(&["sh", "-c", "exit 6"])?, 6);
    let long = serde_json::json!({"args": ["sleep", "1000"]});
    done(runs.exec("long", &long, &Streams::default())?)?;
    done(runs.start("long")?)?;
    done(ends.kill("", 15, false)?)?;
    assert_eq!(done(ends.wait("")?)?, 23);
    thread::scope(|scope| -> TestResult {
        let start = scope.spawn(|| host.start_containerd());
        // An exec also works while containerd starts.
        assert_eq!(runs.run(&["true"])?, 0);
        done(runs.kill("long", KILL, false)?)?;
        assert_eq!(done(runs.wait("long")?)?, 137);
        start.join().map_err(|_| failure("the start panicked"))?
    })?;
    let states = ["RUNNING", "STOPPED", "PAUSED", "STOPPED"];
    let wanted = all.iter().zip(&pids).zip(states);
    are_listed(
        &host,
        wanted.map(|((pod, pid), state)| [pod.id(), pid, state]),
    )?;
    // Those of three execs and an init.
    until("the exits are told", 30 * SECOND, || exits() >= 4)?;
    host.ctr(["task", "resume", paused.id()]).ok()?;
    assert_eq!(paused.exec(&["echo", "after"])?.text(), "after");
    assert_eq!(ending.delete()?, 23);
    assert_eq!(stopped.delete()?, 5);
    // The fifth is that of ctr's exec.
    assert_eq!(exits(), 5, "exits that were told");
    assert_eq!(running.kill("TERM")?.status, 0);
    assert_eq!(done(runs.wait("")?)?, 23);
    assert_eq!(running.delete()?, 23);
    drop(tasks);
    paused.remove()?;
    sandbox.remove()?;
    host.leaves_nothing_but_containerd(&before)
}

/// `ctr task ls` has these lines of id, pid and state.
fn are_listed<'a>(host: &Host, tasks: impl Iterator<Item = [&'a str; 3]>) -> TestResult {
    let list = host.ctr(["task", "ls"]).ok()?.text();
    let list: Vec<Vec<&str>> = list
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    for wanted in tasks {
        assert!(list.contains(&wanted.to_vec()), "{wanted:?}: {list:?}");
    }
    Ok(())
}

/// While the guest answers nothing, State, Kill and Delete answer within a second, and the pod can
/// still be removed.
#[test]
fn a_guest_that_hangs_holds_up_no_answer() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    let pod = host.start("hangs", &[], &["sleep", "1000"])?;
    let vmm = pod.process("vmm")?;
    vmm.signal(Signal::STOP)?;
    let bundle = host.bundle(pod.id());
    let id = pod.id().to_owned();
    let stats = thread::spawn(move || -> TestResult<bool> {
        let api = TaskApi::connect(&bundle, SERVICES[1])?;
        let request = api::StatsRequest {
            id,
            ..Default::default()
        };
        // The guest can't answer it: an error is right, an endless wait is not.
        Ok(api
            .call::<api::StatsResponse>("Stats", &request, 60 * SECOND)?
            .0
            .is_err())
    });
    thread::sleep(SECOND / 2);
    let api = TaskApi::connect(&host.bundle(pod.id()), SERVICES[1])?;
    let request = api::StateRequest {
        id: pod.id().into(),
        ..Default::default()
    };
    let (state, took) = api.call::<api::StateResponse>("State", &request, 5 * SECOND)?;
    let state = state.map_err(|refusal| failure(format!("State: {refusal:?}")))?;
    assert_eq!(state.status, api::Status::RUNNING.into());
    assert!(in_time(took, SECOND), "State took {took:?}");
    let request = api::DeleteRequest {
        id: pod.id().into(),
        ..Default::default()
    };
    let (answer, took) = api.call::<api::DeleteResponse>("Delete", &request, 5 * SECOND)?;
    assert!(answer.is_err(), "a running task was deleted");
    assert!(in_time(took, SECOND), "Delete took {took:?}");
    let request = api::KillRequest {
        id: pod.id().into(),
        signal: 9,
        ..Default::default()
    };
    let (_, took) = api.call::<api::Empty>("Kill", &request, 5 * SECOND)?;
    assert!(in_time(took, SECOND), "Kill took {took:?}");
    pod.remove()?;
    let failed = stats
        .join()
        .map_err(|_| failure("the thread of Stats panicked"))??;
    assert!(failed, "a stopped guest gave figures");
    host.leaves_nothing(&before)
}

/// Each of a pod's processes stands still for two seconds, and then the whole cgroup that they are
/// in. containerd answers meanwhile, and the pod goes on where it was.
#[test]
fn a_pod_that_stands_still_goes_on() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let aftermath = Aftermath::expect(&host)?;
    let pod = host.start("still", &[], &["sleep", "1000"])?;
    let shim = pod.process("shim")?;
    let cgroup = shim.read("cgroup")?;
    let cgroup = cgroup.trim().trim_start_matches("0::");
    let freeze = PathBuf::from(format!("/sys/fs/cgroup{cgroup}/cgroup.freeze"));
    let mut parts = Parts::new();
    for role in ["vmm", "fsd", "shim", "cgroup"] {
        parts.run(role, || {
            let stand_still = |still: bool| -> TestResult {
                let signal = if still { Signal::STOP } else { Signal::CONT };
                match role {
                    "cgroup" => Ok(std::fs::write(&freeze, if still { "1" } else { "0" })?),
                    role => pod.process(role)?.signal(signal),
                }
            };
            stand_still(true)?;
            thread::sleep(2 * SECOND);
            let list = host.ctr(["task", "ls"]).deadline(20 * SECOND).output();
            stand_still(false)?;
            assert_eq!(
                list?.status, 0,
                "containerd waits for a pod that stands still"
            );
            assert_eq!(pod.exec(&["echo", role])?.text(), role);
            assert_eq!(pod.status()?.0, "RUNNING");
            Ok(())
        });
    }
    parts.run("the end", || {
        pod.remove()?;
        aftermath.end()
    });
    parts.end()
}

/// containerd dies while a container is being made: the shim sees that nobody wants the container,
/// and goes.
#[test]
fn containerd_dies_during_create() -> TestResult {
    kata_like_only!(); // runc's shim stays
    let host = Host::alone()?;
    let id = host.name("orphan");
    let before = host.footprint();
    let mut create = host
        .ctr([
            "run",
            "-d",
            "--runtime",
            &kata_like_tests::runtime(),
            kata_like_tests::IMAGE,
            &id,
            "sleep",
            "1000",
        ])
        .spawn()?;
    until("a shim", 30 * SECOND, || shim_of(&id).is_some())?;
    host.kill_containerd()?;
    let _ = create.wait();
    host.start_containerd()?;
    let _ = host.ctr(["task", "rm", "--force", &id]).output()?;
    let _ = host.ctr(["container", "rm", &id]).output()?;
    until("the shim is gone", 60 * SECOND, || shim_of(&id).is_none())?;
    host.leaves_nothing_but_containerd(&before)
}

fn shim_of(id: &str) -> Option<Process> {
    Process::all().into_iter().find(|process| {
        process.is("containerd-shim") && process.arguments.iter().any(|argument| argument == id)
    })
}

/// What the guest's kernel and agent log is on the host, bounded, and gone with the pod. It has the
/// agent's steps up to its dial.
#[test]
fn the_guests_log_is_on_the_host() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod: CtrContainer<'_> = host.start("logs", &[], &["sleep", "1000"])?;
    let path = pod.state_folder().join("guest.log");
    let mut log = String::new();
    until("the guest's log", 10 * SECOND, || {
        log = std::fs::read_to_string(&path).unwrap_or_default();
        let lines = [
            "Linux version",
            "the agent has begun",
            "file systems are mounted",
            "dial the host",
        ];
        lines.iter().all(|line| log.contains(line))
    })
    .map_err(|error| failure(format!("{error}: {}: {log:?}", path.display())))?;
    assert!(!is_oracle());
    pod.remove()?;
    assert!(!path.exists());
    Ok(())
}
