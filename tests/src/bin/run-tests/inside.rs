//! In the test host: installs the product and runs test binaries, one after the other.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use kata_like_limits::{VARIABLE, emulated, measure, scale};
use kata_like_tests::process::Process;
use kata_like_tests::{TestResult, failure, figures, oracle};
use rustix::process::Signal;

use crate::builds;
use crate::count::{Count, Counted, counted, must};
use crate::libtest::Filter;
use crate::logs;
use crate::plan;

/// An emulated host's configuration of the product. Emulated CPUs that run side by side now and
/// then trip over a kernel that patches its own text, in a guest as in the host: so a guest has
/// one, but where a test is about more.
const DROP_IN: (&str, &str) = ("/etc/kata-like/config.d/emulated.toml", "max_vcpus = 1\n");

/// Where the product is installed.
const PREFIX: &str = "/run/installed";

/// A test binary in a host that runs it.
struct Binary<'a> {
    work: &'a Path,
    /// The host's number.
    number: &'a str,
    name: &'a str,
    path: &'a str,
}

/// `WORK NUMBER INSTALLED NAME=BINARY…`: runs those of the binaries that no other host has taken.
/// Each begins with a line `== NAME: begun` and ends with `== NAME: N passed, N failed, N not run`.
pub fn run(arguments: &[String]) -> TestResult<bool> {
    let [work, number, installed, binaries @ ..] = arguments else {
        return Err(failure("no working folder, number or installed folder"));
    };
    let work = Path::new(work);
    install(Path::new(installed))?;
    println!("this host's scale of time limits: {:.2}", scale());
    let guests = logs::Guests::watch();
    let mut all_passed = true;
    for (name, path) in binaries.iter().filter_map(|entry| entry.split_once('=')) {
        if !claim(work, name, number)? {
            continue;
        }
        println!("== {name}: begun");
        let binary = Binary {
            work,
            number,
            name,
            path,
        };
        let count = binary.run()?;
        if !count.all_passed() {
            all_passed = false;
            logs::keep(&logs::folder(work, name), &guests);
        }
        clear_up();
        guests.forget();
        for test in &count.not_run {
            println!("not run: {name}::{test}");
        }
        println!(
            "== {name}: {} passed, {} failed, {} not run",
            count.passed,
            count.failed,
            count.not_run.len()
        );
    }
    Ok(all_passed)
}

/// `WORK INSTALLED NAME BINARY [TEST…]`: the same for one binary within `make shell`. What it
/// leaves on the host stays there to be looked at.
pub fn run_in_shell(arguments: &[String]) -> TestResult<bool> {
    let [work, installed, name, path, tests @ ..] = arguments else {
        return Err(failure("no working folder, installed folder or binary"));
    };
    install(Path::new(installed))?;
    let guests = logs::Guests::watch();
    let binary = Binary {
        work: Path::new(work),
        number: "shell",
        name,
        path,
    };
    let counted = binary.once(tests)?;
    let count = binary.judged(&counted, tests);
    if !count.all_passed() {
        logs::keep(&logs::folder(binary.work, name), &guests);
    }
    println!("{}", count.verdict());
    Ok(count.all_passed())
}

/// `WORK INSTALLED BENCH ROUNDS FILE`: runs the bench.
pub fn run_bench(arguments: &[String]) -> TestResult<bool> {
    let [work, installed, bench, rounds, file] = arguments else {
        return Err(failure(
            "no working folder, installed folder, bench, rounds or file",
        ));
    };
    install(Path::new(installed))?;
    let variable = |name| std::env::var(name).unwrap_or_default();
    let (path, tools) = (variable("PATH"), variable("TEST_HOST_TOOLS"));
    let mut command = Command::new(bench);
    command
        .args(["run", rounds, file])
        .env("PATH", format!("{PREFIX}/bin:{tools}/runc:{path}"))
        .env("KATA_LIKE_PREFIX", PREFIX)
        .env(oracle::PROBE, Path::new(work).join("probe"));
    Ok(command.status()?.success())
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

impl Binary<'_> {
    /// Runs it, and once more what failed if the output says that the emulator did.
    fn run(&self) -> TestResult<Count> {
        let list = fs::read_to_string(logs::list(self.work, self.name))?;
        let listed: Vec<String> = list.lines().map(str::to_owned).collect();
        let mut first = self.once(&listed)?;
        let mut count = self.judged(&first, &listed);
        let why = logs::containerd_struck().or(first.struck.take());
        let failures = first.progress.failures;
        if let (false, Some(why), true) = (failures.is_empty(), why, emulated()) {
            println!(
                "== {}: a second time, what failed under the emulator: {failures:?}: {why}",
                self.name
            );
            let again = self.judged(&self.once(&failures)?, &failures);
            count.failed = 0;
            count.add(again);
        }
        Ok(count)
    }

    /// Runs these tests of it.
    fn once(&self, tests: &[String]) -> TestResult<Counted> {
        let temporary = Path::new("/run/tests.temporary");
        let threads = match plan::ALONE.contains(&self.name) {
            true => "1",
            false => "2",
        };
        fs::create_dir_all(temporary)?;
        let mut command = Command::new(self.path);
        command
            .args(["--test-threads", threads])
            .args(Filter::Exactly(tests.to_vec()).arguments())
            .env("TMPDIR", temporary)
            .env(VARIABLE, measure().to_string())
            .env("KATA_LIKE_PREFIX", PREFIX)
            .env(
                "KATA_LIKE_KERNEL",
                format!("{PREFIX}/share/kata-like/vmlinux"),
            )
            .env(
                "KATA_LIKE_FSD",
                format!("{PREFIX}/libexec/kata-like/kata-like-fsd"),
            )
            .env(
                "KATA_LIKE_FAIL_POINTS_SHIM",
                self.work.join(builds::FAIL_POINTS),
            )
            .env(oracle::PROBE, self.work.join("probe"))
            .env("KATA_LIKE_RAW_GUEST", self.work.join("raw-guest"))
            .env(oracle::REPORT, self.work)
            .env(
                figures::VARIABLE,
                self.work.join(format!("figures-{}", self.number)),
            );
        counted(command, Some(plan::limit(self.name)))
    }

    /// What came of a run of these tests. A binary that fails and names no test of its own counts
    /// as a failure.
    fn judged(&self, counted: &Counted, tests: &[String]) -> Count {
        let mut count = Count {
            passed: counted.progress.passed(),
            failed: counted.progress.failed(),
            not_run: counted.progress.not_run(tests),
        };
        if counted.code != 0 && count.all_passed() {
            count.failed = 1;
        }
        count
    }
}

/// Copies what was installed from the machine's disk to this host's tmpfs: it is executed often.
fn install(installed: &Path) -> TestResult {
    if Path::new(PREFIX).exists() {
        return Ok(());
    }
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(installed).arg(PREFIX);
    must("install", copy)?;
    if !emulated() {
        return Ok(());
    }
    let (file, text) = DROP_IN;
    fs::create_dir_all(Path::new(file).parent().unwrap_or(Path::new("/")))?;
    Ok(fs::write(file, text)?)
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
