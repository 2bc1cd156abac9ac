//! Runs everything that `make test` promises, or one test of it, and tells how long each part took.
//!
//! The Makefile calls it:
//!
//! | command | what |
//! |---|---|
//! | `run-tests` | all (`everything`) |
//! | `run-tests INSTALLED [TEST-BINARY…]` | the integration tests, or these, on a tree |
//! | `run-tests --only BINARY[::TEST]` | one test, or those whose names hold that text (`quick`) |
//! | `run-tests --shell [BINARY]` | a test host with a shell in it (`quick`) |
//! | `run-tests --bench ROUNDS` | kata-like beside other runtimes (`measure`) |
//! | `run-tests --check` | formatting, lints, unit tests, the house |
//! | `run-tests --logs` | what the last failure left (`logs`) |
//!
//! Within a test host it runs again, with `inside`, `in-shell` or `in-bench` (`inside`).

mod builds;
mod count;
mod everything;
mod hosts;
mod inside;
mod libtest;
mod logs;
mod measure;
mod plan;
mod quick;
mod reader;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use kata_like_tests::{TestResult, failure};

use count::Count;

/// The folders that all commands know.
struct Folders {
    repository: PathBuf,
    target: PathBuf,
    /// What the last run of integration tests has left.
    work: PathBuf,
}

impl Folders {
    fn find() -> TestResult<Self> {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .canonicalize()?;
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| repository.join("target"), PathBuf::from);
        let work = target.join("test-run");
        Ok(Self {
            repository,
            target,
            work,
        })
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("run-tests: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> TestResult<bool> {
    let (first, rest) = match arguments {
        [first, rest @ ..] => (first.as_str(), rest),
        [] => return everything::run(&Folders::find()?, None, &[]),
    };
    match (first, rest) {
        ("inside", rest) => inside::run(rest),
        ("in-shell", rest) => inside::run_in_shell(rest),
        ("in-bench", rest) => inside::run_bench(rest),
        ("--bench", [rounds]) => measure::bench(&Folders::find()?, rounds),
        ("--only", [test]) => quick::only(&Folders::find()?, test),
        ("--shell", rest) => quick::shell(&Folders::find()?, rest.first().map(String::as_str)),
        ("--check", []) => check(&Folders::find()?),
        ("--logs", []) => logs::show(&Folders::find()?.work),
        (option, _) if option.starts_with("--") => {
            Err(failure(format!("{option}: unknown, or not used so")))
        }
        (installed, only) => everything::run(&Folders::find()?, Some(Path::new(installed)), only),
    }
}

/// What one runs before each commit.
fn check(folders: &Folders) -> TestResult<bool> {
    let begun = Instant::now();
    let mut count = Count::default();
    builds::style_and_units(&folders.repository, &mut count)?;
    builds::house(&folders.repository, &mut count)?;
    println!("after {:.0} s", begun.elapsed().as_secs_f32());
    println!("{}", count.verdict());
    Ok(count.all_passed())
}
