//! `make bench`: builds what is shipped, boots one host, and measures there.

use std::fs;
use std::process::Command;

use kata_like_tests::TestResult;

use crate::Folders;
use crate::builds;
use crate::count::must;
use crate::everything::begin;

/// The profile of what is shipped.
const RELEASE: &str = "release";
/// How long all of it may take in the host, in seconds.
const DEADLINE: &str = "7200";

/// Leaves `bench.json` in the folder `target/bench`, and the page and the plot that are made of it.
pub fn bench(folders: &Folders, rounds: &str) -> TestResult<bool> {
    let runner = begin(folders)?;
    // `make` hands it on, to the `make` below, too.
    let profile = std::env::var("PROFILE").unwrap_or_else(|_| RELEASE.into());
    let stage = builds::make(&folders.repository, &["stage", "probe", "raw-guest"]);
    must("build and install the product", stage)?;
    let (guest, installed) = match profile.as_str() {
        RELEASE => ("guest", "installed".to_owned()),
        other => (other, format!("installed-{other}")),
    };
    builds::take_guests(folders, guest)?;
    builds::host(&folders.repository)?;
    must(
        "build the bench",
        builds::cargo(
            &folders.repository,
            &[
                "build",
                "--quiet",
                "--locked",
                "-p",
                "kata-like-tests",
                "--bin",
                "bench",
            ],
        ),
    )?;
    let bench = folders.target.join("debug/bench");
    let results = folders.target.join("bench");
    fs::create_dir_all(&results)?;
    let file = results.join("bench.json");
    let _ = fs::remove_file(&file);
    let installed = folders.target.join(installed).canonicalize()?;
    let host = folders.target.join("debug/test-host");
    let mut command = Command::new(host);
    command
        .args(["--deadline", DEADLINE, "--share"])
        .arg(&folders.target)
        .arg("--console")
        .arg(folders.work.join("console"))
        .arg("--")
        .arg(runner)
        .arg("in-bench")
        .args([&folders.work, &installed, &bench])
        .arg(rounds)
        .arg(&file);
    must("measure in a test host", command)?;
    let mut page = Command::new(bench);
    page.arg("page").args([&file, &results]);
    must("make the page", page)?;
    println!("results, page and plot: {}", results.display());
    Ok(true)
}
