//! A task in its odd states: paused, with other limits, with a log of its own, after a failed exec,
//! with a stepped clock.
//!
//! Callers rely on the answers of runc's shim, so these tests also run against it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::process::until;
use kata_like_tests::rootfs::Rootfs;
use kata_like_tests::shim_pod::{self, ShimPod};
use kata_like_tests::suites::odd_states;
use kata_like_tests::{CtrContainer, Host, Parts, TestResult, failure, is_oracle, kata_like_only};
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);

/// Nothing runs in a paused container, no exec gets in, and it can be killed.
#[test]
fn a_paused_container_stands_still() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let log = PathBuf::from(format!("/run/{}", host.name("log")));
    let uri = format!("file://{}", log.display());
    let script = "while :; do echo tick; sleep 0.1; done";
    let pod = host.start("paused", &["--log-uri", &uri], &["sh", "-c", script])?;
    let ticks = || fs::metadata(&log).map_or(0, |about| about.len());
    let moves = |what: &str| -> TestResult {
        let before = ticks();
        until(what, 10 * SECOND, || ticks() > before)
    };
    moves("the first ticks")?;
    host.ctr(["task", "pause", pod.id()]).ok()?;
    pod.wait_status("PAUSED", 5 * SECOND)?;
    thread::sleep(SECOND / 2); // what was under way
    let before = ticks();
    thread::sleep(2 * SECOND);
    assert_eq!(ticks(), before, "a paused container goes on");

    let exec = pod.exec(&["true"])?;
    assert!(exec.error_text().contains("paused"), "{}", exec.both());
    let again = host.ctr(["task", "pause", pod.id()]).output()?;
    assert_ne!(again.status, 0, "paused twice");
    let deleted = host.ctr(["task", "rm", pod.id()]).output()?;
    assert_ne!(deleted.status, 0, "deleted while it was paused");

    host.ctr(["task", "resume", pod.id()]).ok()?;
    pod.wait_status("RUNNING", 5 * SECOND)?;
    moves("ticks after the pause")?;
    assert_eq!(pod.exec(&["echo", "lives"])?.text(), "lives");

    host.ctr(["task", "pause", pod.id()]).ok()?;
    assert_eq!(pod.kill("KILL")?.status, 0);
    assert_eq!(events.exit(pod.id(), pod.id(), 10 * SECOND)?.status(), 137);
    let topics: Vec<_> = events
        .of(pod.id())
        .into_iter()
        .filter(|event| event.topic != "/tasks/exit" || event.process() == pod.id())
        .map(|event| event.topic)
        .filter(|topic| {
            topic == "/tasks/paused" || topic == "/tasks/resumed" || topic == "/tasks/exit"
        })
        .collect();
    let wanted = [
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/paused",
        "/tasks/exit",
    ];
    assert_eq!(topics, wanted);
    assert_eq!(pod.delete()?, 137);
    fs::remove_file(log)?;
    Ok(())
}

/// Every call in every state: see `odd_states`.
#[test]
fn every_call_in_every_state() -> TestResult {
    let host = Host::shared()?;
    let pod = ShimPod::start(&host)?;
    shim_pod::run(&pod, &odd_states::CASES)?;
    pod.remove()
}

/// A logger gets both streams on descriptors of its own, says that it is ready, and ends with the
/// container.
#[test]
fn output_goes_to_a_loggers_program() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let place = PathBuf::from(format!("/run/{}", host.name("logger")));
    fs::create_dir(&place)?;
    let program = place.join("logger");
    let here = place.display();
    // Arguments are the URI's keys and values.
    let script = format!(
        "#!/bin/sh\ncat <&3 >{here}/stdout 5>&- & cat <&4 >{here}/stderr 5>&- & \
         echo \"$1 $2 $CONTAINER_ID $CONTAINER_NAMESPACE\" >{here}/told\nexec 5>&-\nwait\ntouch {here}/ended\n"
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{}?key=value", program.display());
    let command = ["sh", "-c", "echo out; echo err >&2; exit 3"];
    let pod = host.start("logged", &["--log-uri", &uri], &command)?;
    assert_eq!(events.exit(pod.id(), pod.id(), 60 * SECOND)?.status(), 3);
    let id = pod.id().to_owned();
    assert_eq!(pod.delete()?, 3);
    until("the logger's end", 15 * SECOND, || {
        place.join("ended").exists()
    })?;
    let read = |name: &str| fs::read_to_string(place.join(name)).unwrap_or_default();
    assert_eq!(
        (read("stdout"), read("stderr")),
        ("out\n".into(), "err\n".into())
    );
    let told = read("told");
    let namespace = kata_like_tests::host::NAMESPACE;
    assert_eq!(told.trim(), format!("key value {id} {namespace}"));
    fs::remove_dir_all(place)?;
    Ok(())
}

