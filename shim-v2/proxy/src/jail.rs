//! What the proxy gives up, and the system calls that are left to it.
//!
//! `main` calls [`give_up`] while the process has one thread, and [`close`] when all descriptors
//! are watched, before the first byte of the guest's is read.

use kata_like_failure::{Failure, Step};
use kata_like_jail::seccomp::{Check, Filter, Rule, Threads};
use kata_like_jail::{JailError, drop_identity, enter_empty_root, limit, shut_out};
use rustix::process::Resource;

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

/// From now on any other system call kills the process.
pub fn close() -> Result<(), JailError> {
    let rules: Vec<Rule> = LISTS.iter().copied().flatten().copied().collect();
    Filter::new(&rules)?.install(Threads::Calling)
}

/// Not executable.
const DATA: &[Check] = &[Check::without(2, libc::PROT_EXEC as u32)];

/// The standard library's check of a descriptor that it closes.
const ONLY_A_CHECK: &[Check] = &[Check::one_of(1, &[libc::F_GETFD as u32])];

/// It has one thread, and starts and opens nothing.
const LIST: &[Rule] = &[
    // to wait
    Rule::any(libc::SYS_epoll_wait),
    Rule::any(libc::SYS_epoll_pwait),
    Rule::any(libc::SYS_epoll_ctl),
    Rule::any(libc::SYS_poll),
    Rule::any(libc::SYS_ppoll),
    Rule::any(libc::SYS_clock_gettime), // where a clock needs a call
    Rule::any(libc::SYS_restart_syscall), // a wait after a freeze
    // the sockets of shim and agent, the file of a long request, the words of a panic
    Rule::any(libc::SYS_sendmsg),
    Rule::any(libc::SYS_recvmsg),
    Rule::any(libc::SYS_sendto),
    Rule::any(libc::SYS_recvfrom),
    Rule::any(libc::SYS_read),
    Rule::any(libc::SYS_write),
    Rule::any(libc::SYS_writev),
    Rule::any(libc::SYS_shutdown),
    Rule::any(libc::SYS_close),
    // memory
    Rule::any(libc::SYS_futex),
    Rule::any(libc::SYS_brk),
    Rule::only(libc::SYS_mmap, DATA),
    Rule::any(libc::SYS_mremap),
    Rule::any(libc::SYS_munmap),
    Rule::any(libc::SYS_madvise),
    Rule::any(libc::SYS_getrandom), // the keys of tables that hash
    // the end
    Rule::any(libc::SYS_sigaltstack),
    Rule::any(libc::SYS_exit_group),
];

/// In a build with debug assertions the standard library asks of each descriptor that it closes
/// whether it is open.
const DEBUG: &[Rule] = &[Rule::only(libc::SYS_fcntl, ONLY_A_CHECK)];

const LISTS: &[&[Rule]] = match cfg!(debug_assertions) {
    true => &[LIST, DEBUG],
    false => &[LIST],
};

#[cfg(test)]
mod tests;
