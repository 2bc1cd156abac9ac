//! What the proxy gives up, and the system calls that are left to it.
//!
//! `main` calls [`give_up`] while the process has one thread, and [`close`] when all descriptors
//! are watched, before the first byte of the guest's is read.

use kata_like_failure::{Failure, Step};
use kata_like_jail::lists::proxy::{DEBUG, ONLY};
use kata_like_jail::seccomp::Threads;
use kata_like_jail::{JailError, drop_identity, enter_empty_root, limit, shut_out};
use rustix::process::{Resource, getpid};

/// The most open files: its sockets, the runtime's, and the file of a long request.
const MAX_FILES: u64 = 64;

/// The most address space in bytes: the program, and what 1,024 answers under way come to.
const MAX_ADDRESSES: u64 = 256 << 20;

/// Gives up files, identity and capabilities.
pub fn give_up(uid: u32) -> Result<(), Failure> {
    let step = || "jail the proxy";
    if !enter_empty_root().step(step)? {
        eprintln!(
            "kata-like-proxy: the SELinux label forbids an empty root: it keeps files off alone"
        );
    }
    drop_identity(uid).step(step)?;
    if !shut_out().step(step)? {
        eprintln!("kata-like-proxy: the kernel has no Landlock: files are kept off by the rest");
    }
    // A write to a file, which standard error may be, is an error and not the process's end.
    kata_like_linux::signal::ignore(libc::SIGXFSZ)
        .step(|| "ignore the signal of a file's limit")?;
    for (what, most) in [
        (Resource::Fsize, 0),
        (Resource::Nofile, MAX_FILES),
        (Resource::As, MAX_ADDRESSES),
    ] {
        limit(what, most).step(step)?;
    }
    Ok(())
}

/// From now on any system call that is not in `kata_like_jail::lists::proxy` kills the process.
pub fn close() -> Result<(), JailError> {
    let more = if cfg!(debug_assertions) { DEBUG } else { &[] };
    ONLY.filter(getpid(), more)?.install(Threads::Calling)
}

#[cfg(test)]
mod tests;
