//! The same binary under containerd 1.7: a container's life, and eleven cases of the task API.
//!
//! What differs there: task API 2, a plain address as the answer of `start`, the file `address` in
//! the bundle for a restart, Shutdown and `delete` after each container.

use std::thread;
use std::time::Duration;

use kata_like_tests::pty::OnTerminal;
use kata_like_tests::shim_pod::{self, ShimPod};
use kata_like_tests::suites::odd_states;
use kata_like_tests::{Host, TestResult, Version, failure, is_oracle};

const SECOND: Duration = Duration::from_secs(1);

fn shared() -> TestResult<Host> {
    Host::on(Version::V1_7, false)
}

fn alone() -> TestResult<Host> {
    Host::on(Version::V1_7, true)
}

/// The guest's kernel answers; input, output and the exit code come through.
#[test]
fn input_output_and_exit_code() -> TestResult {
    let host = shared()?;
    let sent: Vec<u8> = (0..4_u32 << 20)
        .map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let script = "uname -r >&2; cat; exit 7";
    let output = host
        .run(&host.name("through"), &[], &["sh", "-c", script])
        .input(sent.clone())
        .output()?;
    assert_eq!(output.status, 7);
    let hosts = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let same = output.error_text() == hosts.trim();
    assert_eq!(same, is_oracle(), "{}", output.error_text());
    assert!(
        output.stdout == sent,
        "{} of {} bytes",
        output.stdout.len(),
        sent.len()
    );
    Ok(())
}

/// The calls of the task API in the states of a task: see `odd_states`.
#[test]
fn eleven_cases_of_the_task_api() -> TestResult {
    let host = shared()?;
    let pod = ShimPod::start(&host)?;
    shim_pod::run(&pod, &odd_states::CASES[..11])?;
    pod.remove()
}

#[test]
fn execs_kill_and_events() -> TestResult {
    let host = shared()?;
    let events = host.events()?;
    let pod = host.start("killed", &[], &["sleep", "1000"])?;
    let output = pod.exec(&["sh", "-c", "echo out; echo err >&2; exit 9"])?;
    assert_eq!(
        (output.status, output.text(), output.error_text()),
        (9, "out".into(), "err".into())
    );
    assert_eq!(pod.exec_call(&[], &["cat"]).input("x\n").ok()?.text(), "x");
    assert_eq!(pod.kill("KILL")?.status, 0);
    assert_eq!(events.exit(pod.id(), pod.id(), 10 * SECOND)?.status(), 137);
    let id = pod.id().to_owned();
    assert_eq!(pod.delete()?, 137);
    events.wait("deletion", 5 * SECOND, |event| {
        event.topic == "/tasks/delete" && event.container() == id
    })?;
    Ok(())
}

#[test]
fn terminal() -> TestResult {
    let host = shared()?;
    let id = host.name("terminal");
    let mut command = host.ctr_command();
    command.args([
        "run",
        "--rm",
        "--tty",
        "--runtime",
        &kata_like_tests::runtime(),
    ]);
    command.args([kata_like_tests::IMAGE, &id, "sh", "-c", "tty && exit 5"]);
    let terminal = OnTerminal::start(command, 80, 24)?;
    terminal.expect("/dev/", 60 * SECOND)?;
    assert_eq!(terminal.finish(30 * SECOND)?, 5);
    Ok(())
}

#[test]
fn missing_command() -> TestResult {
    let host = shared()?;
    let output = host.run(&host.name("missing"), &[], &["nope"]).output()?;
    assert_eq!(output.status, 1);
    let words = "exec: \"nope\": executable file not found in $PATH";
    assert!(output.error_text().contains(words), "{}", output.both());
    Ok(())
}

#[test]
fn restart_of_containerd() -> TestResult {
    let host = alone()?;
    let pod = host.start("outlives", &[], &["sleep", "1000"])?;
    host.kill_containerd()?;
    host.start_containerd()?;
    assert_eq!(pod.status()?.0, "RUNNING");
    assert_eq!(pod.exec(&["echo", "after"])?.text(), "after");
    pod.remove()
}

#[test]
fn nothing_stays() -> TestResult {
    let host = alone()?;
    let before = host.footprint();
    thread::scope(|scope| {
        let runs: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| host.run(&host.name("gone"), &[], &["true"]).ok().map(drop)))
            .collect();
        runs.into_iter()
            .try_for_each(|run| run.join().map_err(|_| failure("a run panicked"))?)
    })?;
    host.leaves_nothing(&before)
}
