//! What is done before a test host is booted: style, unit tests, builds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use kata_like_tests::process::Process;
use kata_like_tests::{TestResult, failure};

use crate::Folders;
use crate::count::{Count, counted, lines, must};
use crate::hosts::Wanted;
use crate::libtest::{self, Filter};
use crate::plan;

/// The name of the shim with fail points in the working folder.
pub const FAIL_POINTS: &str = "shim-with-fail-points";

/// Formatting, lints and all tests that need no host. A fault of style fails the run, and does not
/// keep the tests from being run.
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
    let mut supply = Command::new("tools/cargo-deny");
    supply.current_dir(repository);
    style("hold the crates to deny.toml", supply);
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
        count.add(unnamed(cargo(repository, tests), "the unit tests")?);
    }
    Ok(())
}

/// The tests of the tests' own crate that need no host: the house, the harness and this runner.
pub fn house(repository: &Path, count: &mut Count) -> TestResult {
    println!("== the house");
    let house = [
        "test",
        "--quiet",
        "-p",
        "kata-like-tests",
        "--locked",
        "--lib",
        "--bin",
        "run-tests",
        "--bin",
        "bench",
        "--test",
        "house",
        "--no-fail-fast",
    ];
    count.add(unnamed(cargo(repository, &house), "the house")?);
    Ok(())
}

/// Runs tests that have no list of names to be held against.
fn unnamed(command: Command, what: &str) -> TestResult<Count> {
    let counted = counted(command, None)?;
    let count = Count {
        passed: counted.progress.passed(),
        failed: counted.progress.failed(),
        ..Count::default()
    };
    if counted.code != 0 && count.failed == 0 {
        return Err(failure(format!("{what}: they don't build, or died")));
    }
    Ok(count)
}

/// Builds the test host.
pub fn host(repository: &Path) -> TestResult {
    let build = ["build", "--quiet", "--locked", "-p", "test-host"];
    must("build the test host", cargo(repository, &build))
}

/// Which integration tests are built.
pub enum Which<'a> {
    All,
    One(&'a str),
}

/// Builds the integration tests; gives the path of each test binary by its name.
pub fn tests(repository: &Path, which: &Which) -> TestResult<BTreeMap<String, PathBuf>> {
    let mut arguments = vec!["test", "--locked", "--no-run", "--message-format=json"];
    match which {
        Which::All => arguments.extend(["-p", "kata-like-tests", "-p", "kata-like-vmm", "--tests"]),
        Which::One(name) => {
            let of_the_vmm = plan::OF_THE_VMM.contains(name);
            let package = if of_the_vmm {
                "kata-like-vmm"
            } else {
                "kata-like-tests"
            };
            arguments.extend(["-p", package, "--test", name]);
        }
    }
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

/// Those of these test binaries that are to be run, each with the names of its tests.
pub fn wanted(
    binaries: &BTreeMap<String, PathBuf>,
    names: &[&str],
    filter: &Filter,
) -> TestResult<Vec<Wanted>> {
    let one = |name: &&str| {
        let path = binaries
            .get(*name)
            .ok_or_else(|| failure(format!("no test binary {name}")))?;
        Ok(Wanted {
            name: (*name).to_owned(),
            path: path.clone(),
            tests: libtest::list(path, filter)?,
        })
    };
    names.iter().map(one).collect()
}

/// Copies the probe and the raw guest to where the hosts find them.
pub fn take_guests(folders: &Folders, profile: &str) -> TestResult {
    for name in ["probe", "raw-guest"] {
        let built = format!("x86_64-unknown-linux-gnu/{profile}/kata-like-{name}");
        let built = folders.target.join(built);
        fs::copy(&built, folders.work.join(name))
            .map_err(|error| failure(format!("copy {}: {error}", built.display())))?;
    }
    Ok(())
}

/// Builds the shim with fail points and copies it to where the hosts find it. The profile is that
/// of the unit tests, which have built most of it.
pub fn take_fail_points(folders: &Folders) -> TestResult {
    let build = [
        "build",
        "--quiet",
        "--locked",
        "-p",
        "containerd-shim-kata-like-v2",
        "--features",
        "fail-points",
    ];
    let what = "build the shim with fail points";
    must(what, cargo(&folders.repository, &build))?;
    let built = folders.target.join("debug/containerd-shim-kata-like-v2");
    fs::copy(&built, folders.work.join(FAIL_POINTS))
        .map_err(|error| failure(format!("copy {}: {error}", built.display())))?;
    Ok(())
}

/// `make` of the repository: a target, and variables for it.
pub fn make(repository: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("make");
    command
        .arg("--no-print-directory")
        .args(arguments)
        .current_dir(repository);
    command
}

/// `cargo` in the repository.
pub fn cargo(repository: &Path, arguments: &[&str]) -> Command {
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
