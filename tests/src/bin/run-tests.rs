//! Runs everything that `make test` promises, and tells how long each part took.
//!
//! `make test` calls it. Formatting, lints and unit tests come first, then the product is built and
//! installed into a folder, and the integration tests are built. One boot of the test host runs this
//! program again, with `inside`, which copies that folder to a tmpfs and runs the test binaries one
//! after the other. If the host's own kernel dies, the tests that are left get another boot; that is
//! said, and is no test's failure. The last line is `N passed, N failed`.
//!
//! `run-tests INSTALLED [TEST-BINARY…]` takes an installed folder as it is and runs only the
//! integration tests, or those of them that are named.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use kata_like_tests::process::Process;
use kata_like_tests::{TestResult, failure, figures, oracle};
use rustix::process::Signal;

/// The parts with their time in minutes, and the test binaries of each.
const PARTS: [(&str, u64, &[&str]); 6] = [
    ("set-up and builds", 25, &[]),
    ("virtual machine", 4, &["boot", "devices"]),
    (
        "lifecycle",
        8,
        &["lifecycle", "streams", "task_api", "containerd_1_7"],
    ),
    (
        "OCI",
        10,
        &["oci", "oci_1_7", "volumes", "pods", "task_states"],
    ),
    ("network", 4, &["network"]),
    (
        "faults and hostile",
        7,
        &["faults", "bad_input", "slow_hosts", "figures"],
    ),
];

/// Those that have a guest each and look at its host's figures: one at a time.
const ALONE: [&str; 2] = ["boot", "devices"];

/// Tests of the house itself need no host.
const OUTSIDE: [&str; 2] = ["house", "kata_like_tests"];

/// The test host's exit code for a failure of its own.
const HOST_FAILED: i32 = 70;

/// How many boots of the test host may be lost to its own kernel.
const BOOTS: u32 = 3;

/// Part of the name that QEMU's emulator gives its CPUs.
const EMULATED_CPU: &str = "QEMU TCG";

/// An emulated host's configuration of the product. Emulated CPUs that run side by side now and then trip
/// over a kernel that patches its own text, in a guest as in the host: so a guest has one, but where a
/// test is about more.
const DROP_IN: (&str, &str) = ("/etc/kata-like/config.d/emulated.toml", "max_vcpus = 1\n");

/// What a guest's sudden end under the emulator looks like: no test of those that go through containerd
/// brings it about. See `docs/limitations.md`.
const STRUCK: [&str; 3] = [
    "the guest triple-faulted",
    "int3: 0000",
    "panic - not syncing: Fatal exception",
];

