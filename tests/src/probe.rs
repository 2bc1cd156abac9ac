//! The static program of `tests/probe` as a tool in a container of the busybox image.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::Host;
use crate::oracle::PROBE;
use crate::{TestResult, failure};

/// Where it is in the container.
pub const TOOL: &str = "/tool";

/// A copy on the host's tmpfs, gone with the value.
pub struct Tool(PathBuf);

impl Tool {
    /// Takes what `run-tests` has built.
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

    /// What `ctr --mount` takes to have it as [`TOOL`].
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
