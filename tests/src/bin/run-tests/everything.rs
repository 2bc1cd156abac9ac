//! All of `make test`.
//!
//! Formatting, lints and unit tests come first, then the product is built and installed into a
//! folder, and the integration tests are built (`builds`). Then test hosts are booted side by side
//! (`hosts`). Each runs this program again, with `inside`, which copies that folder to a tmpfs and
//! takes one test binary after the other, until none is left. If a host's own kernel dies, it is
//! booted again for what is left; that is said, and is no test's failure. The last line is `N
//! passed, N failed`, with `FAILED:` before it and what was not run behind it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use kata_like_limits::{Patience, scale};
use kata_like_tests::{TestResult, failure};

use crate::Folders;
use crate::builds::{self, Which};
use crate::count::{Count, counted, must};
use crate::hosts::{Hosts, Outcome, Run};
use crate::libtest::Filter;
use crate::plan::{OUTSIDE, PARTS, in_order, total};

/// Runs all, or with an installed folder only the integration tests, or those of them that are
/// named.
pub fn run(folders: &Folders, installed: Option<&Path>, only: &[String]) -> TestResult<bool> {
    let (begun, total) = (Instant::now(), Patience::new(total()));
    println!("this machine's scale of time limits: {:.2}", scale());
    let before = builds::started_before();
    let runner = begin(folders)?;
    let mut count = Count::default();
    let installed = match installed {
        Some(installed) => installed.canonicalize()?,
        None => product(folders, &mut count)?,
    };
    let guests = builds::make(&folders.repository, &["probe", "raw-guest"]);
    must("build the probe and the raw guest", guests)?;
    builds::take_guests(folders, "guest")?;
    builds::take_fail_points(folders)?;
    let (host, binaries) = hosts_and_tests(folders)?;
    for name in OUTSIDE {
        let path = binaries
            .get(name)
            .ok_or_else(|| failure(format!("no test binary {name}")))?;
        let counted = counted(Command::new(path), None)?;
        count.passed += counted.progress.passed();
        count.failed += counted.progress.failed();
        if counted.code != 0 && counted.progress.failed() == 0 {
            count.failed += 1;
        }
    }
    let built = before + begun.elapsed();

    let mut names = in_order();
    names.retain(|name| only.is_empty() || only.iter().any(|one| one == name));
    let wanted = builds::wanted(&binaries, &names, &Filter::All)?;
    let hosts = Hosts {
        program: &host,
        runner: &runner,
        work: &folders.work,
        installed: &installed,
        total,
        begun,
    };
    let outcome = hosts.run(&wanted)?;
    count.add(outcome.count(&wanted));
    summary(&folders.work, built, &outcome);
    verdict(folders, &count);
    Ok(count.all_passed())
}

/// Makes the working folder anew, with a copy of this program: building the tests may build it
/// anew.
pub fn begin(folders: &Folders) -> TestResult<PathBuf> {
    let _ = fs::remove_dir_all(&folders.work);
    fs::create_dir_all(&folders.work)?;
    let runner = folders.work.join("runner");
    fs::copy("/proc/self/exe", &runner)?;
    Ok(runner)
}

/// Builds the product and installs it into a folder; its style and its unit tests come first.
fn product(folders: &Folders, count: &mut Count) -> TestResult<PathBuf> {
    let make = |target| builds::make(&folders.repository, &[target]);
    // The kernel takes longest on a fresh machine; it has what the others leave of the CPUs.
    std::thread::scope(|scope| {
        let kernel = scope.spawn(|| must("build the kernel", make("kernel")));
        builds::style_and_units(&folders.repository, count)?;
        must("build the programs", make("image"))?;
        joined(kernel)
    })?;
    must("install below the target folder", make("stage"))?;
    Ok(folders.target.join("installed").canonicalize()?)
}

/// Builds and prepares the test host, and builds all integration tests.
fn hosts_and_tests(folders: &Folders) -> TestResult<(PathBuf, BTreeMap<String, PathBuf>)> {
    builds::host(&folders.repository)?;
    let host = folders.target.join("debug/test-host");
    let binaries = std::thread::scope(|scope| {
        // It fetches and unpacks; the compiler has the CPUs meanwhile.
        let prepared = scope.spawn(|| {
            let mut prepare = Command::new(&host);
            prepare.arg("--prepare").stdout(Stdio::null());
            must("prepare the test host", prepare)
        });
        println!("== build the integration tests");
        let binaries = builds::tests(&folders.repository, &Which::All)?;
        joined(prepared)?;
        TestResult::Ok(binaries)
    })?;
    Ok((host, binaries))
}

/// What came of a step that went on beside others.
fn joined(step: ScopedJoinHandle<'_, TestResult>) -> TestResult {
    step.join()
        .map_err(|_| failure("a step's thread panicked"))?
}

/// What was not run, by name, where the logs are, and the last line of everything.
pub fn verdict(folders: &Folders, count: &Count) {
    if !count.not_run.is_empty() {
        println!("\n== not run ==\n{}", count.not_run.join("\n"));
    }
    let logs = folders.work.join("logs");
    if logs.exists() {
        println!("\nlogs (make logs): {}", logs.display());
    }
    println!("{}", count.verdict());
}

fn summary(work: &Path, built: Duration, outcome: &Outcome) {
    println!("\n== figures (emulated: good as ratios within this run) ==");
    print!("{}", outcome.figures);
    for report in ["oracle.txt", "oracle-1.7.txt"].map(|name| work.join(name)) {
        if report.exists() {
            println!(
                "what containers see here and under runc: {}",
                report.display()
            );
        }
    }
    println!("\n== time (scale of the limits: {:.2}) ==", scale());
    for part in PARTS {
        let of_part = |run: &&Run| part.binaries.contains(&run.name.as_str());
        let took = if part.binaries.is_empty() {
            built
        } else {
            wall_clock(outcome.runs.iter().filter(of_part))
        };
        let limit = Duration::from_secs(part.minutes * 60).mul_f64(scale());
        let verdict = if took > limit { "  OVER" } else { "" };
        println!(
            "{:20} {:5.1} of {:.0} min{verdict}",
            part.name,
            took.as_secs_f64() / 60.0,
            limit.as_secs_f64() / 60.0
        );
    }
    for run in &outcome.runs {
        let took = run.ended - run.begun;
        println!("    {:16} {:5.1} min", run.name, took.as_secs_f64() / 60.0);
    }
    for line in &outcome.lost {
        println!("{line}");
    }
    if !outcome.again.is_empty() {
        println!("\n== the emulated CPU failed under a guest ==");
        println!("{}", outcome.again.join("\n"));
    }
}

/// For how long at least one of these ran: hosts work side by side.
fn wall_clock<'a>(runs: impl Iterator<Item = &'a Run>) -> Duration {
    let mut times: Vec<_> = runs.map(|run| (run.begun, run.ended)).collect();
    times.sort();
    let mut total = Duration::ZERO;
    let mut counted: Option<Instant> = None;
    for (begun, ended) in times {
        let from = counted.map_or(begun, |until| until.max(begun));
        total += ended.saturating_duration_since(from);
        counted = Some(counted.map_or(ended, |until| until.max(ended)));
    }
    total
}
