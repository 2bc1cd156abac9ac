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

/// Whether a text tells of such an end.
pub fn is_struck(text: &str) -> bool {
    STRUCK.iter().any(|words| text.contains(words))
}

/// What has been counted so far.
#[derive(Default)]
pub struct Count {
    pub passed: u64,
    pub failed: u64,
    /// The names of the tests that failed.
    pub failures: Vec<String>,
    /// Some output says that the emulator failed.
    pub struck: bool,
}

impl Count {
    /// Takes libtest's `test result: ok. 3 passed; 0 failed; …`.
    fn take(&mut self, line: &str) {
        self.struck |= is_struck(line);
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
