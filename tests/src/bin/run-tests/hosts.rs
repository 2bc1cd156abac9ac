//! Test hosts side by side, each of which takes the next test binary until none is left.
//!
//! An emulated host has one CPU that can be relied on (`docs/limitations.md`), so a machine with two works
//! with two hosts. Which binary is whose is decided by files in a folder that all hosts share: who makes
//! `claims/NAME` runs it. What a host prints is passed on by whole binaries, lest two mix.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use kata_like_tests::host::spawn_bound;
use kata_like_tests::{TestResult, failure};

use crate::count::lines;

/// The test host's exit code for a failure of its own.
const HOST_FAILED: i32 = 70;

/// How many boots may be lost to a host's own kernel.
const BOOTS: u32 = 3;

/// Memory that a host takes once its tests have been through all of it, in KiB: its own 8 GiB and the emulator's.
const MEMORY: u64 = 9 << 20;

/// No more hosts than this: the tests are too few.
const MOST: u64 = 2;

/// Those that want a host whose kernel has SELinux: one more, once the first has nothing left to do.
const SELINUX: [&str; 1] = ["selinux"];

/// One test binary that has been run.
pub struct Run {
    pub name: String,
    pub begun: Instant,
    pub ended: Instant,
    pub passed: u64,
    pub failed: u64,
}

/// What came of all of them.
#[derive(Default)]
pub struct Outcome {
    pub runs: Vec<Run>,
    /// A line for each host that died.
    pub lost: Vec<String>,
    /// A line for each time that tests were run a second time.
    pub again: Vec<String>,
    /// What the tests have measured.
    pub figures: String,
}

/// Runs the test binaries, given by name and path, and gives what was run: all, unless hosts died too often.
///
/// `work` is written to by the hosts, `runner` is this program's copy in it.
pub fn run(
    host: &Path,
    runner: &Path,
    work: &Path,
    installed: &Path,
    binaries: &[(&str, &Path)],
) -> TestResult<Outcome> {
    let claims = work.join("claims");
    fs::create_dir_all(&claims)?;
    let outcome = Mutex::new(Outcome::default());
    let number = how_many()?.min(binaries.len() as u64);
    let last = number + 1;
    println!("== {number} test host(s) side by side");
    let (selinux, ordinary): (Vec<_>, Vec<_>) = binaries
        .iter()
        .partition(|(name, _)| SELINUX.contains(name));
    let boot = |number: u64, options: &[&str], binaries: &[(&str, &Path)]| {
        let mut command = Command::new(host);
        command
            .args(options)
            .arg("--share")
            .arg(work)
            .arg("--console")
            .arg(work.join(format!("console-{number}")))
            .arg("--")
            .arg(runner)
            .arg("inside")
            .arg(work)
            .arg(number.to_string())
            .arg(installed)
            .args(
                binaries
                    .iter()
                    .map(|(name, path)| format!("{name}={}", path.display())),
            );
        command
    };
    thread::scope(|scope| {
        let hosts: Vec<_> = (1..=number)
            .map(|number| {
                let (claims, outcome, boot) = (&claims, &outcome, &boot);
                let (ordinary, selinux) = (&ordinary, &selinux);
                scope.spawn(move || {
                    if !ordinary.is_empty() {
                        keep_going(number, || boot(number, &[], ordinary), claims, outcome)?;
                    }
                    if number == 1 && !selinux.is_empty() {
                        let boot = || boot(last, &["--selinux"], selinux);
                        keep_going(last, boot, claims, outcome)?;
                    }
                    TestResult::Ok(())
                })
            })
            .collect();
        for host in hosts {
            host.join()
                .map_err(|_| failure("a host's thread panicked"))??;
        }
        TestResult::Ok(())
    })?;
    let mut outcome = outcome
        .into_inner()
        .map_err(|_| failure("a host's thread panicked"))?;
    for number in 1..=last {
        outcome.figures +=
            &fs::read_to_string(work.join(format!("figures-{number}"))).unwrap_or_default();
    }
    Ok(outcome)
}

/// One for each CPU, as far as memory goes.
fn how_many() -> TestResult<u64> {
    let cpus = thread::available_parallelism()?.get() as u64;
    let memory = fs::read_to_string("/proc/meminfo")?;
    let available: u64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok())
        .ok_or_else(|| failure("no MemAvailable in /proc/meminfo"))?;
    Ok(cpus.min(available / MEMORY).clamp(1, MOST))
}

/// Boots one host, and again if its kernel dies, until nothing is left to do.
fn keep_going(
    number: u64,
    boot: impl Fn() -> Command,
    claims: &Path,
    outcome: &Mutex<Outcome>,
) -> TestResult {
    for lost in 1..=BOOTS {
        let mut command = boot();
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = spawn_bound(command)?;
        let mut reader = Reader::new(number, outcome);
        if let Some(stdout) = child.stdout.take() {
            lines(stdout, |line| reader.take(line))?;
        }
        reader.flush();
        let code = child.wait()?.code().unwrap_or(-1);
        if code != HOST_FAILED {
            return Ok(());
        }
        let mut outcome = outcome
            .lock()
            .map_err(|_| failure("a host's thread panicked"))?;
        outcome.lost.push(format!(
            "test host {number} itself failed {lost} time(s); its log is above"
        ));
        release(number, claims, &outcome.runs)?;
    }
    Ok(())
}

/// What a host has taken and not finished is free again.
fn release(number: u64, claims: &Path, runs: &[Run]) -> TestResult {
    for entry in fs::read_dir(claims)? {
        let entry = entry?;
        let name = entry.file_name();
        let whose = fs::read_to_string(entry.path())?;
        if whose == number.to_string() && !runs.iter().any(|run| name == run.name.as_str()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes runs of what a host prints (`inside::run` says how each begins and ends).
struct Reader<'a> {
    number: u64,
    outcome: &'a Mutex<Outcome>,
    text: String,
    running: Option<(String, Instant)>,
}

impl<'a> Reader<'a> {
    fn new(number: u64, outcome: &'a Mutex<Outcome>) -> Self {
        Self {
            number,
            outcome,
            text: String::new(),
            running: None,
        }
    }

    fn take(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
        let Some((name, what)) = line
            .strip_prefix("== ")
            .and_then(|rest| rest.split_once(": "))
        else {
            return;
        };
        if what == "begun" {
            println!("host {}: {name}", self.number);
            self.running = Some((name.to_owned(), Instant::now()));
        } else if what.starts_with("a second time") {
            self.with(|outcome| outcome.again.push(format!("{name}: {what}")));
        } else if let Some((passed, failed)) = numbers(what)
            && let Some((running, begun)) = self.running.take_if(|(running, _)| running == name)
        {
            self.with(|outcome| {
                outcome.runs.push(Run {
                    name: running,
                    begun,
                    ended: Instant::now(),
                    passed,
                    failed,
                });
            });
            self.flush();
        }
    }

    fn with(&self, change: impl FnOnce(&mut Outcome)) {
        if let Ok(mut outcome) = self.outcome.lock() {
            change(&mut outcome);
        }
    }

    fn flush(&mut self) {
        print!("{}", std::mem::take(&mut self.text));
    }
}

/// Of `3 passed, 0 failed`.
fn numbers(what: &str) -> Option<(u64, u64)> {
    let (passed, failed) = what.split_once(" passed, ")?;
    let failed = failed.strip_suffix(" failed")?;
    Some((passed.parse().ok()?, failed.parse().ok()?))
}
