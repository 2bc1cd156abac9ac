//! What is done before a test host is booted: style, unit tests, builds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use kata_like_tests::process::Process;
use kata_like_tests::{TestResult, failure};

use crate::count::{Count, counted, lines, must};

/// Formatting, lints and all tests that need no host. A fault of style fails the run, and does not keep the
/// tests from being run.
pub fn style_and_units(repository: &Path, count: &mut Count) -> TestResult {
    let mut style = |what: &str, command: Command| {
        if let Err(error) = must(what, command) {
            println!("{error}");
            count.failed += 1;
        }
    };
    style("cargo fmt", cargo(repository, &["fmt", "--all", "--check"]));
    let lints = [
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ];
    style("cargo clippy", cargo(repository, &lints));
    println!("== unit tests");
    // The probe has a `main` of C's, around which no harness can be put.
    let units = [
        "test",
        "--quiet",
        "--workspace",
        "--exclude",
        "kata-like-tests",
        "--exclude",
        "kata-like-probe",
        "--lib",
        "--bins",
        "--locked",
        "--no-fail-fast",
    ];
    // The fs server needs no guest: its test speaks the guest's part.
    let server = [
        "test",
        "--quiet",
        "-p",
        "kata-like-fsd",
        "--locked",
        "--test",
        "server",
    ];
    for tests in [&units[..], &server[..]] {
        if counted(cargo(repository, tests), count, None)? != 0 && count.failed == 0 {
            return Err(failure("the unit tests don't build, or died"));
        }
    }
    Ok(())
}

/// Builds the test host.
pub fn host(repository: &Path) -> TestResult {
    must(
        "build the test host",
        cargo(repository, &["build", "--quiet", "-p", "test-host"]),
    )
}

/// Builds the integration tests; gives the path of each test binary by its name.
pub fn tests(repository: &Path) -> TestResult<BTreeMap<String, PathBuf>> {
    println!("== build the integration tests");
    let arguments = [
        "test",
        "--locked",
        "-p",
        "kata-like-tests",
        "-p",
        "kata-like-vmm",
        "--tests",
        "--no-run",
        "--message-format=json",
    ];
    let output = cargo(repository, &arguments)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(failure("the integration tests don't build"));
    }
    let mut found = BTreeMap::new();
    lines(&output.stdout[..], |line| {
        let message: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let test = message["profile"]["test"].as_bool() == Some(true);
        if let (true, Some(path), Some(name)) = (
            test,
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            found.insert(name.to_owned(), PathBuf::from(path));
        }
    })?;
    Ok(found)
}

/// One of them.
pub fn binary<'a>(binaries: &'a BTreeMap<String, PathBuf>, name: &str) -> TestResult<&'a Path> {
    binaries
        .get(name)
        .map(PathBuf::as_path)
        .ok_or_else(|| failure(format!("no test binary {name}")))
}

/// `make TARGET` of the repository.
pub fn make(repository: &Path, target: &str) -> Command {
    let mut command = Command::new("make");
    command
        .args(["--no-print-directory", target])
        .current_dir(repository);
    command
}

fn cargo(repository: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(arguments).current_dir(repository);
    command
}

/// How long the outermost `make` above this program has been at it.
pub fn started_before() -> Duration {
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
