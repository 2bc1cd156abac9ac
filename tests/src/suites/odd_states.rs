//! Each call of the task API in each state of a task, as cases of one pod.
//!
//! `task_states.rs` runs them under containerd 2.1 and `containerd_1_7.rs` under 1.7. Callers rely
//! on the answers of runc's shim, so all cases also run against it. Where a code is asserted only
//! for kata-like, runc's shim has a poorer one.

use std::time::Duration;

use crate::shim_pod::{Case, ShimPod};
use crate::task::{KILL, Streams, Task};
use crate::task_api::{Answer, done, refused};
use crate::{TestResult, failure, is_oracle};
use containerd_shim_protos::api::{
    CheckpointTaskRequest, ConnectRequest, ConnectResponse, Empty, ShutdownRequest, Status,
    WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::Code;
use serde_json::json;

mod limits;

/// All cases; containerd 1.7 gets the first eleven.
pub const CASES: [Case; 14] = [
    ("a create that fails leaves nothing", failed_create),
    ("created", created),
    ("created and killed", killed_before_its_start),
    ("running", running),
    ("paused", paused),
    ("stopped", stopped),
    ("deleted", deleted),
    ("an exec's life", execs),
    ("an exec on a terminal", exec_on_a_terminal),
    ("update", limits::update),
    ("stats", limits::stats),
    ("stats of a disk", limits::stats_of_a_disk),
    ("an exec that can't start", failed_exec),
    ("kill of one and of all", kill_of_one_and_of_all),
];

/// "No time" in a timestamp, in seconds: the year 1.
const NO_TIME: i64 = -62_135_596_800;
const TERM: u32 = 15;
const MINUTE: Duration = Duration::from_secs(60);
const SLEEP: [&str; 2] = ["sleep", "1000"];

fn nothing() -> Streams {
    Streams::default()
}

/// Refused with this code, and with this text in the message.
fn refused_as<T: std::fmt::Debug>(answer: Answer<T>, code: Code, words: &str) -> TestResult {
    let refusal = refused(answer)?;
    if refusal.code == code && refusal.text.contains(words) {
        return Ok(());
    }
    Err(failure(format!("not {code:?} with {words:?}: {refusal:?}")))
}

/// containerd deletes what it could not create: the answer must be that nothing is there.
fn failed_create(pod: &ShimPod) -> TestResult {
    let bad = Streams {
        stdout: "carrier-pigeon:///somewhere".into(),
        stderr: "carrier-pigeon:///somewhere".into(),
        ..Streams::default()
    };
    let gone = |task: &Task| -> TestResult {
        refused_as(task.delete("")?, Code::NOT_FOUND, "")?;
        refused_as(task.state("")?, Code::NOT_FOUND, "")
    };
    let task = pod.task("streams");
    let refusal = refused(task.create(&pod.spec(&SLEEP), &bad)?)?;
    assert!(refusal.text.contains("carrier-pigeon"), "{refusal:?}");
    gone(&task)?;
    let task = pod.task("missing");
    let refusal = refused(task.create(&pod.spec(&["/no/such"]), &nothing())?)?;
    assert!(
        refusal.text.contains("no such file or directory"),
        "{refusal:?}"
    );
    gone(&task)?;
    if is_oracle() {
        return Ok(());
    }
    let task = pod.task("options");
    let answer = task.create_with(&pod.spec(&SLEEP), &nothing(), |request| {
        request.options = Some(Any {
            type_url: "of.nobody.Options".into(),
            ..Any::default()
        })
        .into();
    })?;
    refused_as(answer, Code::INVALID_ARGUMENT, "of.nobody.Options")?;
    gone(&task)?;
    let task = pod.task("checkpoint");
    let answer = task.create_with(&pod.spec(&SLEEP), &nothing(), |request| {
        request.checkpoint = "/somewhere".into();
    })?;
    refused_as(answer, Code::UNKNOWN, "not supported")?;
    gone(&task)?;
    let task = pod.run("twice", &SLEEP)?;
    let again = task.create(&pod.spec(&SLEEP), &nothing())?;
    refused_as(again, Code::ALREADY_EXISTS, task.id())?;
    assert_eq!(task.status("")?, Status::RUNNING);
    task.end()
}

fn created(pod: &ShimPod) -> TestResult {
    let task = pod.task("created");
    let pid = done(task.create(&pod.spec(&SLEEP), &nothing())?)?;
    let state = done(task.state("")?)?;
    assert_eq!((state.status, state.pid), (Status::CREATED.into(), pid));
    assert_eq!(state.exited_at.seconds, NO_TIME, "{state:?}");
    assert_eq!((state.id.as_str(), state.terminal), (task.id(), false));
    let pids = done(task.pids()?)?;
    assert!(pids.contains(&(pid, String::new())), "{pids:?}");
    for answer in [task.pause()?, task.resume()?] {
        refused_as(answer, Code::UNKNOWN, "")?;
    }
    done(task.update(&json!({"pids": {"limit": 77}}))?)?;
    done(task.stats()?)?;
    done(task.resize("", 80, 24)?)?;
    done(task.close_stdin("")?)?;
    // Processes can start in it before its own does.
    assert_eq!(task.run(&["sh", "-c", "exit 4"])?, 4);
    assert_eq!(done(task.start("")?)?, pid);
    assert_eq!(task.status("")?, Status::RUNNING);
    task.end()?;

    // A task that was never started can be deleted.
    let task = pod.task("created");
    done(task.create(&pod.spec(&SLEEP), &nothing())?)?;
    let deleted = done(task.delete("")?)?;
    assert!(is_oracle() || deleted.exit_status == 137, "{deleted:?}");
    refused_as(task.state("")?, Code::NOT_FOUND, "")
}

/// An exit without a start is legal.
fn killed_before_its_start(pod: &ShimPod) -> TestResult {
    let task = pod.task("killed");
    done(task.create(&pod.spec(&SLEEP), &nothing())?)?;
    // Wait may come before the end, and from many callers.
    std::thread::scope(|scope| -> TestResult {
        let waits = [(); 3].map(|()| {
            let (api, request) = (pod.connect(), task.waiting(""));
            scope.spawn(move || -> TestResult<u32> {
                let (answer, _) = api?.call::<WaitResponse>("Wait", &request, MINUTE)?;
                Ok(done(answer)?.exit_status)
            })
        });
        std::thread::sleep(Duration::from_millis(300));
        done(task.kill("", KILL, false)?)?;
        for wait in waits {
            assert_eq!(wait.join().map_err(|_| failure("Wait panicked"))??, 137);
        }
        Ok(())
    })?;
    assert_eq!(task.status("")?, Status::STOPPED);
    refused_as(task.start("")?, Code::UNKNOWN, "")?;
    assert_eq!(done(task.delete("")?)?.exit_status, 137);
    Ok(())
}

fn running(pod: &ShimPod) -> TestResult {
    let task = pod.run("running", &SLEEP)?;
    refused_as(
        task.start("")?,
        Code::UNKNOWN,
        "cannot start a running process",
    )?;
    refused_as(
        task.delete("")?,
        Code::UNKNOWN,
        "cannot delete a running process",
    )?;
    refused_as(task.resume()?, Code::UNKNOWN, "")?;
    // Without a terminal and without an input there is nothing to do.
    done(task.resize("", 80, 24)?)?;
    done(task.close_stdin("")?)?;
    done(task.kill("", 0, false)?)?; // it is there
    if !is_oracle() {
        for signal in [65, 1000] {
            refused_as(
                task.kill("", signal, false)?,
                Code::INVALID_ARGUMENT,
                "is not 0 to 64",
            )?;
        }
    }
    if !is_oracle() {
        let request = CheckpointTaskRequest {
            id: task.id().into(),
            ..Default::default()
        };
        let answer = pod.call::<Empty>("Checkpoint", &request)?;
        refused_as(answer, Code::UNKNOWN, "not supported")?;
    }
    // The probe of a returning containerd never fails.
    let request = ConnectRequest {
        id: "nobody".into(),
        ..Default::default()
    };
    let connected: ConnectResponse = done(pod.call("Connect", &request)?)?;
    assert_eq!(connected.task_pid, 0);
    // While there is a task the shim's end is put off, however often it is requested.
    for _ in 0..2 {
        let request = ShutdownRequest {
            id: task.id().into(),
            now: true,
            ..Default::default()
        };
        let _: Empty = done(pod.call("Shutdown", &request)?)?;
    }
    assert_eq!(task.status("")?, Status::RUNNING);
    assert_eq!(task.run(&["sh", "-c", "exit 6"])?, 6);
    task.end()
}

fn paused(pod: &ShimPod) -> TestResult {
    let task = pod.run("paused", &SLEEP)?;
    done(task.exec("early", &json!({"args": ["true"]}), &nothing())?)?;
    done(task.exec("beside", &json!({"args": SLEEP}), &nothing())?)?;
    done(task.start("beside")?)?;
    done(task.pause()?)?;
    assert_eq!(task.status("")?, Status::PAUSED);
    assert_eq!(task.status("beside")?, Status::PAUSED);
    refused_as(task.pause()?, Code::UNKNOWN, "")?;
    refused_as(
        task.delete("")?,
        Code::UNKNOWN,
        "cannot delete a paused process",
    )?;
    let late = task.exec("late", &json!({"args": ["true"]}), &nothing())?;
    refused_as(late, Code::UNKNOWN, "paused")?;
    refused_as(task.start("early")?, Code::UNKNOWN, "")?;
    refused_as(
        task.start("")?,
        Code::UNKNOWN,
        "cannot start a paused process",
    )?;
    done(task.update(&json!({"pids": {"limit": 66}}))?)?;
    done(task.stats()?)?;
    assert_eq!(done(task.pids()?)?.len(), 2);
    done(task.resume()?)?;
    assert_eq!(task.status("")?, Status::RUNNING);
    refused_as(task.resume()?, Code::UNKNOWN, "")?;
    assert_eq!(task.run(&["sh", "-c", "exit 5"])?, 5);
    // It can be killed while it is paused.
    done(task.pause()?)?;
    done(task.kill("", KILL, false)?)?;
    assert_eq!(done(task.wait("")?)?, 137);
    assert_eq!(done(task.wait("beside")?)?, 137);
    assert_eq!(done(task.delete("")?)?.exit_status, 137);
    Ok(())
}

fn stopped(pod: &ShimPod) -> TestResult {
    let task = pod.run(
        "stopped",
        &["sh", "-c", "trap 'exit 21' TERM; sleep 1000 & wait"],
    )?;
    done(task.exec("early", &json!({"args": ["true"]}), &nothing())?)?;
    let pid = done(task.state("")?)?.pid;
    // It sets its trap a moment after its start.
    task.shows("ps -o args | grep -c '^sleep 1000'", "1")?;
    done(task.kill("", TERM, false)?)?;
    assert_eq!(done(task.wait("")?)?, 21);
    let state = done(task.state("")?)?;
    assert_eq!(
        (state.status, state.exit_status),
        (Status::STOPPED.into(), 21)
    );
    assert!(state.exited_at.seconds > 1_600_000_000, "{state:?}");
    // At once, however often.
    for _ in 0..2 {
        assert_eq!(done(task.wait("")?)?, 21);
    }
    for _ in 0..2 {
        refused_as(
            task.kill("", KILL, false)?,
            Code::NOT_FOUND,
            "process already finished",
        )?;
        done(task.kill("", KILL, true)?)?;
    }
    refused_as(task.start("")?, Code::UNKNOWN, "")?;
    refused_as(task.start("early")?, Code::FAILED_PRECONDITION, "")?;
    let late = task.exec("late", &json!({"args": ["true"]}), &nothing())?;
    refused_as(late, Code::UNKNOWN, "cannot exec in a stopped state")?;
    for answer in [task.pause()?, task.resume()?, task.update(&json!({}))?] {
        refused_as(answer, Code::UNKNOWN, "")?;
    }
    let pids = done(task.pids()?)?;
    // A returning containerd takes a task without processes for a lost one.
    assert!(is_oracle() || pids == [(pid, String::new())], "{pids:?}");
    done(task.stats()?)?;
    done(task.close_stdin("")?)?;
    let deleted = done(task.delete("")?)?;
    assert_eq!((deleted.exit_status, deleted.pid), (21, pid));
    assert_eq!(deleted.exited_at, state.exited_at);
    Ok(())
}

/// A late caller hears that nothing is there, and takes that for success.
fn deleted(pod: &ShimPod) -> TestResult {
    let task = pod.run("deleted", &["true"])?;
    assert_eq!(done(task.wait("")?)?, 0);
    done(task.delete("")?)?;
    for _ in 0..2 {
        refused_as(task.delete("")?, Code::NOT_FOUND, "")?;
        refused_as(task.kill("", KILL, true)?, Code::NOT_FOUND, "")?;
    }
    refused_as(task.state("")?, Code::NOT_FOUND, "")?;
    refused_as(task.wait("")?, Code::NOT_FOUND, "")?;
    refused_as(task.start("")?, Code::NOT_FOUND, "")?;
    refused_as(task.pids()?, Code::NOT_FOUND, "")?;
    refused_as(task.stats()?, Code::NOT_FOUND, "")?;
    for answer in [
        task.pause()?,
        task.resume()?,
        task.update(&json!({}))?,
        task.resize("", 80, 24)?,
        task.close_stdin("")?,
        task.exec("late", &json!({"args": ["true"]}), &nothing())?,
    ] {
        refused_as(answer, Code::NOT_FOUND, "")?;
    }
    // Its name is free.
    done(task.create(&pod.spec(&SLEEP), &nothing())?)?;
    done(task.start("")?)?;
    task.end()
}

fn execs(pod: &ShimPod) -> TestResult {
    let task = pod.run("execs", &SLEEP)?;
    refused_as(task.start("nobody")?, Code::NOT_FOUND, "")?;
    refused_as(task.state("nobody")?, Code::NOT_FOUND, "")?;
    refused_as(task.delete("nobody")?, Code::NOT_FOUND, "")?;
    refused_as(task.kill("nobody", KILL, false)?, Code::NOT_FOUND, "")?;

    let long = json!({"args": SLEEP});
    done(task.exec("one", &long, &nothing())?)?;
    refused_as(
        task.exec("one", &long, &nothing())?,
        Code::ALREADY_EXISTS,
        "one",
    )?;
    let state = done(task.state("one")?)?;
    assert_eq!((state.status, state.pid), (Status::CREATED.into(), 0));
    assert_eq!(state.exited_at.seconds, NO_TIME, "{state:?}");
    refused_as(
        task.kill("one", KILL, false)?,
        Code::FAILED_PRECONDITION,
        "",
    )?;
    let pid = done(task.start("one")?)?;
    let state = done(task.state("one")?)?;
    assert_eq!((state.status, state.pid), (Status::RUNNING.into(), pid));
    assert_eq!(state.id, "one");
    if !is_oracle() {
        // runc's shim then loses count of its execs, and panics when the container ends.
        refused_as(task.start("one")?, Code::UNKNOWN, "")?;
    }
    refused_as(
        task.delete("one")?,
        Code::UNKNOWN,
        "cannot delete a running process",
    )?;
    let pids = done(task.pids()?)?;
    assert!(pids.contains(&(pid, "one".into())), "{pids:?}");
    // `all` means nothing here: the container lives.
    done(task.kill("one", KILL, true)?)?;
    assert_eq!(done(task.wait("one")?)?, 137);
    assert_eq!(task.status("")?, Status::RUNNING);
    refused_as(
        task.kill("one", KILL, false)?,
        Code::NOT_FOUND,
        "process already finished",
    )?;
    assert_eq!(task.status("one")?, Status::STOPPED);
    assert_eq!(done(task.delete("one")?)?.exit_status, 137);
    refused_as(task.delete("one")?, Code::NOT_FOUND, "")?;
    refused_as(task.wait("one")?, Code::NOT_FOUND, "")?;

    // An exec that is only registered goes as well, and its name is free.
    for _ in 0..2 {
        done(task.exec("two", &long, &nothing())?)?;
        done(task.delete("two")?)?;
    }
    task.end()
}

/// The request decides on the terminal, and its size may come before the start.
fn exec_on_a_terminal(pod: &ShimPod) -> TestResult {
    let task = pod.run("execs", &SLEEP)?;
    let output = pod.files().join("on-terminal");
    std::fs::write(&output, "")?;
    let streams = Streams {
        stdout: output.display().to_string(),
        terminal: true,
        ..Streams::default()
    };
    let process = json!({"args": ["sh", "-c", "tty; stty size; pwd; id -u; echo $GREETING"],
        "terminal": false, "cwd": "/tmp", "user": {"uid": 1000, "gid": 1000},
        "env": ["PATH=/bin", "GREETING=hello"]});
    done(task.exec("three", &process, &streams)?)?;
    if !is_oracle() {
        // runc's shim loses the size.
        done(task.resize("three", 91, 33)?)?;
    }
    done(task.start("three")?)?;
    assert_eq!(done(task.wait("three")?)?, 0);
    if !is_oracle() {
        refused_as(task.resize("three", 80, 24)?, Code::UNKNOWN, "")?;
    }
    done(task.delete("three")?)?;
    let text = std::fs::read_to_string(&output)?.replace('\r', "");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("/dev/pts/"), "{text}");
    assert!(is_oracle() || lines[1] == "33 91", "{text}");
    assert_eq!(lines[2..], ["/tmp", "1000", "hello"], "{text}");
    task.end()
}

