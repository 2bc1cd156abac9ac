//! What a test binary says of its tests: their names, and what became of each.
//!
//! A binary that is killed, or dies, prints no last line. So each test's own line is read as it
//! comes, and what has none was not run.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use kata_like_tests::{TestResult, failure};

/// Which tests of a binary are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Filter {
    /// All of them.
    #[default]
    All,
    /// Those whose name holds this text.
    Part(String),
    /// Those that have exactly these names.
    Exactly(Vec<String>),
}

impl Filter {
    /// The arguments by which a test binary understands it.
    pub fn arguments(&self) -> Vec<&str> {
        match self {
            Self::All => Vec::new(),
            Self::Part(text) => vec![text],
            Self::Exactly(names) => {
                let names = names.iter().map(String::as_str);
                ["--exact"].into_iter().chain(names).collect()
            }
        }
    }
}

/// The names of a binary's tests. The binary runs none of them.
pub fn list(binary: &Path, filter: &Filter) -> TestResult<Vec<String>> {
    let step = format!("list the tests of {}", binary.display());
    let output = Command::new(binary)
        .args(["--list", "--format", "terse"])
        .args(filter.arguments())
        .output()
        .map_err(|error| failure(format!("{step}: {error}")))?;
    if !output.status.success() {
        return Err(failure(format!("{step}: {}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect())
}

/// What a binary has said so far. One value can also hear several binaries, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// The tests that have ended, in whatever way.
    finished: BTreeSet<String>,
    /// The tests that failed.
    pub failures: Vec<String>,
    /// What the last lines of whole binaries add up to.
    passed: u64,
    failed: u64,
    /// What was said since the last of them.
    passed_since: u64,
    failed_since: u64,
    /// A test whose line has begun, where tests run one by one and print in between.
    begun: Option<String>,
}

impl Progress {
    /// Takes one line: `test NAME ... ok`, or `test result: ok. 3 passed; 0 failed; …`.
    pub fn take(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            self.passed += number(rest, " passed");
            self.failed += number(rest, " failed");
            (self.passed_since, self.failed_since, self.begun) = (0, 0, None);
        } else if let Some((name, what)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
        {
            let name = name.strip_suffix(" - should panic").unwrap_or(name);
            if !self.end(name, what) {
                self.begun = Some(name.to_owned());
            }
        } else if let Some(name) = self.begun.take()
            && !self.end(&name, line)
        {
            self.begun = Some(name);
        }
    }

    /// Notes how a test ended. Says whether this is such a word.
    fn end(&mut self, name: &str, word: &str) -> bool {
        match word {
            "ok" => self.passed_since += 1,
            "FAILED" => {
                self.failed_since += 1;
                self.failures.push(name.to_owned());
            }
            _ if word.starts_with("ignored") => {}
            _ => return false,
        }
        self.finished.insert(name.to_owned());
        true
    }

    pub fn passed(&self) -> u64 {
        self.passed + self.passed_since
    }

    pub fn failed(&self) -> u64 {
        self.failed + self.failed_since
    }

    /// Those of the listed tests that have not ended.
    pub fn not_run(&self, listed: &[String]) -> Vec<String> {
        listed
            .iter()
            .filter(|name| !self.finished.contains(*name))
            .cloned()
            .collect()
    }
}

/// The number before a word.
fn number(text: &str, word: &str) -> u64 {
    let end = text.find(word).unwrap_or(0);
    text[..end]
        .split_whitespace()
        .last()
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(lines: &[&str]) -> Progress {
        let mut progress = Progress::default();
        lines.iter().for_each(|line| progress.take(line));
        progress
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_binary_that_ends_is_counted_by_its_last_line() {
        let progress = heard(&[
            "running 3 tests",
            "test a ... ok",
            "test b::c ... FAILED",
            "test d ... ignored, needs a disk",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out",
        ]);
        assert_eq!((progress.passed(), progress.failed()), (1, 1));
        assert_eq!(progress.failures, ["b::c"]);
        assert!(progress.not_run(&names(&["a", "b::c", "d"])).is_empty());
    }

    #[test]
    fn a_binary_that_is_killed_is_counted_by_its_tests() {
        let progress = heard(&[
            "test a ... ok",
            "test b ... FAILED",
            "test e - should panic ... ok",
            "test f has been running for over 60 seconds",
        ]);
        assert_eq!((progress.passed(), progress.failed()), (2, 1));
        let listed = names(&["a", "b", "c", "d", "e", "f"]);
        assert_eq!(progress.not_run(&listed), ["c", "d", "f"]);
    }

    #[test]
    fn tests_one_by_one_may_print_into_their_line() {
        let progress = heard(&[
            "test a ... a word from a process",
            "another",
            "ok",
            "test b ... and then it was killed",
        ]);
        assert_eq!(progress.passed(), 1);
        assert_eq!(progress.not_run(&names(&["a", "b"])), ["b"]);
    }

    #[test]
    fn several_binaries_add_up() {
        let progress = heard(&[
            "test result: ok. 3 passed; 0 failed; 0 ignored",
            "test result: FAILED. 4 passed; 2 failed; 0 ignored",
        ]);
        assert_eq!((progress.passed(), progress.failed()), (7, 2));
    }
}
