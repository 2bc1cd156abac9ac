//! Debian's programs in a container of the busybox image: the test host has a `/usr` with systemd,
//! iptables and others (`tools/test-host/src/userland.rs`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::host::tools;
use crate::{TestResult, failure};

/// The copy, in memory.
const COPY: &str = "/run/userland";

/// A file or directory of it on the host.
pub fn path(name: &str) -> TestResult<PathBuf> {
    static COPIED: OnceLock<Result<(), String>> = OnceLock::new();
    let copied = COPIED.get_or_init(|| copy().map_err(|error| error.to_string()));
    copied.clone().map_err(failure)?;
    let path = Path::new(COPY).join(name);
    match path.exists() {
        true => Ok(path),
        false => Err(failure(format!("the test host has no {}", path.display()))),
    }
}

/// An emulated host has its tools over 9p. Linux' 9p client loses entries of a directory that is
/// read in parts from a position, as a file server reads it.
fn copy() -> TestResult {
    if Path::new(COPY).exists() {
        return Ok(());
    }
    let (from, new) = (tools()?.join("userland"), format!("{COPY}.new"));
    let status = Command::new("cp").arg("-a").arg(&from).arg(&new).status()?;
    if !status.success() {
        return Err(failure(format!("copy {}: {status}", from.display())));
    }
    Ok(fs::rename(new, COPY)?)
}

/// The options of `ctr run` that mount it into a container; busybox provides what it lacks.
pub fn options() -> TestResult<Vec<String>> {
    let mut options = Vec::new();
    for (from, to) in [("", "/usr"), ("lib", "/lib"), ("lib64", "/lib64")] {
        options.push("--mount".to_owned());
        options.push(format!(
            "type=bind,src={},dst={to},options=rbind:ro",
            path(from)?.display()
        ));
    }
    Ok(options)
}
