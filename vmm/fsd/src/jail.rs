//! What the server gives up, and what it keeps because serving files needs it.
//!
//! `main` calls each step once: `limit_files` and `close_others` first, `close` when the share is
//! the root. The server stays uid 0, since files belong to many users. It drops the capabilities
//! that would reach beyond its files: without MKNOD a guest makes no device nodes; without
//! SYS_ADMIN and DAC_READ_SEARCH no file is opened by a handle that skips its directory.

use std::io;
use std::os::fd::RawFd;

use caps::Capability;
use kata_like_jail::JailError;
use kata_like_jail::seccomp::{Filter, Rule, Threads};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How many descriptors the server asks for. Each inode that the guest knows holds one.
const WANTED_FILES: u64 = 1_000_000;

/// The descriptor table grows to this size before there are threads. Growing it later would wait
/// for an RCU grace period at each doubling, in the middle of a guest's request.
const READY_FILES: RawFd = 8192;

/// The step of the server's jailing that failed.
#[derive(Debug, thiserror::Error)]
pub enum JailStepError {
    /// The descriptor limit or table.
    #[error("make room for open files")]
    Files(#[source] io::Error),
    /// A step of the jail that fsd and VMM share.
    #[error(transparent)]
    Jail(#[from] JailError),
}

/// Raises the limit of open files as far as the host allows; returns it.
pub fn limit_files() -> Result<u64, JailStepError> {
    let allowed = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(WANTED_FILES);
    let files = |most: u64| Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    let mut limit = WANTED_FILES.min(allowed);
    if setrlimit(Resource::Nofile, files(limit)).is_err() {
        // Without CAP_SYS_RESOURCE the server has only the limit that it inherited.
        limit = getrlimit(Resource::Nofile).maximum.unwrap_or(limit);
        setrlimit(Resource::Nofile, files(limit)).map_err(|e| JailStepError::Files(e.into()))?;
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

/// Drops capabilities, forbids new ones, and allows only the system calls below.
pub fn close() -> Result<(), JailStepError> {
    kata_like_jail::drop_capabilities(&KEPT)?;
    kata_like_jail::no_new_privileges()?;
    let rules: Vec<Rule> = ALLOWED.iter().map(|call| Rule::any(*call)).collect();
    Ok(Filter::new(&rules)?.install(Threads::All)?)
}

/// Needed to create files as any user, with any mode and file capability.
const KEPT: [Capability; 7] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SETFCAP,
];

/// No ioctl, no exec, no new socket, no kill, no mount, no namespace, no handle.
const ALLOWED: &[i64] = &[
    // for the guest's requests
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    // to act as the guest's user while a file is made, and to drop FSETID for a write
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    // for the vhost-user sockets, the queues' eventfds and the control socket
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
    // for memory, threads and the end
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_prctl,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];
