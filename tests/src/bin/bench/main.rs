//! The bench: kata-like beside other runtimes, in turn, on one host in one run.
//!
//! | command | what |
//! |---|---|
//! | `bench run ROUNDS FILE` | within a test host: measures, and writes the results (JSON) |
//! | `bench page FILE FOLDER` | `performance.md` and its plot, made from results |
//! | `bench compare OLD NEW` | what has changed between two files of results |
//!
//! `make bench` calls `run-tests --bench`, which boots the host. Absolute times are those of the
//! machine. What counts is the ratio of two runtimes in the same round.

mod compare;
mod files;
mod measures;
mod memory;
mod page;
mod results;
mod stats;
mod timing;

use std::path::Path;
use std::process::ExitCode;

use kata_like_tests::{TestResult, failure};

use results::Results;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> TestResult {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["run", rounds, file] => {
            let results = measures::all(rounds.parse()?)?;
            results.write(Path::new(file))
        }
        ["page", file, folder] => page::write(&Results::read(Path::new(file))?, Path::new(folder)),
        ["compare", old, new] => {
            let (old, new) = (Path::new(old), Path::new(new));
            print!(
                "{}",
                compare::table(&Results::read(old)?, &Results::read(new)?)
            );
            Ok(())
        }
        _ => Err(failure(
            "one of: run ROUNDS FILE, page FILE FOLDER, compare OLD NEW",
        )),
    }
}
