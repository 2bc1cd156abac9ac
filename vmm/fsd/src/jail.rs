//! What the server gives up, and what it keeps because serving files needs it.
//!
//! `main` calls each step once: the limits and `close_others` first, `drop_privileges` when the
//! share is the root. `serve` calls `only_files_below`; the filters of system calls come later
//! (`filters`).
//!
//! The server stays uid 0, since files belong to many users. It drops the capabilities that would
//! reach beyond its files: without MKNOD a guest makes no device nodes; without SYS_ADMIN and
//! DAC_READ_SEARCH no file is opened by a handle that skips its directory.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;

use caps::Capability;
use kata_like_jail::JailError;
use kata_like_linux::landlock::{self, Access, Ruleset};
use rustix::process::{Resource, getrlimit};

/// The descriptor table grows to this size before there are threads. Growing it later would wait
/// for an RCU grace period at each doubling, in the middle of a guest's request.
const READY_FILES: RawFd = 8192;

/// In bytes: the program, a stack and an arena of the allocator's for each thread, and a million
/// files to remember.
const OWN_ADDRESSES: u64 = 3 << 30;

/// The step of the server's jailing that failed.
#[derive(Debug, thiserror::Error)]
pub enum JailStepError {
    /// The descriptor limit or table.
    #[error("make room for open files")]
    Files(#[source] io::Error),
    /// Landlock.
    #[error("restrict the server to the share's files")]
    Landlock(#[source] io::Error),
    /// A step of the jail that fsd and VMM share.
    #[error(transparent)]
    Jail(#[from] JailError),
}

/// Limits the server's addresses to the guest's memory, twice while it is mapped anew, and its own.
pub fn limit_memory(guest_bytes: u64) -> Result<(), JailStepError> {
    let most = guest_bytes.saturating_mul(2).saturating_add(OWN_ADDRESSES);
    Ok(kata_like_jail::limit(Resource::As, most)?)
}

/// Sets the limit of open files to `wanted`, or as near to it as the host allows; returns it.
pub fn limit_files(wanted: u64) -> Result<u64, JailStepError> {
    let allowed = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(wanted);
    let mut limit = wanted.min(allowed);
    if kata_like_jail::limit(Resource::Nofile, limit).is_err() {
        // Without CAP_SYS_RESOURCE the server has only the limit that it inherited.
        limit = getrlimit(Resource::Nofile)
            .maximum
            .unwrap_or(limit)
            .min(limit);
        kata_like_jail::limit(Resource::Nofile, limit)?;
    }
    let highest = READY_FILES.min(RawFd::try_from(limit).unwrap_or(READY_FILES)) - 1;
    let grown = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), highest);
    drop(grown.map_err(|e| JailStepError::Files(e.into()))?);
    Ok(limit)
}

/// Closes every descriptor except the standard streams and those in `keep`.
pub fn close_others(keep: &[RawFd]) -> Result<(), JailStepError> {
    let all: Vec<RawFd> = (0..3).chain(keep.iter().copied()).collect();
    Ok(kata_like_jail::close_other_fds(&all)?)
}

/// Drops capabilities and forbids new ones.
pub fn drop_privileges() -> Result<(), JailStepError> {
    kata_like_jail::drop_capabilities(&KEPT)?;
    Ok(kata_like_jail::no_new_privileges()?)
}

/// The first version of Landlock that lets a file be moved to another directory.
const LANDLOCK_WITH_MOVES: u32 = 2;

/// Gives up all files but those in and below `directories`, what is mounted there later included;
/// also TCP, signals to other processes and their abstract sockets. Needs no_new_privs. As far as
/// the kernel's Landlock goes; without one the server says so once.
pub fn only_files_below(directories: &[File], proc_self_fd: &File) -> Result<(), JailStepError> {
    let version = landlock::version();
    if version < LANDLOCK_WITH_MOVES {
        eprintln!("kata-like-fsd: no Landlock around the share (the kernel has version {version})");
        return Ok(());
    }
    let restrict = || {
        let rules = Ruleset::everything()?;
        for directory in directories {
            rules.except(directory, Access::SERVE)?;
        }
        // The library opens its working directory once. A file behind an entry of /proc/self/fd
        // counts by its own place.
        rules.except(proc_self_fd, Access::LIST)?;
        kata_like_jail::restrict(rules)
    };
    restrict().map_err(JailStepError::Landlock)
}

/// Needed to create files as any user, with any mode and file capability.
///
/// A user namespace of its own would take nothing more: with every id mapped to itself, as files of
/// all users need it, uid 0 in it is still the host's, and these capabilities still count for
/// files. None of them reaches anything but files and ids. What it would add is another form of
/// file capabilities on the host's disks.
const KEPT: [Capability; 7] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SETFCAP,
];

#[cfg(test)]
mod attacks;