/// Where the product is installed inside.
const PREFIX: &str = "/run/installed";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let result = match arguments.next().as_deref() {
        Some("inside") => inside(&arguments.collect::<Vec<_>>()),
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

/// What has been counted so far.
#[derive(Default)]
struct Count {
    passed: u64,
    failed: u64,
    /// The names of the tests that failed.
    failures: Vec<String>,
    /// Some output says that the emulator failed.
    struck: bool,
}

impl Count {
    /// Takes libtest's `test result: ok. 3 passed; 0 failed; …`.
    fn take(&mut self, line: &str) {
        self.struck |= STRUCK.iter().any(|words| line.contains(words));
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

fn outside(installed: Option<&Path>, only: &[String]) -> TestResult<bool> {
    let begun = Instant::now();
    let before = started_before();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?;
    let work = target(&repository).join("test-run");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    // A copy: building the tests may build this program anew.
    let runner = work.join("runner");
    fs::copy("/proc/self/exe", &runner)?;

    let mut count = Count::default();
    let cargo = |arguments: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(arguments).current_dir(&repository);
        command
    };
    let installed = match installed {
        Some(installed) => installed.canonicalize()?,
        None => {
            // A fault of style fails the run, and does not keep the tests from being run.
            let mut style = |what: &str, command: Command| {
                if let Err(error) = must(what, command) {
                    println!("{error}");
                    count.failed += 1;
                }
            };
            style("cargo fmt", cargo(&["fmt", "--all", "--check"]));
            let lints = [
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--locked",
            ];
            let mut clippy = cargo(&lints);
            clippy.args(["--", "-D", "warnings"]);
            style("cargo clippy", clippy);
            println!("== unit tests");
            // The probe has a `main` of C's, around which no harness can be put.
            let all = [
                "test",
                "--quiet",
                "--workspace",
                "--exclude",
                "kata-like-tests",
                "--exclude",
                "kata-like-probe",
            ];
            let mut units = cargo(&all);
            units.args(["--lib", "--bins", "--locked", "--no-fail-fast"]);
            // The fs server needs no guest: its test speaks the guest's part.
            let mut server = cargo(&["test", "--quiet", "-p", "kata-like-fsd", "--locked"]);
            server.args(["--test", "server"]);
            for tests in [units, server] {
                if counted(tests, &mut count, None)? != 0 && count.failed == 0 {
                    return Err(failure("the unit tests don't build, or died"));
                }
            }
            let mut stage = Command::new("make");
            stage
                .args(["--no-print-directory", "stage"])
                .current_dir(&repository);
            must("build and install below the target folder", stage)?;
            target(&repository).join("installed").canonicalize()?
        }
    };
    let mut probe = Command::new("make");
    probe
        .args(["--no-print-directory", "probe"])
        .current_dir(&repository);
    must("build the probe", probe)?;
    let built = "guest/x86_64-unknown-linux-gnu/guest/kata-like-probe";
    fs::copy(target(&repository).join(built), work.join("probe"))?;
    must(
        "build the test host",
        cargo(&["build", "--quiet", "-p", "test-host"]),
    )?;
    let binaries = build(cargo(&[
        "test",
        "--locked",
        "-p",
        "kata-like-tests",
        "-p",
        "kata-like-vmm",
        "--tests",
        "--no-run",
        "--message-format=json",
    ]))?;
    for name in OUTSIDE {
        counted(Command::new(binary(&binaries, name)?), &mut count, None)?;
    }
    let host = target(&repository).join("debug/test-host");
    let mut prepare = Command::new(&host);
    prepare.arg("--prepare").stdout(Stdio::null());
    must("prepare the test host", prepare)?;
    let mut times = BTreeMap::from([(PARTS[0].0, before + begun.elapsed())]);

    let wanted: Vec<&str> = PARTS
        .iter()
        .flat_map(|(_, _, names)| names.iter().copied())
        .filter(|name| only.is_empty() || only.iter().any(|one| one == name))
        .collect();
    let mut boots = 0;
    let mut lost = String::new();
    loop {
        let done = results(&work);
        let left: Vec<String> = wanted
            .iter()
            .filter(|name| !done.contains_key(**name))
            .map(|name| Ok(format!("{name}={}", binary(&binaries, name)?.display())))
            .collect::<TestResult<_>>()?;
        if left.is_empty() {
            break;
        }
        boots += 1;
        let mut boot = Command::new(&host);
        boot.arg("--share")
            .arg(&work)
            .arg("--console")
            .arg(work.join("console"));
        boot.arg("--")
            .arg(&runner)
            .arg("inside")
            .arg(&work)
            .arg(&installed)
            .args(&left);
        let code = counted(boot, &mut Count::default(), None)?;
        if code == HOST_FAILED && boots < BOOTS {
            lost = format!("the test host itself failed {boots} time(s); its log is above\n");
            continue;
        }
        if results(&work).len() < wanted.len() {
            count.failed += 1;
            println!("not all integration tests were run: the test host ended with {code}");
            break;
        }
    }

    for (name, (seconds, passed, failed)) in results(&work) {
        count.passed += passed;
        count.failed += failed;
        if let Some((part, ..)) = PARTS
            .iter()
            .find(|(_, _, names)| names.contains(&name.as_str()))
        {
            *times.entry(part).or_default() += Duration::from_secs_f64(seconds);
        }
    }
    summary(&work, &times, &lost);
    println!("{} passed, {} failed", count.passed, count.failed);
    Ok(count.failed == 0)
}

fn summary(work: &Path, times: &BTreeMap<&str, Duration>, lost: &str) {
    println!("\n== figures (emulated: good as ratios within this run) ==");
    print!(
        "{}",
        fs::read_to_string(work.join("figures")).unwrap_or_default()
    );
    for report in ["oracle.txt", "oracle-1.7.txt"].map(|name| work.join(name)) {
        if report.exists() {
            println!(
                "what containers see here and under runc: {}",
                report.display()
            );
        }
    }
    println!("\n== time ==");
    for (part, minutes, _) in PARTS {
        let took = times.get(part).copied().unwrap_or_default();
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
    print!("{lost}");
    let again = fs::read_to_string(work.join("again")).unwrap_or_default();
    if !again.is_empty() {
        print!("\n== the emulated CPU failed under a guest ==\n{again}");
    }
}

/// How long the outermost `make` above this program has been at it.
fn started_before() -> Duration {
    let mut pid = std::process::id() as i32;
    let mut age = Duration::ZERO;
    while let Some(process) = Process::find(pid) {
        if process.is("make") {
            age = process.age().unwrap_or(age);
        }
        pid = process.parent;
    }
    age
}

/// This program is in `TARGET/debug`.
fn target(repository: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), PathBuf::from)
}

fn must(what: &str, mut command: Command) -> TestResult {
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
fn counted(mut command: Command, count: &mut Count, until: Option<Instant>) -> TestResult<i32> {
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
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            print!("{text}");
            count.take(text.trim_end());
            line.clear();
        }
    }
    Ok(child.wait()?.code().unwrap_or(-1))
}

