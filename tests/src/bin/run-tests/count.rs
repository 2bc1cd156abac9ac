//! Commands whose output is passed on, and what libtest says in it counted.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Instant;

use kata_like_tests::process::Process;
use kata_like_tests::{TestResult, failure};
use rustix::process::Signal;

/// What a guest's sudden end under the emulator looks like: no test of those that go through containerd
/// brings it about. See `docs/limitations.md`.
const STRUCK: [&str; 3] = [
    "the guest triple-faulted",
    "int3: 0000",
    "panic - not syncing: Fatal exception",
];

/// What one that stands still in the middle of its boot looks like. The VMM of a test that brings this about is
/// stopped itself, and says nothing of its vCPUs.
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
#[derive(Default)]
pub struct Count {
    pub passed: u64,
    pub failed: u64,
    /// The names of the tests that failed.
    pub failures: Vec<String>,
    /// The first line that says that the emulator failed.
    pub struck: Option<String>,
}

impl Count {
    /// Takes libtest's `test result: ok. 3 passed; 0 failed; …`.
    fn take(&mut self, line: &str) {
        if self.struck.is_none() {
            self.struck = struck(line).map(str::to_owned);
        }
        let test = line.strip_prefix("test ");
        if let Some(name) = test.and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
        if let Some(rest) = line.strip_prefix("test result: ") {
            let number = |word: &str| -> u64 {
                let end = rest.find(word).unwrap_or(0);
                rest[..end]
                    .split_whitespace()
                    .last()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(0)
            };
            self.passed += number(" passed");
            self.failed += number(" failed");
        }
    }
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

/// Runs a command whose lines are passed on and counted; gives its exit code.
pub fn counted(mut command: Command, count: &mut Count, until: Option<Instant>) -> TestResult<i32> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(until) = until {
        let pid = child.id();
        std::thread::spawn(move || {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
            if let Some(process) = Process::find(pid as i32) {
                eprintln!(
                    "run-tests: out of time, killed: {}",
                    process.arguments.join(" ")
                );
                let _ = process.signal(Signal::KILL);
            }
        });
    }
    if let Some(stdout) = child.stdout.take() {
        lines(stdout, |line| {
            println!("{line}");
            count.take(line);
        })?;
    }
    Ok(child.wait()?.code().unwrap_or(-1))
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
}
