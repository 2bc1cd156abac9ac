//! Which QEMU runs: the machine's own, or a newer one that lies beside the system.
//!
//! `prepare` puts the newer one there; `machine` and `direct` run what `program` returns. QEMU
//! before 8.1 translates code without holding its page, so a CPU may go on with an instruction that
//! another CPU has just replaced. Linux replaces its own instructions all the time, in the host and
//! in its guests. The libraries are those of the machine's own QEMU, which is installed in any
//! case.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::HostError;
use crate::packages::output;

/// The first version that locks a page before it translates from it.
const WANTED: (u32, u32) = (8, 1);

/// The packages of the newer QEMU.
pub const PACKAGES: [&str; 3] = ["qemu-system-x86", "qemu-system-data", "seabios"];

/// The newer QEMU's folder in the prepared directory.
pub const BESIDE: &str = "qemu";

const PROGRAM: &str = "qemu-system-x86_64";

/// QEMU with only the named devices, and without a second boot.
pub fn qemu(prepared: &Path) -> Command {
    let beside = prepared.join(BESIDE);
    let mut command = Command::new(program(prepared));
    if beside.is_dir() {
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(beside.join(firmware));
        }
    }
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command
}

/// The program to run.
pub fn program(prepared: &Path) -> PathBuf {
    let beside = prepared.join(BESIDE).join("usr/bin").join(PROGRAM);
    match beside.is_file() {
        true => beside,
        false => PROGRAM.into(),
    }
}

/// Whether the machine's own QEMU is older than [`WANTED`].
pub fn is_too_old() -> Result<bool, HostError> {
    let text = version(PROGRAM)?;
    let found = number(&text).ok_or_else(|| HostError::Missing {
        step: "look up QEMU's version",
        why: format!("no version in {text:?}"),
    })?;
    Ok(found < WANTED)
}

/// The first line of what a QEMU says about its version.
pub fn version(program: impl AsRef<OsStr>) -> Result<String, HostError> {
    let text = output(
        "ask QEMU for its version",
        Command::new(program).arg("--version"),
    )?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Major and minor number in `QEMU emulator version 7.2.22 (Debian …)`.
fn number(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split_once(" version ")?.1.split(['.', ' ']);
    let mut next = || parts.next()?.parse().ok();
    Some((next()?, next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_what_qemu_says() {
        let old = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)";
        assert_eq!(number(old), Some((7, 2)));
        assert!(number(old) < Some(WANTED));
        assert!(number("QEMU emulator version 10.0.2 (Debian 1:10.0.2)") > Some(WANTED));
        assert_eq!(number("QEMU emulator version unknown"), None);
    }
}
