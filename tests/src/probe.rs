//! The static program of `tests/probe` as a tool in a container of the busybox image.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::host::Host;
use crate::oracle::PROBE;
use crate::{TestResult, failure};

/// Where it is in the container.
pub const TOOL: &str = "/tool";

/// Fails unless a file on the host is as `/tool store` makes it
/// (`tests/probe/src/tools/mapping.rs`).
pub fn check_stored(path: &Path, bytes: u64) -> TestResult {
    let mut found = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut found))
        .map_err(|error| failure(format!("read {}: {error}", path.display())))?;
    let words = (1..).map(|at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let right = found
        .chunks_exact(8)
        .zip(words)
        .take_while(|(found, word)| *found == word.to_le_bytes())
        .count() as u64
        * 8;
    match right == bytes && found.len() as u64 == bytes {
        true => Ok(()),
        false => Err(failure(format!(
            "{}: {right} of {bytes} bytes are right, it has {}",
            path.display(),
            found.len()
        ))),
    }
}

/// A copy on the host's tmpfs, gone with the value.
pub struct Tool(PathBuf);

impl Tool {
    /// Copies what `run-tests` has built.
    pub fn new(host: &Host) -> TestResult<Self> {
        let built = std::env::var_os(PROBE)
            .ok_or_else(|| failure(format!("{PROBE} is not set: run-tests builds the probe")))?;
        let path = PathBuf::from(format!("/run/{}", host.name("tool")));
        fs::copy(built, &path)?;
        Ok(Self(path))
    }

    /// Where it is on the host.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The `ctr --mount` argument that makes it [`TOOL`].
    pub fn mount(&self) -> String {
        format!(
            "type=bind,src={},dst={TOOL},options=bind:ro",
            self.0.display()
        )
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
