//! Debian's programs in a container of the busybox image: the test host has a `/usr` with systemd, iptables
//! and others (`tools/test-host/src/userland.rs`).

use std::path::PathBuf;

use crate::host::tools;
use crate::{TestResult, failure};

/// A file or directory of it on the host.
pub fn path(name: &str) -> TestResult<PathBuf> {
    let path = tools()?.join("userland").join(name);
    match path.exists() {
        true => Ok(path),
        false => Err(failure(format!("the test host has no {}", path.display()))),
    }
}

/// The options of `ctr run` that put it into a container, where busybox is what it has not.
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
