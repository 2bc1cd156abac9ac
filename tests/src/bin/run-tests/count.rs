//! Commands whose output is passed on, and what libtest says in it counted.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kata_like_limits::Patience;
use kata_like_tests::process::Process;
use kata_like_tests::{TestResult, failure};
use rustix::process::Signal;

use crate::libtest::Progress;

/// What a guest's sudden end under the emulator looks like: no test of those that go through
/// containerd brings it about. See `docs/limitations.md`.
const STRUCK: [&str; 3] = [
    "the guest triple-faulted",
    "int3: 0000",
    "panic - not syncing: Fatal exception",
];

/// What one that stands still in the middle of its boot looks like. The VMM of a test that brings
/// this about is stopped itself, and says nothing of its vCPUs.
const STOOD: [&str; 2] = [
    "wait for the agent: the guest has shown no progress",
    "; vCPU 0 ",
];

/// The first line of a text that tells of either.
pub fn struck(text: &str) -> Option<&str> {
    text.lines().find(|line| {
        STRUCK.iter().any(|words| line.contains(words))
            || STOOD.iter().all(|words| line.contains(words))
    })
}

/// What has been counted so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: u64,
    pub failed: u64,
    /// The names of the tests that were to be run, and did not end.
    pub not_run: Vec<String>,
}

impl Count {
    pub fn all_passed(&self) -> bool {
        self.failed == 0 && self.not_run.is_empty()
    }

    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.not_run.extend(other.not_run);
    }

    /// The last line of everything. A run that lacks tests can't be taken for one that passed.
    pub fn verdict(&self) -> String {
        let numbers = format!("{} passed, {} failed", self.passed, self.failed);
        match self.not_run.len() {
            _ if self.all_passed() => numbers,
            0 => format!("FAILED: {numbers}"),
            missing => format!("FAILED: {numbers}, {missing} not run"),
        }
    }
}

/// How a command ended that was counted.
#[derive(Default)]
pub struct Counted {
    /// The exit code; -1 if a signal ended it.
    pub code: i32,
    pub progress: Progress,
    /// The first line that says that the emulator failed.
    pub struck: Option<String>,
}

/// Runs a step that must succeed.
pub fn must(what: &str, mut command: Command) -> TestResult {
    println!("== {what}");
    let status = command
        .status()
        .map_err(|error| failure(format!("{what}: {error}")))?;
    if status.success() {
        Ok(())
    } else {
        Err(failure(format!("{what}: {status}")))
    }
}

/// Runs a command whose lines are passed on and counted. It is killed when the limit is over.
pub fn counted(mut command: Command, limit: Option<Duration>) -> TestResult<Counted> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut counted = Counted::default();
    let (ended, end) = mpsc::channel::<()>();
    let pid = child.id();
    thread::scope(|scope| {
        if let Some(limit) = limit {
            let patience = Patience::new(limit);
            scope.spawn(move || kill_late(pid, patience, &end));
        }
        // Dropped with this scope, whatever happens: the killer must not outlive the child.
        let _ended = ended;
        if let Some(stdout) = child.stdout.take() {
            lines(stdout, |line| {
                println!("{line}");
                if counted.struck.is_none() {
                    counted.struck = struck(line).map(str::to_owned);
                }
                counted.progress.take(line);
            })?;
        }
        counted.code = child.wait()?.code().unwrap_or(-1);
        TestResult::Ok(())
    })?;
    Ok(counted)
}

/// Kills a child of ours unless it ends in time.
fn kill_late(pid: u32, patience: Patience, end: &mpsc::Receiver<()>) {
    loop {
        match end.recv_timeout(patience.left()) {
            Err(RecvTimeoutError::Timeout) if patience.is_over() => break,
            Err(RecvTimeoutError::Timeout) => {}
            _ => return,
        }
    }
    if let Some(process) = Process::find(pid.cast_signed()) {
        let arguments = process.arguments.join(" ");
        eprintln!("run-tests: out of time, killed: {arguments}");
        let _ = process.signal(Signal::KILL);
    }
}

/// Hands over a stream line by line, whatever bytes are in it.
pub fn lines(stream: impl Read, mut each: impl FnMut(&str)) -> TestResult {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        each(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_guest_that_stood_still_is_told_from_one_that_a_test_has_stopped() {
        let stood = "start sandbox x: wait for the agent: the guest has shown no progress for 30s; \
            vCPU 0 is halted at 0x1 in the kernel";
        let line = format!("ctr: {stood}");
        assert_eq!(struck(&format!("one\n{line}\nthree")), Some(&*line));
        for other in [
            "wait for the agent: the guest has shown no progress for 3s; where it stands is not known",
            "exec: the guest has shown no progress for 20s; vCPU 0 runs at 0x1",
        ] {
            assert_eq!(struck(other), None);
        }
    }

    #[test]
    fn what_was_not_run_is_in_the_verdict() {
        let mut count = Count {
            passed: 705,
            ..Count::default()
        };
        assert_eq!(count.verdict(), "705 passed, 0 failed");
        count.failed = 1;
        assert_eq!(count.verdict(), "FAILED: 705 passed, 1 failed");
        count.not_run = vec![String::from("cri::probes"); 37];
        let wanted = "FAILED: 705 passed, 1 failed, 37 not run";
        assert_eq!(count.verdict(), wanted);
        count.failed = 0;
        assert!(!count.all_passed());
        assert!(count.verdict().starts_with("FAILED: "));
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_binary_that_hangs_is_killed_and_lacks_what_it_did_not_finish() {
        let begun = Instant::now();
        let script = "echo test a ... ok; echo test b ... FAILED; exec sleep 1000";
        let counted = counted(shell(script), Some(Duration::from_millis(300))).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(100));
        assert_eq!(counted.code, -1);
        let progress = counted.progress;
        assert_eq!((progress.passed(), progress.failed()), (1, 1));
        let listed = ["a", "b", "c"].map(str::to_owned);
        assert_eq!(progress.not_run(&listed), ["c"]);
    }

    #[test]
    fn a_binary_in_time_is_not_waited_for() {
        let begun = Instant::now();
        let counted = counted(shell("exit 3"), Some(Duration::from_secs(1000))).unwrap();
        assert_eq!(counted.code, 3);
        assert!(begun.elapsed() < Duration::from_secs(100));
    }
}
