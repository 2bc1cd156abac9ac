//! Programs that images have and busybox lacks: systemd, iptables, databases and others of the
//! machine's own suite, with their libraries.
//!
//! `prepare` calls this. Tests mount the result into containers as `/usr`, read-only, and its `lib`
//! and `lib64` once more as those of the root. No script of a package runs: what it would set up,
//! users and configuration, is the container's.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::error::HostError;
use crate::packages::{Beside, output};

/// What the tests run; apt adds the dependencies.
pub const PACKAGES: [&str; 11] = [
    "acl",
    "attr",
    "catatonit",
    "fuse-overlayfs",
    "iproute2",
    "iptables",
    "keyutils",
    "lmdb-utils",
    "nftables",
    "sqlite3",
    "systemd",
];

/// Taken without their dependencies: the tests need no more of perl, and no part of git that speaks
/// over networks. The packages above, and these, have the libraries.
pub const ALONE: [&str; 4] = ["git", "liblmdb-file-perl", "liblmdb0", "perl-base"];

/// Directories of a root that are links into `usr`, though not yet in each package.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// For people, or for networks: half of git is its clients and servers.
const LEFT_OUT: [&str; 16] = [
    "bin/git-shell",
    "bin/scalar",
    "lib/git-core/git-daemon",
    "lib/git-core/git-http-backend",
    "lib/git-core/git-http-fetch",
    "lib/git-core/git-http-push",
    "lib/git-core/git-imap-send",
    "lib/git-core/git-remote-http",
    "lib/git-core/git-sh-i18n--envsubst",
    "lib/git-core/git-shell",
    "lib/git-core/scalar",
    "share/doc",
    "share/gitweb",
    "share/i18n",
    "share/locale",
    "share/man",
];

/// Makes the content of `/usr` in `target`; `root` takes what is not kept.
pub fn build(apt: &Beside, root: &Path, target: &Path) -> Result<(), HostError> {
    apt.unpack_all(&PACKAGES, root)?;
    for package in ALONE {
        apt.unpack_own(package, root)?;
    }
    let usr = root.join("usr");
    for name in MERGED {
        let unmerged = root.join(name);
        if unmerged.is_dir() {
            copy(&unmerged.join("."), &usr.join(name))?;
        }
    }
    for name in LEFT_OUT.map(|name| usr.join(name)) {
        let removed = match name.is_dir() {
            true => fs::remove_dir_all(&name),
            false if name.exists() => fs::remove_file(&name),
            false => Ok(()),
        };
        removed.map_err(HostError::file("remove", &name))?;
    }
    copy(&usr, target)
}

fn copy(from: &Path, to: &Path) -> Result<(), HostError> {
    output(
        "copy what was unpacked",
        Command::new("cp").arg("-aT").arg(from).arg(to),
    )
    .map(drop)
}
