//! Runs everything that `make test` promises, and tells how long each part took.
//!
//! `make test` calls it. Formatting, lints and unit tests come first, then the product is built and
//! installed into a folder, and the integration tests are built (`builds`). Then test hosts are booted side
//! by side (`hosts`). Each runs this program again, with `inside`, which copies that folder to a tmpfs and
//! takes one test binary after the other, until none is left. If a host's own kernel dies, it is booted
//! again for what is left; that is said, and is no test's failure. The last line is `N passed, N failed`.
//!
//! `run-tests INSTALLED [TEST-BINARY…]` takes an installed folder as it is and runs only the
//! integration tests, or those of them that are named.

mod builds;
mod count;
mod hosts;
mod inside;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use kata_like_tests::{TestResult, failure};

use count::{Count, counted, must};
use hosts::{Outcome, Run};

/// The parts with their time in minutes, and the test binaries of each.
const PARTS: [(&str, u64, &[&str]); 11] = [
    ("set-up and builds", 25, &[]),
    ("virtual machine", 4, &["boot", "devices"]),
    (
        "OCI",
        10,
        &[
            "oci",
            "oci_1_7",
            "volumes",
            "databases",
            "pods",
            "task_states",
        ],
    ),
    (
        "lifecycle",
        8,
        &["lifecycle", "streams", "task_api", "containerd_1_7"],
    ),
    (
        "data",
        15,
        &["full_disk", "ends", "attributes", "file_systems"],
    ),
    ("workloads", 6, &["workloads", "host_devices"]),
    ("the worst moment", 18, &["worst_moment"]),
    ("network", 9, &["network", "port_forward"]),
    ("Kubernetes", 10, &["cri", "cri_1_7", "deploy", "selinux"]),
    ("callers", 5, &["docker", "callers"]),
    (
        "faults and hostile",
        7,
        &["faults", "bad_input", "slow_hosts", "figures"],
    ),
];

/// Those that take longest, which begin first: so no host is left with one of them when the others are done.
const LONGEST: [&str; 9] = [
    "worst_moment",
    "oci",
    "cri",
    "lifecycle",
    "streams",
    "pods",
    "workloads",
    "task_states",
    "network",
];

/// Tests of the house itself need no host.
const OUTSIDE: [&str; 2] = ["house", "kata_like_tests"];

/// How many minutes the part of a test binary may take.
fn minutes(name: &str) -> u64 {
    PARTS
        .iter()
        .find(|(_, _, names)| names.contains(&name))
        .map_or(5, |part| part.1)
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let result = match arguments.next().as_deref() {
        Some("inside") => inside::run(&arguments.collect::<Vec<_>>()),
        Some(installed) => outside(Some(Path::new(installed)), &arguments.collect::<Vec<_>>()),
        None => outside(None, &[]),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("run-tests: {error}");
            ExitCode::FAILURE
        }
    }
}

fn outside(installed: Option<&Path>, only: &[String]) -> TestResult<bool> {
    let begun = Instant::now();
    let before = builds::started_before();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?;
    let target = target(&repository);
    let work = target.join("test-run");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    // A copy: building the tests may build this program anew.
    let runner = work.join("runner");
    fs::copy("/proc/self/exe", &runner)?;

    let mut count = Count::default();
    let installed = match installed {
        Some(installed) => installed.canonicalize()?,
        None => {
            // The kernel takes longest on a fresh machine; it has what the others leave of the CPUs.
            std::thread::scope(|scope| {
                let kernel =
                    scope.spawn(|| must("build the kernel", builds::make(&repository, "kernel")));
                builds::style_and_units(&repository, &mut count)?;
                must("build the programs", builds::make(&repository, "image"))?;
                joined(kernel)
            })?;
            must(
                "install below the target folder",
                builds::make(&repository, "stage"),
            )?;
            target.join("installed").canonicalize()?
        }
    };
    must("build the probe", builds::make(&repository, "probe"))?;
    let built = "guest/x86_64-unknown-linux-gnu/guest/kata-like-probe";
    fs::copy(target.join(built), work.join("probe"))?;
    builds::host(&repository)?;
    let host = target.join("debug/test-host");
    let binaries = std::thread::scope(|scope| {
        // It fetches and unpacks; the compiler has the CPUs meanwhile.
        let prepared = scope.spawn(|| {
            let mut prepare = Command::new(&host);
            prepare.arg("--prepare").stdout(Stdio::null());
            must("prepare the test host", prepare)
        });
        let binaries = builds::tests(&repository)?;
        joined(prepared)?;
        TestResult::Ok(binaries)
    })?;
    for name in OUTSIDE {
        counted(
            Command::new(builds::binary(&binaries, name)?),
            &mut count,
            None,
        )?;
    }
    let built = before + begun.elapsed();

    let mut names: Vec<_> = PARTS
        .iter()
        .flat_map(|(_, _, names)| names.iter().copied())
        .collect();
    names.sort_by_key(|name| {
        let place = LONGEST.iter().position(|longest| longest == name);
        place.unwrap_or(LONGEST.len())
    });
    let wanted = names
        .into_iter()
        .filter(|name| only.is_empty() || only.iter().any(|one| one == name))
        .map(|name| Ok((name, builds::binary(&binaries, name)?)))
        .collect::<TestResult<Vec<_>>>()?;
    let outcome = hosts::run(&host, &runner, &work, &installed, &wanted)?;
    for run in &outcome.runs {
        count.passed += run.passed;
        count.failed += run.failed;
    }
    if outcome.runs.len() < wanted.len() {
        count.failed += 1;
        println!("not all integration tests were run");
    }
    summary(&work, built, &outcome);
    println!("{} passed, {} failed", count.passed, count.failed);
    Ok(count.failed == 0)
}

/// What came of a step that went on beside others.
fn joined(step: ScopedJoinHandle<'_, TestResult>) -> TestResult {
    step.join()
        .map_err(|_| failure("a step's thread panicked"))?
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
    println!("\n== time ==");
    for (part, minutes, names) in PARTS {
        let of_part = |run: &&Run| names.contains(&run.name.as_str());
        let took = if names.is_empty() {
            built
        } else {
            wall_clock(outcome.runs.iter().filter(of_part))
        };
        let verdict = if took > Duration::from_secs(minutes * 60) {
            "  OVER"
        } else {
            ""
        };
        println!(
            "{part:20} {:5.1} of {minutes} min{verdict}",
            took.as_secs_f64() / 60.0
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

/// This program is in `TARGET/debug`.
fn target(repository: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), PathBuf::from)
}