/// There is no exit event, nothing to wait for, and it can be deleted. A second start is refused,
/// and the shim lives.
fn failed_exec(pod: &ShimPod) -> TestResult {
    let task = pod.run("failed", &SLEEP)?;
    done(task.exec("broken", &json!({"args": ["/no/such"]}), &nothing())?)?;
    let words = "exec: \"/no/such\": stat /no/such: no such file or directory";
    let refusal = refused(task.start("broken")?)?;
    assert!(refusal.text.contains(words), "{refusal:?}");
    let state = done(task.state("broken")?)?;
    assert_eq!((state.status, state.pid), (Status::CREATED.into(), 0));
    // Not tried on runc's shim, which panics on a second start.
    if !is_oracle() {
        refused(task.start("broken")?)?;
    }
    assert_eq!(done(task.wait("broken")?)?, 0);
    done(task.delete("broken")?)?;
    assert_eq!(task.run(&["true"])?, 0);
    task.end()
}

fn kill_of_one_and_of_all(pod: &ShimPod) -> TestResult {
    let script = "(trap 'echo told >/tmp/child; exit' TERM; sleep 1000 & wait) & \
        trap 'echo told >/tmp/parent' TERM; echo >/tmp/ready; while :; do wait; sleep 0.1; done";
    let task = pod.run("both", &["sh", "-c", script])?;
    let told = "cd /tmp; for f in parent child; do [ -e $f ] && echo $f; done";
    task.shows(
        "ls /tmp/ready; ps -o args | grep -c '^sleep 1000'",
        "/tmp/ready\n1",
    )?;
    done(task.kill("", TERM, false)?)?;
    task.shows(told, "parent")?;
    done(task.kill("", TERM, true)?)?;
    task.shows(told, "parent\nchild")?;
    assert_eq!(task.status("")?, Status::RUNNING);
    task.output("rm /tmp/parent /tmp/child /tmp/ready")?;
    task.end()
}
