//! A directory of the host that containers have as a volume.

use std::fs;
use std::path::{Path, PathBuf};

use crate::TestResult;
use crate::host::Host;

/// A directory on the host's tmpfs, gone with the value.
pub struct Directory(PathBuf);

impl Directory {
    /// Makes an empty directory.
    pub fn new(host: &Host) -> TestResult<Self> {
        let path = PathBuf::from(format!("/run/{}", host.name("volume")));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// The host's path of a file in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The `ctr --mount` argument for it.
    pub fn at(&self, target: &str, options: &str) -> String {
        bind(&self.0, target, options)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The size of the tmpfs that holds the roots of containers and these directories, in bytes. What a
/// container writes there is memory of its pod on the host.
pub fn memory_of_roots() -> TestResult<u64> {
    let about = rustix::fs::statfs("/run")?;
    Ok(about.f_blocks * u64::try_from(about.f_bsize)?)
}

/// The `ctr --mount` argument for a file or directory of the host.
pub fn bind(source: &Path, target: &str, options: &str) -> String {
    format!(
        "type=bind,src={},dst={target},options={options}",
        source.display()
    )
}
