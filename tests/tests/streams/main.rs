//! What moves through a container's standard streams: all of it, in order, and its end.
//!
//! Users of other VM runtimes have met hangs and lost output here. All of it also runs against
//! runc.

use std::thread;
use std::time::Duration;

use kata_like_tests::events::Events;
use kata_like_tests::pty::OnTerminal;
use kata_like_tests::shim_pod::{self, ShimPod};
use kata_like_tests::{CtrContainer, Host, TestResult, failure, figures};
use sha2::{Digest, Sha256};

mod ends;

const SECOND: Duration = Duration::from_secs(1);
const MEBIBYTE: usize = 1 << 20;

/// Bytes that no compression and no line handling leaves unchanged by chance.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn sixty_four_mebibytes_come_back_on_both_streams() -> TestResult {
    let host = Host::shared()?;
    let sent = noise(64 * MEBIBYTE);
    let output = host
        .run(&host.name("through"), &[], &["tee", "/dev/stderr"])
        .input(sent.clone())
        .deadline(300 * SECOND)
        .ok()?;
    let wanted = Sha256::digest(&sent);
    for (name, got) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        assert_eq!(got.len(), sent.len(), "{name}");
        assert_eq!(Sha256::digest(got), wanted, "{name}");
    }
    figures::note(&format!(
        "64 MiB in and twice out: {:.1} s",
        output.took.as_secs_f32()
    ));
    Ok(())
}

/// A container that lives for milliseconds loses nothing of what it wrote.
#[test]
fn a_short_life_loses_no_output() -> TestResult {
    let host = Host::shared()?;
    let script = "i=0; while [ $i -lt 1024 ]; do echo 0123456789012345678901234567890123456789012345678901234567890ab; i=$((i+1)); done >&2; exit 3";
    let output = host
        .run(&host.name("short"), &[], &["sh", "-c", script])
        .output()?;
    assert_eq!((output.status, output.stderr.len()), (3, 64 * 1024));
    Ok(())
}

/// Every kind of end that a stream can have: see `ends`.
#[test]
fn streams_end_everywhere() -> TestResult {
    let host = Host::shared()?;
    let pod = ShimPod::start(&host)?;
    shim_pod::run(&pod, &ends::CASES)?;
    pod.remove()
}

/// Execs of `ctr`: in a pipe, on a terminal, and with a child that outlives them.
#[test]
fn an_exec_has_streams_of_its_own() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let pod = host.start("execs", &[], &["sleep", "1000"])?;
    in_a_pipe(&pod)?;
    on_a_terminal(&host, &pod)?;
    // Last, since it ends the container.
    a_child_that_keeps_the_output_delays_no_exit(&host, &events, &pod)?;
    pod.remove()
}

/// The input's end reaches the process, after all that was written before it.
fn in_a_pipe(pod: &CtrContainer) -> TestResult {
    let output = pod.exec_call(&[], &["cat"]).input("x\n").ok()?;
    assert_eq!(output.text(), "x");
    let output = pod
        .exec_call(&[], &["wc", "-c"])
        .input(noise(MEBIBYTE))
        .ok()?;
    assert_eq!(output.text(), MEBIBYTE.to_string());
    // A process that does not read its input must not wait for it, and neither must its caller.
    let output = pod
        .exec_call(&[], &["echo", "unread"])
        .input(noise(MEBIBYTE))
        .ok()?;
    assert_eq!(output.text(), "unread");
    Ok(())
}

/// Typed text is echoed, its end of file ends the shell.
fn on_a_terminal(host: &Host, pod: &CtrContainer) -> TestResult {
    let exec = host.name("exec");
    let mut command = host.ctr_command();
    command.args(["task", "exec", "--tty", "--exec-id", &exec, pod.id(), "sh"]);
    let mut terminal = OnTerminal::start(command, 80, 24)?;
    terminal.write("echo $((6*7)); tty; exit 12\n")?;
    terminal.expect("42", 60 * SECOND)?;
    assert_eq!(terminal.finish(30 * SECOND)?, 12);
    Ok(())
}

/// An exit is told when the process is gone, even if a child of it keeps its output open.
fn a_child_that_keeps_the_output_delays_no_exit(
    host: &Host,
    events: &Events,
    pod: &CtrContainer,
) -> TestResult {
    let exec = host.name("exec");
    let script = "sleep 1000 & echo done; exit 3";
    let call = host.ctr([
        "task",
        "exec",
        "--exec-id",
        &exec,
        pod.id(),
        "sh",
        "-c",
        script,
    ]);
    let waiting = thread::spawn(move || call.output());
    events.wait("start of the exec", 60 * SECOND, |event| {
        event.topic == "/tasks/exec-started" && event.process() == exec
    })?;
    assert_eq!(events.exit(pod.id(), &exec, 5 * SECOND)?.status(), 3);
    pod.kill("KILL")?;
    let output = waiting
        .join()
        .map_err(|_| failure("the exec's thread panicked"))??;
    assert_eq!(output.text(), "done");
    Ok(())
}
