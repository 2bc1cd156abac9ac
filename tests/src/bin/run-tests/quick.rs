//! From an edit to an answer: one test binary, one host, one test; or a shell in that host.
//!
//! The product is built with the profile `quick` into folders of its own (`installed-quick`), so
//! neither this nor `make test` spoils what the other has built. Each step says how long it took.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use kata_like_limits::Patience;
use kata_like_tests::{TestResult, failure};

use crate::Folders;
use crate::builds::{self, Which};
use crate::count::must;
use crate::everything::{begin, verdict};
use crate::hosts::Hosts;
use crate::libtest::{self, Filter};
use crate::plan::{self, in_order, total};

/// The cargo profile of the product, the agent and the probe.
const PROFILE: &str = "quick";

/// Says how long each step took.
struct Steps {
    begun: Instant,
    step: Instant,
}

impl Steps {
    fn begin() -> Self {
        let now = Instant::now();
        Self {
            begun: now,
            step: now,
        }
    }

    fn done(&mut self, what: &str) {
        let took = self.step.elapsed().as_secs_f32();
        let all = self.begun.elapsed().as_secs_f32();
        println!("   {what}: {took:.1} s (after {all:.1} s)");
        self.step = Instant::now();
    }
}

/// `BINARY[::TEST]`: those tests of a binary whose names hold `TEST`, or the one that has exactly
/// this name.
pub fn only(folders: &Folders, test: &str) -> TestResult<bool> {
    let mut steps = Steps::begin();
    let (name, test) = test
        .split_once("::")
        .map_or((test, None), |(name, test)| (name, Some(test)));
    if !in_order().contains(&name) {
        let all = in_order().join(" ");
        return Err(failure(format!("no test binary {name}; there are: {all}")));
    }
    let runner = begin(folders)?;
    // First: what does not compile, or has no such test, says so before anything else is built.
    let binaries = builds::tests(&folders.repository, &Which::One(name))?;
    steps.done("build the test");
    let filter = test.map_or(Filter::All, |test| Filter::Part(test.to_owned()));
    let mut wanted = builds::wanted(&binaries, &[name], &filter)?;
    for binary in &mut wanted {
        if let Some(test) = test.filter(|test| binary.tests.iter().any(|name| name == test)) {
            binary.tests = vec![test.to_owned()];
        }
        if binary.tests.is_empty() {
            let all = libtest::list(&binary.path, &Filter::All)?.join("\n  ");
            let test = test.unwrap_or_default();
            return Err(failure(format!(
                "no test of {name} has {test:?} in its name; there are:\n  {all}"
            )));
        }
    }
    if name == plan::FAIL_POINTS {
        builds::take_fail_points(folders)?;
        steps.done("build the shim with fail points");
    }
    let (host, installed) = build(folders, &mut steps)?;
    let hosts = Hosts {
        program: &host,
        runner: &runner,
        work: &folders.work,
        installed: &installed,
        total: Patience::new(total()),
        begun: Instant::now(),
    };
    let outcome = hosts.run(&wanted)?;
    steps.done("boot a host and run the tests");
    let count = outcome.count(&wanted);
    outcome.lost.iter().for_each(|line| println!("{line}"));
    verdict(folders, &count);
    Ok(count.all_passed())
}

/// A host with containerd and the product, a shell in it, and `run-test`; of one test binary, or of
/// all.
pub fn shell(folders: &Folders, name: Option<&str>) -> TestResult<bool> {
    let mut steps = Steps::begin();
    let runner = begin(folders)?;
    let which = name.map_or(Which::All, Which::One);
    let mut binaries = builds::tests(&folders.repository, &which)?;
    binaries.retain(|name, _| in_order().contains(&name.as_str()));
    steps.done("build the tests");
    if binaries.contains_key(plan::FAIL_POINTS) {
        builds::take_fail_points(folders)?;
        steps.done("build the shim with fail points");
    }
    let (host, installed) = build(folders, &mut steps)?;
    let list: String = binaries
        .iter()
        .map(|(name, path)| format!("{name} {}\n", path.display()))
        .collect();
    fs::write(folders.work.join("binaries"), list)?;
    let status = Command::new(host)
        .arg("--interactive")
        .arg("--share")
        .arg(&folders.work)
        .arg("--console")
        .arg(folders.work.join("console"))
        .args(["--deadline", "86400", "--"])
        .arg(folders.repository.join("tools/shell"))
        .args([&installed, &runner, &folders.work])
        .status()?;
    Ok(status.success())
}

/// Builds the product, the probe and the test host; gives the host's program and the installed
/// product.
fn build(folders: &Folders, steps: &mut Steps) -> TestResult<(PathBuf, PathBuf)> {
    let profile = format!("PROFILE={PROFILE}");
    let stage = builds::make(
        &folders.repository,
        &["stage", "probe", "raw-guest", &profile],
    );
    must("build and install the product", stage)?;
    builds::take_guests(folders, PROFILE)?;
    steps.done("build and install the product");
    builds::host(&folders.repository)?;
    let host = folders.target.join("debug/test-host");
    let mut prepare = Command::new(&host);
    prepare.arg("--prepare").stdout(Stdio::null());
    must("prepare the test host", prepare)?;
    steps.done("build and prepare the test host");
    let installed = folders.target.join(format!("installed-{PROFILE}"));
    Ok((host, installed.canonicalize()?))
}
