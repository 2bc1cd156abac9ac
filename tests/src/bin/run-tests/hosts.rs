//! Test hosts side by side, each of which takes the next test binary until none is left.
//!
//! An emulated host has one CPU that can be relied on (`docs/limitations.md`), so a machine with
//! two works with two hosts. Which binary is whose is decided by files in a folder that all hosts
//! share: who makes `claims/NAME` runs it. What a host prints is passed on by whole binaries, lest
//! two mix (`reader`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use kata_like_limits::Patience;
use kata_like_tests::host::spawn_bound;
use kata_like_tests::{TestResult, failure};

use crate::count::{Count, lines};
use crate::libtest::Progress;
use crate::logs;
use crate::plan::{SELINUX, total};
use crate::reader::Reader;

/// The test host's exit code for a failure of its own.
const HOST_FAILED: i32 = 70;

/// How many boots may be lost to a host's own kernel.
const BOOTS: u32 = 3;

/// Memory that a host takes once its tests have been through all of it, in KiB: its own 8 GiB and
/// the emulator's.
const MEMORY: u64 = 9 << 20;

/// No more hosts than this: the tests are too few.
const MOST: u64 = 2;

/// A test binary that is to be run.
pub struct Wanted {
    pub name: String,
    pub path: PathBuf,
    /// The names of its tests that are to be run.
    pub tests: Vec<String>,
}

/// One test binary that has been run.
pub struct Run {
    pub name: String,
    pub begun: Instant,
    pub ended: Instant,
    pub count: Count,
}

/// What came of all of them.
#[derive(Default)]
pub struct Outcome {
    pub runs: Vec<Run>,
    /// What was heard of binaries before their host was lost.
    pub cut_off: BTreeMap<String, Progress>,
    /// A line for each host that died.
    pub lost: Vec<String>,
    /// A line for each time that tests were run a second time.
    pub again: Vec<String>,
    /// What the tests have measured.
    pub figures: String,
}

impl Outcome {
    /// All tests that were wanted: passed, failed, or not run and named as `BINARY::TEST`.
    pub fn count(&self, wanted: &[Wanted]) -> Count {
        let mut count = Count::default();
        for binary in wanted {
            let of_this = match self.runs.iter().find(|run| run.name == binary.name) {
                Some(run) => run.count.clone(),
                None => {
                    let heard = self.cut_off.get(&binary.name).cloned().unwrap_or_default();
                    Count {
                        passed: heard.passed(),
                        failed: heard.failed(),
                        not_run: heard.not_run(&binary.tests),
                    }
                }
            };
            let not_run = of_this.not_run.iter();
            let not_run = not_run.map(|test| format!("{}::{test}", binary.name));
            count.add(Count {
                not_run: not_run.collect(),
                ..of_this
            });
        }
        count
    }
}

/// What all hosts have in common.
pub struct Hosts<'a> {
    /// The program `test-host`.
    pub program: &'a Path,
    /// A copy of this program that no build replaces.
    pub runner: &'a Path,
    /// Where the hosts write.
    pub work: &'a Path,
    pub installed: &'a Path,
    /// Since when all of it goes on.
    pub total: Patience,
    pub begun: Instant,
}

