//! In the test host: installs the product and runs test binaries, one after the other.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kata_like_tests::process::Process;
use kata_like_tests::{TestResult, failure, figures, oracle};
use rustix::process::Signal;

use crate::count::{Count, counted, must, struck};
use crate::minutes;

/// Those that have a guest each and look at its host's figures: one test at a time.
const ALONE: [&str; 2] = ["boot", "devices"];

/// Part of the name that QEMU's emulator gives its CPUs.
const EMULATED_CPU: &str = "QEMU TCG";

/// An emulated host's configuration of the product. Emulated CPUs that run side by side now and then trip
/// over a kernel that patches its own text, in a guest as in the host: so a guest has one, but where a
/// test is about more.
const DROP_IN: (&str, &str) = ("/etc/kata-like/config.d/emulated.toml", "max_vcpus = 1\n");

/// Where the product is installed.
const PREFIX: &str = "/run/installed";

/// `WORK NUMBER INSTALLED NAME=BINARY…`: runs those of the binaries that no other host has taken. Each begins with
/// a line `== NAME: begun` and ends with `== NAME: N passed, N failed`.
pub fn run(arguments: &[String]) -> TestResult<bool> {
    let [work, number, installed, binaries @ ..] = arguments else {
        return Err(failure("no working folder, number or installed folder"));
    };
    let work = Path::new(work);
    install(Path::new(installed))?;
    let mut all_passed = true;
    for (name, path) in binaries.iter().filter_map(|entry| entry.split_once('=')) {
        if !claim(work, name, number)? {
            continue;
        }
        println!("== {name}: begun");
        let count = run_one(work, number, name, path)?;
        if count.failed > 0 {
            all_passed = false;
            keep_logs(work, name);
        }
        clear_up();
        println!(
            "== {name}: {} passed, {} failed",
            count.passed, count.failed
        );
    }
    Ok(all_passed)
}

/// Whether this host is the one that runs it.
fn claim(work: &Path, name: &str, number: &str) -> TestResult<bool> {
    match File::create_new(work.join("claims").join(name)) {
        Ok(mut file) => {
            file.write_all(number.as_bytes())?;
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(failure(format!("take {name}: {error}"))),
    }
}

fn run_one(work: &Path, number: &str, name: &str, path: &str) -> TestResult<Count> {
    let temporary = Path::new("/run/tests.temporary");
    let threads = if ALONE.contains(&name) { "1" } else { "2" };
    fs::create_dir_all(temporary)?;
    let command = || {
        let mut command = Command::new(path);
        command
            .args(["--test-threads", threads])
            .env("TMPDIR", temporary)
            .env("KATA_LIKE_PREFIX", PREFIX)
            .env(
                "KATA_LIKE_KERNEL",
                format!("{PREFIX}/share/kata-like/vmlinux"),
            )
            .env(
                "KATA_LIKE_FSD",
                format!("{PREFIX}/libexec/kata-like/kata-like-fsd"),
            )
            .env(oracle::PROBE, work.join("probe"))
            .env(oracle::REPORT, work)
            .env(figures::VARIABLE, work.join(format!("figures-{number}")));
        command
    };
    let mut count = Count::default();
    let until = Instant::now() + Duration::from_secs(minutes(name) * 60 * 2);
    let mut code = counted(command(), &mut count, Some(until))?;
    let why = log_struck().or(count.struck.take());
    if let (1.., Some(why), true) = (count.failed, why, emulated()?) {
        // Once, told in the summary, and only where the output says so.
        let failures = std::mem::take(&mut count.failures);
        println!("== {name}: a second time, what failed under the emulator: {failures:?}: {why}");
        let mut again = command();
        again.arg("--exact").args(&failures);
        count.failed = 0;
        code = counted(again, &mut count, Some(until))?;
    }
    if code != 0 && count.failed == 0 {
        count.failed = 1;
    }
    Ok(count)
}

/// Whether this host's CPUs are QEMU's.
fn emulated() -> TestResult<bool> {
    Ok(fs::read_to_string("/proc/cpuinfo")?.contains(EMULATED_CPU))
}

/// Copies what was installed from the machine's disk to this host's tmpfs: it is executed often.
fn install(installed: &Path) -> TestResult {
    if Path::new(PREFIX).exists() {
        return Ok(());
    }
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(installed).arg(PREFIX);
    must("install", copy)?;
    if !emulated()? {
        return Ok(());
    }
    let (file, text) = DROP_IN;
    fs::create_dir_all(Path::new(file).parent().unwrap_or(Path::new("/")))?;
    Ok(fs::write(file, text)?)
}

/// The logs of containerd and of the shims, for whoever looks into a failure.
fn keep_logs(work: &Path, name: &str) {
    let Ok(entries) = fs::read_dir("/run") else {
        return;
    };
    for entry in entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("tests."))
    {
        let to = work.join(format!(
            "{name}.{}.log",
            entry.file_name().to_string_lossy()
        ));
        if let (Ok(mut from), Ok(mut to)) =
            (File::open(entry.path().join("log")), File::create(&to))
        {
            let _ = std::io::copy(&mut from, &mut to);
        }
        println!("containerd's log: {}", to.display());
    }
}

/// What a shim has logged of such an end of its guest.
fn log_struck() -> Option<String> {
    let entries = fs::read_dir("/run").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("tests."))
        .filter_map(|entry| fs::read(entry.path().join("log")).ok())
        .find_map(|log| struck(&String::from_utf8_lossy(&log)).map(str::to_owned))
}

/// After a test binary: nothing of it may weigh on the next one.
fn clear_up() {
    for process in Process::all() {
        if ["containerd", "ctr", "kata-like-", "runc"]
            .iter()
            .any(|name| process.is(name))
        {
            let _ = process.signal(Signal::KILL);
        }
    }
    let _ = Command::new("sh")
        .args(["-c", "grep -o '/run/tests[^ ]*' /proc/self/mounts | tac | xargs -r umount -l; rm -rf /run/tests.* /run/kata-like/*"])
        .status();
}