fn now() -> TestResult<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// How far the guest's clock is ahead of the host's, in seconds, and with which uncertainty.
fn ahead(pod: &CtrContainer) -> TestResult<(f64, f64)> {
    // Not counting the shell's own start: the time is taken once for the way there, and once for
    // both ways.
    let mut best = (0.0, f64::MAX);
    for _ in 0..3 {
        let begin = now()?;
        let output = pod.exec_call(&[], &[TOOL, "time"]).ok()?;
        let end = now()?;
        let guest: f64 = output.text().parse()?;
        let (middle, half) = ((begin + end) / 2.0, (end - begin) / 2.0);
        if half < best.1 {
            best = (guest - middle, half);
        }
    }
    Ok(best)
}

/// The host's clock is stepped by an hour, and back: the guest's follows within five seconds.
#[test]
fn the_guests_clock_follows_the_hosts() -> TestResult {
    kata_like_only!();
    if std::env::var("TEST_HOST").is_ok_and(|kind| kind != "emulated") {
        eprintln!("not on this machine: its clock is not the test's to step");
        return Ok(());
    }
    let host = Host::alone()?;
    let tool = Tool::new(&host)?;
    let pod = host.start("clock", &["--mount", &tool.mount()], &["sleep", "1000"])?;
    for hours in [1, -1] {
        step_clock(hours * 3600)?;
        thread::sleep(SECOND);
        let (ahead, uncertain) = ahead(&pod)?;
        assert!(
            ahead.abs() < uncertain + 0.1,
            "{ahead} s, known to {uncertain} s"
        );
    }
    // A VM that was stopped for a while has lost no time, either.
    let vmm = pod.process("vmm")?;
    vmm.signal(Signal::STOP)?;
    thread::sleep(30 * SECOND);
    vmm.signal(Signal::CONT)?;
    thread::sleep(SECOND);
    let (ahead, uncertain) = ahead(&pod)?;
    assert!(
        ahead.abs() < uncertain + 0.1,
        "{ahead} s, known to {uncertain} s"
    );
    pod.remove()
}

fn step_clock(seconds: i64) -> TestResult {
    let target = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let time = rustix::time::Timespec {
        tv_sec: i64::try_from(target.as_secs())? + seconds,
        tv_nsec: target.subsec_nanos().into(),
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)?;
    Ok(())
}

/// Hooks of the host run there, with the state on their stdin: before the container is made, after
/// its start, and when it is gone. nerdctl's networking is such a hook.
#[test]
fn hooks_of_the_host_get_the_state() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let rootfs = Rootfs::mount(&host)?;
    let place = PathBuf::from(format!("/run/{}", host.name("hooks")));
    fs::create_dir(&place)?;
    let hook = |kind: &str| {
        let script = format!(
            "cat >{0}/{kind}.json; readlink /proc/self/ns/net >{0}/{kind}.net",
            place.display()
        );
        serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let mut spec = rootfs.spec(&["true"])?;
    for kind in ["prestart", "createRuntime", "poststart", "poststop"] {
        spec["hooks"][kind] = hook(kind);
    }
    let id = host.name("hooked");
    rootfs.run(&["--rm"], &id, &spec)?.ok()?;
    let own = fs::read_link("/proc/self/ns/net")?;
    let mut parts = Parts::new();
    for (kind, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ] {
        parts.run(kind, || {
            let state = fs::read(place.join(format!("{kind}.json")))
                .map_err(|error| failure(format!("{kind}: {error}")))?;
            let state: serde_json::Value = serde_json::from_slice(&state)?;
            assert_eq!(state["id"], *id, "{kind}: {state}");
            if kind != "poststart" || !is_oracle() {
                assert_eq!(state["status"], status, "{kind}: {state}");
            }
            let has_pid = state["pid"].as_i64().is_some_and(|pid| pid > 0);
            assert_eq!(has_pid, kind != "poststop", "{kind}: {state}");
            let bundle = state["bundle"].as_str().unwrap_or_default();
            assert_eq!(PathBuf::from(bundle), host.bundle(&id), "{kind}");
            let net = fs::read_to_string(place.join(format!("{kind}.net")))?;
            assert_eq!(net.trim(), own.display().to_string(), "{kind}");
            Ok(())
        });
    }

    // A hook that fails before the start fails the creation, with its number and its words.
    spec["hooks"] = serde_json::json!({
        "createRuntime": [{"path": "/bin/true"}, {"path": "/bin/sh", "args": ["sh", "-c", "echo sorry >&2; exit 5"]}],
    });
    parts.run("a hook that fails", || {
        let output = rootfs
            .run(&["--rm"], &host.name("hooked"), &spec)?
            .output()?;
        assert_ne!(output.status, 0);
        let line = output.error_text();
        for words in ["hook #1", "exit status 5", "sorry"] {
            assert!(line.contains(words), "no {words:?} in: {line}");
        }
        Ok(())
    });
    parts.run("the end", || {
        fs::remove_dir_all(&place)?;
        drop(rootfs);
        host.leaves_nothing(&before)
    });
    parts.end()
}
