//! The parts of one story. Each part runs, even if an earlier one has failed, and all failed parts
//! are named.
//!
//! A pod takes seconds to start, so independent parts share one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::{TestResult, failure};

/// The results of the parts so far.
#[derive(Default)]
pub struct Parts {
    run: usize,
    failures: Vec<String>,
}

impl Parts {
    /// No part has run yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs a part; returns its value, or nothing if it fails.
    pub fn run<T>(&mut self, name: &str, part: impl FnOnce() -> TestResult<T>) -> Option<T> {
        self.run += 1;
        let begun = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(part));
        println!("{name}: {:.1} s", begun.elapsed().as_secs_f32());
        match result {
            Ok(Ok(given)) => return Some(given),
            Ok(Err(error)) => self.failures.push(format!("{name}: {error}")),
            // The assertion's own text is on stderr.
            Err(_) => self.failures.push(format!("{name}: an assertion failed")),
        }
        None
    }

    /// Fails if a part has failed, and names each that has.
    pub fn end(mut self) -> TestResult {
        match std::mem::take(&mut self.failures) {
            none if none.is_empty() => Ok(()),
            some => Err(failure(format!(
                "{} of {} parts: {}",
                some.len(),
                self.run,
                some.join("; ")
            ))),
        }
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // The story broke off between two parts, so its own error is not the only one.
        if !self.failures.is_empty() {
            eprintln!("failed before: {}", self.failures.join("; "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_hides_no_other() {
        let mut parts = Parts::new();
        assert_eq!(parts.run("first", || Ok(1)), Some(1));
        let broken: Option<()> = parts.run("second", || Err(failure("broken")));
        assert!(broken.is_none());
        let wrong: Option<()> = parts.run("third", || panic!("an assertion of the test's own"));
        assert!(wrong.is_none());
        assert_eq!(parts.run("fourth", || Ok(4)), Some(4));
        let said = parts.end().map_err(|error| error.to_string());
        let wanted = "2 of 4 parts: second: broken; third: an assertion failed";
        assert_eq!(said, Err(wanted.to_owned()));
    }

    #[test]
    fn all_well_is_well() -> TestResult {
        let mut parts = Parts::new();
        parts.run("one", || Ok(()));
        parts.end()
    }
}
