//! The system calls that each kind of thread may make; any other kills the server (seccomp(2)).
//!
//! A filter is a thread's own for ever, and a new thread gets its maker's. So all threads are made
//! first, and no list has a call that makes one. `serve` closes those that it makes; the library
//! makes the others, and closes them where it first calls `backend`.
//!
//! In no list: exec, a new socket, connect, kill, mount, namespaces, file handles, ioctl.

use std::fmt;

use kata_like_jail::JailError;
use kata_like_jail::seccomp::{Check, Filter, Rule, Threads};

/// The kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Serves the guest's requests.
    Worker,
    /// Answers the VMM's vhost-user messages.
    Vhost,
    /// Waits: for the others, for the shim.
    Waiter,
}

/// A filter for each kind.
#[derive(Clone)]
pub struct Filters {
    worker: Filter,
    vhost: Filter,
    waiter: Filter,
}

impl Filters {
    /// Compiles the lists.
    pub fn new() -> Result<Self, JailError> {
        Ok(Self {
            worker: Filter::new(WORKER)?,
            vhost: Filter::new(VHOST)?,
            waiter: Filter::new(WAITER)?,
        })
    }

    /// From now on the calling thread makes the calls of its list and no other.
    pub fn close(&self, kind: Kind) -> Result<(), JailError> {
        let filter = match kind {
            Kind::Worker => &self.worker,
            Kind::Vhost => &self.vhost,
            Kind::Waiter => &self.waiter,
        };
        filter.install(Threads::Calling)
    }
}

impl fmt::Debug for Filters {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        to.write_str("Filters")
    }
}

/// Memory, but no code.
const NO_CODE: &[Check] = &[Check::without(2, libc::PROT_EXEC as u32)];

/// Locks of open files, and what they and the standard library ask of a descriptor. None of these
/// names a process or has a signal sent.
const OF_DESCRIPTORS: &[Check] = &[Check::one_of(
    1,
    &[
        libc::F_GETFD as u32, // the standard library's check of a descriptor that it closes
        libc::F_GETFL as u32,
        libc::F_DUPFD_CLOEXEC as u32,
        libc::F_OFD_GETLK as u32,
        libc::F_OFD_SETLK as u32,
    ],
)];

const ONLY_A_CHECK: &[Check] = &[Check::one_of(1, &[libc::F_GETFD as u32])];

/// What libcap-ng reads when the library drops FSETID for a write.
const ABOUT_CAPABILITIES: &[Check] = &[Check::one_of(0, &[libc::PR_CAPBSET_READ as u32])];
const ABOUT_AMBIENT_ONES: &[Check] = &[
    Check::one_of(0, &[libc::PR_CAP_AMBIENT as u32]),
    Check::one_of(1, &[libc::PR_CAP_AMBIENT_IS_SET as u32]),
];

/// Files, FIFOs and sockets, and the device 0 that marks a hidden file in an overlay.
const FILES: &[Check] = &[Check::masked(
    2,
    libc::S_IFMT,
    &[0, libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK],
)];
const WHITEOUT: &[Check] = &[
    Check::masked(2, libc::S_IFMT, &[libc::S_IFCHR]),
    Check::one_of(3, &[0]),
];

