//! The system calls that all threads of the VMM may make from the first KVM_RUN on.
//!
//! Called by `machine`, when all threads exist and every descriptor is open. No call in the list
//! opens, names, connects or starts anything. Any other call kills the process; the shim sees
//! SIGSYS.

use kata_like_jail::JailError;
use kata_like_jail::seccomp::{Check, Filter, Rule, Threads};

/// Grouped by what needs them.
const ALLOWED: &[libc::c_long] = &[
    // vCPU threads, and how they are stopped; `ioctl` has a list of its own below
    libc::SYS_rt_sigreturn,
    libc::SYS_tgkill,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigprocmask,
    // the event loop, eventfds, the control socket
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_close,
    libc::SYS_fcntl, // the standard library's debug check of a descriptor that it closes
    // vsock: the VMM accepts streams, it never dials
    libc::SYS_accept4,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    // interfaces: readv and writev, as on streams; disks: reads and writes at an offset (they are
    // never opened here)
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    // stats, log, entropy
    libc::SYS_fstat,
    libc::SYS_pread64,
    libc::SYS_getrandom,
    // memory and threads of the C library
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_prctl,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// KVM_RUN; KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_MP_STATE, KVM_GET_LAPIC and KVM_GET_MSRS (where a
/// vCPU failed or stands); TUNSETOFFLOAD (what the driver of an interface takes on itself).
const IOCTLS: &[u32] = &[
    0xae80,
    0x8090_ae81,
    0x8138_ae83,
    0x8004_ae98,
    0x8400_ae8e,
    0xc008_ae88,
    0x4004_54d0,
];

/// Loads the filter into all threads of this process.
pub fn install() -> Result<(), JailError> {
    let requests = [Check::one_of(1, IOCTLS)];
    let mut rules: Vec<Rule> = ALLOWED.iter().map(|call| Rule::any(*call)).collect();
    rules.push(Rule::only(libc::SYS_ioctl, &requests));
    Filter::new(&rules)?.install(Threads::All)
}
