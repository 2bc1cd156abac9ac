//! Writes to the files of a cgroup.

use std::fs;
use std::path::Path;

use kata_like_failure::{Failure, Step};

/// Writes `value` to `file` of the cgroup in `directory`.
pub fn write(directory: &Path, file: &str, value: &str) -> Result<(), Failure> {
    let written = fs::write(directory.join(file), value);
    written.step(|| writing(directory, file, value))
}

/// What a failed write was.
pub fn writing(directory: &Path, file: &str, value: &str) -> String {
    format!(
        "write {value:?} to {file} of cgroup {}",
        directory.display()
    )
}
