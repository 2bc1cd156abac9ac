//! Measurements of tests, for the summary at the end of `run-tests`.

use std::fs::OpenOptions;
use std::io::Write;

/// The variable with the file that collects them; `run-tests` sets it.
pub const VARIABLE: &str = "KATA_LIKE_TEST_FIGURES";

/// Adds one line to the summary; without `run-tests` it is printed.
pub fn note(line: &str) {
    println!("{line}");
    if let Some(path) = std::env::var_os(VARIABLE)
        && let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = writeln!(file, "{line}");
    }
}