/// Builds the tests and gives the path of each test binary by its name.
fn build(mut command: Command) -> TestResult<BTreeMap<String, PathBuf>> {
    println!("== build the integration tests");
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(failure("the integration tests don't build"));
    }
    let mut found = BTreeMap::new();
    for line in output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let message: serde_json::Value = serde_json::from_slice(line)?;
        let test = message["profile"]["test"].as_bool() == Some(true);
        if let (true, Some(path), Some(name)) = (
            test,
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            found.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(found)
}

fn binary<'a>(binaries: &'a BTreeMap<String, PathBuf>, name: &str) -> TestResult<&'a Path> {
    binaries
        .get(name)
        .map(PathBuf::as_path)
        .ok_or_else(|| failure(format!("no test binary {name}")))
}

/// What `inside` has recorded: seconds, passed, failed, by test binary.
fn results(work: &Path) -> BTreeMap<String, (f64, u64, u64)> {
    let text = fs::read_to_string(work.join("results")).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let name = words.next()?.to_owned();
            let seconds = words.next()?.parse().ok()?;
            Some((
                name,
                (
                    seconds,
                    words.next()?.parse().ok()?,
                    words.next()?.parse().ok()?,
                ),
            ))
        })
        .collect()
}

/// In the test host: `inside WORK INSTALLED NAME=BINARY…`.
fn inside(arguments: &[String]) -> TestResult<bool> {
    let [work, installed, binaries @ ..] = arguments else {
        return Err(failure("no working folder, or no installed one"));
    };
    let work = Path::new(work);
    install(Path::new(installed))?;
    let temporary = Path::new("/run/tests.temporary");
    let mut all_passed = true;
    for (name, path) in binaries.iter().filter_map(|entry| entry.split_once('=')) {
        println!("\n== {name}");
        let begun = Instant::now();
        let minutes = PARTS
            .iter()
            .find(|(_, _, names)| names.contains(&name))
            .map_or(5, |part| part.1);
        let threads = if ALONE.contains(&name) { "1" } else { "2" };
        fs::create_dir_all(temporary)?;
        let kernel = format!("{PREFIX}/share/kata-like/vmlinux");
        let server = format!("{PREFIX}/libexec/kata-like/kata-like-fsd");
        let command = || {
            let mut command = Command::new(path);
            command
                .args(["--test-threads", threads])
                .env("TMPDIR", temporary)
                .env("KATA_LIKE_PREFIX", PREFIX)
                .env("KATA_LIKE_KERNEL", &kernel)
                .env("KATA_LIKE_FSD", &server)
                .env(oracle::PROBE, work.join("probe"))
                .env(oracle::REPORT, work)
                .env(figures::VARIABLE, work.join("figures"));
            command
        };
        let mut count = Count::default();
        let until = begun + Duration::from_secs(minutes * 60 * 2);
        let mut code = counted(command(), &mut count, Some(until))?;
        if count.failed > 0 && (count.struck || log_is_struck()) && emulated()? {
            // Once, told in the summary, and only where the output says so.
            let struck = std::mem::take(&mut count.failures);
            println!("\n== {name}, what failed under the emulator: {struck:?}");
            let mut again = command();
            again.arg("--exact").args(&struck);
            count.failed = 0;
            code = counted(again, &mut count, Some(until))?;
            let line = format!("{name}: run a second time: {struck:?}\n");
            append(&work.join("again"), &line)?;
        }
        if code != 0 && count.failed == 0 {
            count.failed = 1;
        }
        if count.failed > 0 {
            all_passed = false;
            keep_logs(work, name);
        }
        clear_up();
        let line = format!(
            "{name} {:.1} {} {}\n",
            begun.elapsed().as_secs_f64(),
            count.passed,
            count.failed
        );
        append(&work.join("results"), &line)?;
    }
    Ok(all_passed)
}

fn append(path: &Path, line: &str) -> TestResult {
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    Ok(file.write_all(line.as_bytes())?)
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

/// Whether a shim has logged such an end of its guest.
fn log_is_struck() -> bool {
    let entries = fs::read_dir("/run").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("tests."))
        .filter_map(|entry| fs::read(entry.path().join("log")).ok())
        .any(|log| {
            let log = String::from_utf8_lossy(&log);
            STRUCK.iter().any(|words| log.contains(words))
        })
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