/// For the guest's requests; to act as the guest's user while a file is made, and without FSETID
/// for a write; for the queues' eventfds and the timer; for memory; for the end, and the reason of
/// it. No random numbers: a table that hashes is made by the first thread, with its keys.
pub const WORKER: &[Rule] = &[
    Rule::any(libc::SYS_copy_file_range),
    Rule::any(libc::SYS_dup),
    Rule::any(libc::SYS_fallocate),
    Rule::any(libc::SYS_fchdir),
    Rule::any(libc::SYS_fchmod),
    Rule::any(libc::SYS_fchmodat),
    Rule::any(libc::SYS_fchownat),
    Rule::any(libc::SYS_fdatasync),
    Rule::any(libc::SYS_fgetxattr),
    Rule::any(libc::SYS_flistxattr),
    Rule::any(libc::SYS_flock),
    Rule::any(libc::SYS_fremovexattr),
    Rule::any(libc::SYS_fsetxattr),
    Rule::any(libc::SYS_fstat),
    Rule::any(libc::SYS_fstatfs),
    Rule::any(libc::SYS_fsync),
    Rule::any(libc::SYS_ftruncate),
    Rule::any(libc::SYS_getdents64),
    Rule::any(libc::SYS_getxattr),
    Rule::any(libc::SYS_linkat),
    Rule::any(libc::SYS_listxattr),
    Rule::any(libc::SYS_lseek),
    Rule::any(libc::SYS_mkdirat),
    Rule::any(libc::SYS_openat),
    Rule::any(libc::SYS_openat2),
    Rule::any(libc::SYS_preadv2),
    Rule::any(libc::SYS_pwritev2),
    Rule::any(libc::SYS_readlinkat),
    Rule::any(libc::SYS_removexattr),
    Rule::any(libc::SYS_renameat2),
    Rule::any(libc::SYS_setxattr),
    Rule::any(libc::SYS_statx),
    Rule::any(libc::SYS_symlinkat),
    Rule::any(libc::SYS_syncfs),
    Rule::any(libc::SYS_unlinkat),
    Rule::any(libc::SYS_utimensat),
    Rule::only(libc::SYS_mknodat, FILES),
    Rule::only(libc::SYS_mknodat, WHITEOUT),
    Rule::only(libc::SYS_fcntl, OF_DESCRIPTORS),
    Rule::only(libc::SYS_prctl, ABOUT_CAPABILITIES),
    Rule::only(libc::SYS_prctl, ABOUT_AMBIENT_ONES),
    Rule::any(libc::SYS_capget),
    Rule::any(libc::SYS_capset),
    Rule::any(libc::SYS_getegid),
    Rule::any(libc::SYS_geteuid),
    Rule::any(libc::SYS_setgroups),
    Rule::any(libc::SYS_setresgid),
    Rule::any(libc::SYS_setresuid),
    Rule::any(libc::SYS_close),
    Rule::any(libc::SYS_epoll_wait),
    Rule::any(libc::SYS_read),
    Rule::any(libc::SYS_timerfd_settime),
    Rule::any(libc::SYS_write),
    Rule::any(libc::SYS_brk),
    Rule::any(libc::SYS_futex),
    Rule::any(libc::SYS_madvise),
    Rule::any(libc::SYS_mremap),
    Rule::any(libc::SYS_munmap),
    Rule::only(libc::SYS_mmap, NO_CODE),
    Rule::only(libc::SYS_mprotect, NO_CODE),
    Rule::any(libc::SYS_exit_group),
    Rule::any(libc::SYS_gettid),
    Rule::any(libc::SYS_sendmsg),
    Rule::any(libc::SYS_sigaltstack),
];

/// For the VMM's messages and what comes with them: the guest's memory, the queues' eventfds; for
/// the thread's end.
pub const VHOST: &[Rule] = &[
    Rule::any(libc::SYS_recvmsg),
    Rule::any(libc::SYS_sendmsg),
    Rule::any(libc::SYS_epoll_ctl),
    Rule::any(libc::SYS_close),
    Rule::any(libc::SYS_write),
    Rule::only(libc::SYS_fcntl, ONLY_A_CHECK),
    Rule::only(libc::SYS_mmap, NO_CODE),
    Rule::only(libc::SYS_mprotect, NO_CODE),
    Rule::any(libc::SYS_munmap),
    Rule::any(libc::SYS_madvise),
    Rule::any(libc::SYS_brk),
    Rule::any(libc::SYS_futex),
    Rule::any(libc::SYS_rt_sigprocmask),
    Rule::any(libc::SYS_sigaltstack),
    Rule::any(libc::SYS_exit),
    Rule::any(libc::SYS_exit_group),
    Rule::any(libc::SYS_gettid),
];

/// To wait, and to say why all of it ends.
pub const WAITER: &[Rule] = &[
    Rule::any(libc::SYS_futex),
    Rule::any(libc::SYS_ppoll),
    Rule::any(libc::SYS_sendmsg),
    Rule::any(libc::SYS_write),
    Rule::any(libc::SYS_munmap),
    Rule::any(libc::SYS_brk),
    Rule::any(libc::SYS_sigaltstack),
    Rule::any(libc::SYS_exit_group),
    Rule::any(libc::SYS_gettid),
    Rule::only(libc::SYS_mmap, NO_CODE),
];

#[cfg(test)]
mod tests;
