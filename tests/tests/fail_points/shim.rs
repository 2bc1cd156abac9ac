//! A shim with fail points beside the installed programs, and what it is asked.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use kata_like_tests::{Host, TestResult, failure};

/// Where the shim looks (`shim-v2/src/steps/fail_points.rs`).
const DIRECTORY: &str = "/run/kata-like-fail-points";

/// The variable with the path of the built shim. `run-tests` sets it.
const BUILT: &str = "KATA_LIKE_FAIL_POINTS_SHIM";

/// An installed shim with fail points; taken away when dropped.
pub struct Shim {
    prefix: PathBuf,
}

impl Shim {
    /// Puts the built one into a tree of its own, whose other parts are the installed ones.
    pub fn install(host: &Host) -> TestResult<Self> {
        let built = std::env::var(BUILT).map_err(|_| failure(format!("{BUILT} is not set")))?;
        let installed = std::env::var("KATA_LIKE_PREFIX")?;
        let prefix = PathBuf::from(format!("/run/{}", host.name("fail-points")));
        let shim = Self { prefix };
        fs::create_dir_all(shim.prefix.join("bin"))?;
        fs::copy(&built, shim.program())
            .map_err(|error| failure(format!("copy {built}: {error}")))?;
        for part in ["libexec", "share"] {
            symlink(Path::new(&installed).join(part), shim.prefix.join(part))?;
        }
        fs::create_dir_all(DIRECTORY)?;
        Ok(shim)
    }

    /// Its path, which containerd takes as the name of a runtime.
    pub fn program(&self) -> PathBuf {
        self.prefix.join("bin/containerd-shim-kata-like-v2")
    }

    /// From now on the shim does this at that point.
    pub fn ask(&self, kind: &str, point: &str) -> TestResult {
        let new = Path::new(DIRECTORY).join("new");
        fs::write(&new, format!("{kind} {point}"))?;
        Ok(fs::rename(new, Path::new(DIRECTORY).join("inject"))?)
    }

    /// From now on it goes on; it has reached no point yet.
    pub fn ask_nothing(&self) {
        for file in ["inject", "reached"] {
            let _ = fs::remove_file(Path::new(DIRECTORY).join(file));
        }
    }

    /// Lets go on what sleeps at a point.
    pub fn wake(&self) {
        let _ = fs::remove_file(Path::new(DIRECTORY).join("inject"));
    }

    /// The points that were reached, in order.
    pub fn reached(&self) -> Vec<String> {
        let text = fs::read_to_string(Path::new(DIRECTORY).join("reached")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(DIRECTORY);
        let _ = fs::remove_dir_all(&self.prefix);
    }
}