/// The outcome, whatever a thread that held it came to.
pub fn lock(outcome: &Mutex<Outcome>) -> MutexGuard<'_, Outcome> {
    outcome.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hosts<'_> {
    /// Runs the test binaries and gives what was run: all, unless hosts died too often or the time
    /// is over.
    pub fn run(&self, wanted: &[Wanted]) -> TestResult<Outcome> {
        for folder in ["claims", "lists"] {
            fs::create_dir_all(self.work.join(folder))?;
        }
        for binary in wanted {
            fs::write(
                logs::list(self.work, &binary.name),
                binary.tests.join("\n") + "\n",
            )?;
        }
        let outcome = Mutex::new(Outcome::default());
        let number = how_many()?.min(wanted.len() as u64);
        let last = number + 1;
        println!("== {number} test host(s) side by side");
        let (selinux, ordinary): (Vec<_>, Vec<_>) = wanted
            .iter()
            .partition(|binary| SELINUX.contains(&&*binary.name));
        let taken = AtomicBool::new(false);
        thread::scope(|scope| {
            let hosts: Vec<_> = (1..=number)
                .map(|number| {
                    let (outcome, ordinary, selinux) = (&outcome, &ordinary, &selinux);
                    let taken = &taken;
                    scope.spawn(move || {
                        if !ordinary.is_empty() {
                            self.keep_going(number, &[], ordinary, outcome)?;
                        }
                        if !selinux.is_empty() && !taken.swap(true, Ordering::SeqCst) {
                            self.keep_going(last, &["--selinux"], selinux, outcome)?;
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
        let mut outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        for number in 1..=last {
            let figures = self.work.join(format!("figures-{number}"));
            outcome.figures += &fs::read_to_string(figures).unwrap_or_default();
        }
        Ok(outcome)
    }

    /// The command that boots a host and runs what is left of these binaries there.
    fn boot(&self, number: u64, options: &[&str], binaries: &[&Wanted]) -> Command {
        // The host scales its deadline itself.
        let left = total()
            .saturating_sub(self.begun.elapsed())
            .as_secs()
            .max(1);
        let mut command = Command::new(self.program);
        command
            .args(options)
            .args(["--deadline", &left.to_string()])
            .arg("--share")
            .arg(self.work)
            .arg("--console")
            .arg(self.work.join(format!("console-{number}")))
            .arg("--")
            .arg(self.runner)
            .arg("inside")
            .arg(self.work)
            .arg(number.to_string())
            .arg(self.installed)
            .args(
                binaries
                    .iter()
                    .map(|binary| format!("{}={}", binary.name, binary.path.display())),
            );
        command
    }

    /// Boots one host, and again if its kernel dies, until nothing is left to do.
    fn keep_going(
        &self,
        number: u64,
        options: &[&str],
        binaries: &[&Wanted],
        outcome: &Mutex<Outcome>,
    ) -> TestResult {
        for lost in 1..=BOOTS {
            if self.total.is_over() {
                break;
            }
            let mut command = self.boot(number, options, binaries);
            command.stdin(Stdio::null()).stdout(Stdio::piped());
            let mut child = spawn_bound(command)?;
            let mut reader = Reader::new(number, self.work, outcome);
            if let Some(stdout) = child.stdout.take() {
                lines(stdout, |line| reader.take(line))?;
            }
            reader.host_is_gone();
            let code = child.wait()?.code().unwrap_or(-1);
            if code != HOST_FAILED {
                return Ok(());
            }
            let mut outcome = lock(outcome);
            outcome.lost.push(format!(
                "test host {number} itself failed {lost} time(s); its log is above"
            ));
            release(number, &self.work.join("claims"), &outcome.runs)?;
        }
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: &str, tests: &[&str]) -> Wanted {
        Wanted {
            name: name.into(),
            path: name.into(),
            tests: tests.iter().map(|test| (*test).to_owned()).collect(),
        }
    }

    #[test]
    fn what_no_host_finished_is_not_run_by_name() {
        let wanted = [
            wanted("whole", &["a", "b"]),
            wanted("killed", &["a", "b"]),
            wanted("cut_off", &["a", "b"]),
            wanted("never", &["a"]),
        ];
        let outcome = Mutex::new(Outcome::default());
        let work = tempfile::tempdir().unwrap();
        let mut reader = Reader::new(1, work.path(), &outcome);
        for line in [
            "== whole: begun",
            "test a ... ok",
            "== whole: 2 passed, 0 failed, 0 not run",
            "== killed: begun",
            "test a ... ok",
            "not run: killed::b",
            "== killed: 1 passed, 0 failed, 1 not run",
            "== cut_off: begun",
            "test b ... ok",
        ] {
            reader.take(line);
        }
        reader.host_is_gone();
        let count = lock(&outcome).count(&wanted);
        assert_eq!((count.passed, count.failed), (4, 0));
        assert_eq!(count.not_run, ["killed::b", "cut_off::a", "never::a"]);
        assert!(work.path().join("logs/killed/output").exists());
        assert!(work.path().join("logs/cut_off/output").exists());
        assert!(!work.path().join("logs/whole").exists());
    }
}
