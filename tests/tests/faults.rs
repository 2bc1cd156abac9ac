//! Whatever dies, the pod ends within a second, says why, and leaves nothing behind.
//!
//! Each test has the host alone, breaks one thing, and compares the host before and after. Where
//! runc has the same part (shim, containerd, a process killed for memory) it is the oracle.

use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api;
use kata_like_tests::process::{Process, until};
use kata_like_tests::task_api::{SERVICES, TaskApi};
use kata_like_tests::{Host, Pod, TestResult, failure, figures, is_oracle, kata_like_only};
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);

/// Kills one of the pod's processes; the pod's end must be told within a second.
fn kill_and_expect_end(role: &str) -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let events = host.events()?;
    let pod = host.start("killed", &[], &["sleep", "1000"])?;
    let victim = pod.process(role)?;
    let killed = Instant::now();
    victim.signal(Signal::KILL)?;
    let exit = events.exit(pod.id(), pod.id(), 10 * SECOND)?;
    let took = exit.at.duration_since(killed);
    assert_eq!(exit.status(), 137, "{exit:?}");
    assert!(took < SECOND, "exit after {took:?}");
    figures::note(&format!(
        "{role} killed: exit event after {} ms",
        took.as_millis()
    ));
    if role == "shim" {
        // containerd has cleaned up; only the container's record is left.
        pod.remove_container()?;
    } else {
        pod.wait_status("STOPPED", 2 * SECOND)?;
        assert_eq!(pod.delete()?, 137);
    }
    drop(events);
    host.leaves_nothing(&before)
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
fn killing_the_shim_ends_the_pod() -> TestResult {
    kill_and_expect_end("shim")
}

/// The host pid that stands for a task is the task: who kills it, kills the task.
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

/// The guest's kernel panics: its last words are in the log, the pod ends.
#[test]
fn a_guest_that_panics_ends_the_pod() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    let events = host.events()?;
    // Lack of memory is a panic once this switch is set to 2. A proc of our own is writable.
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
    host.leaves_nothing(&before)
}

/// Who takes too much memory is killed, and only that process: the agent and the next exec live.
#[test]
fn a_process_killed_for_memory_takes_nobody_along() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let pod = host.start(
        "hungry",
        &["--memory-limit", "67108864"],
        &["sleep", "1000"],
    )?;
    let hog = pod.exec(&["tail", "/dev/zero"])?;
    assert_eq!(hog.status, 137, "{}", hog.both());
    assert_eq!(pod.exec(&["echo", "lives"])?.text(), "lives");
    assert_eq!(pod.status()?.0, "RUNNING");
    pod.remove()?;
    host.leaves_nothing(&before)
}

/// The same without a limit of the container's own: the whole guest is out of memory.
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
    pod.remove()?;
    host.leaves_nothing(&before)
}

/// containerd comes and goes; the container does not notice, and its exit code is not lost.
#[test]
fn containerd_restarts_under_a_running_container() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let script = "trap 'exit 23' TERM; while :; do sleep 0.1; done";
    let pod = host.start("outlives", &[], &["sh", "-c", script])?;
    let (_, pid) = pod.status()?;
    host.kill_containerd()?;
    host.start_containerd()?;
    assert_eq!(pod.status()?, ("RUNNING".to_owned(), pid));
    assert_eq!(pod.exec(&["echo", "after"])?.text(), "after");
    // An exit while containerd is away is found when it is back.
    host.kill_containerd()?;
    Process::all()
        .into_iter()
        .find(|process| process.pid == pid)
        .ok_or_else(|| failure("the task's process went with containerd"))?;
    host.start_containerd()?;
    assert_eq!(pod.kill("TERM")?.status, 0);
    pod.wait_status("STOPPED", 10 * SECOND)?;
    assert_eq!(pod.delete()?, 23);
    host.leaves_nothing_but_containerd(&before)
}

/// State, Kill and Delete answer within a second while the guest answers nothing, and the pod can
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
        // It can't be answered by the guest: an error is right, an endless wait is not.
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
    assert!(took < SECOND, "State took {took:?}");
    let request = api::DeleteRequest {
        id: pod.id().into(),
        ..Default::default()
    };
    let (answer, took) = api.call::<api::DeleteResponse>("Delete", &request, 5 * SECOND)?;
    assert!(answer.is_err(), "a running task was deleted");
    assert!(took < SECOND, "Delete took {took:?}");
    let request = api::KillRequest {
        id: pod.id().into(),
        signal: 9,
        ..Default::default()
    };
    let (_, took) = api.call::<api::Empty>("Kill", &request, 5 * SECOND)?;
    assert!(took < SECOND, "Kill took {took:?}");
    pod.remove()?;
    let failed = stats
        .join()
        .map_err(|_| failure("the thread of Stats panicked"))??;
    assert!(failed, "a stopped guest gave figures");
    host.leaves_nothing(&before)
}

/// containerd dies while a container is being made: the shim sees that nobody wants it, and goes.
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

/// What the guest's kernel and agent say is on the host, bounded, and gone with the pod.
#[test]
fn the_guests_log_is_on_the_host() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod: Pod<'_> = host.start("logs", &[], &["sleep", "1000"])?;
    let path = pod.state_folder().join("guest.log");
    let mut log = String::new();
    until("the guest's log", 10 * SECOND, || {
        log = std::fs::read_to_string(&path).unwrap_or_default();
        log.contains("Linux version")
    })
    .map_err(|error| failure(format!("{error}: {}: {log:?}", path.display())))?;
    assert!(!is_oracle());
    pod.remove()?;
    assert!(!path.exists());
    Ok(())
}
