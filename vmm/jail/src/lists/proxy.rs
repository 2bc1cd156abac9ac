//! The proxy's list. It has one thread, and starts and opens nothing.

use super::thread::{Process, Thread};
use crate::seccomp::{Check, Rule};
use crate::{rule, values};

/// The proxy.
pub static PROCESS: Process = Process {
    name: "proxy",
    when: "The filter is closed before the first byte of the guest's is read.",
    threads: &[&ONLY],
};

/// The one that there is.
pub static ONLY: Thread = Thread {
    name: "only thread",
    what: "asks the agent, and tells the shim",
    lists: &[LIST],
};

const NO_CODE: &[Check] = &[Check::without(2, values![PROT_EXEC])];

const ONLY_A_CHECK: &[Check] = &[Check::one_of(1, values![F_GETFD])];

const SOCKETS: &str = "the sockets of shim and agent";

const LIST: &[Rule] = &[
    rule!(SYS_epoll_wait, "waits for sockets and timers"),
    rule!(SYS_epoll_pwait, "waits for sockets and timers"),
    rule!(SYS_epoll_ctl, "watches sockets"),
    rule!(SYS_poll, "waits for a socket"),
    rule!(SYS_ppoll, "waits for a socket"),
    rule!(SYS_clock_gettime, "deadlines, where a clock needs a call"),
    rule!(SYS_restart_syscall, "goes on with a wait after a freeze"),
    rule!(SYS_sendmsg, SOCKETS),
    rule!(SYS_recvmsg, SOCKETS),
    rule!(SYS_sendto, SOCKETS),
    rule!(SYS_recvfrom, SOCKETS),
    rule!(SYS_read, "a long request's file, and wake-ups"),
    rule!(SYS_write, "wake-ups, and a panic's words"),
    rule!(SYS_writev, "the agent's socket"),
    rule!(SYS_shutdown, "the agent's socket"),
    rule!(SYS_close, "a long request's file, and sockets"),
    rule!(SYS_futex, "locks of the library"),
    rule!(SYS_brk, "memory"),
    rule!(SYS_mmap, NO_CODE, "memory"),
    rule!(SYS_mremap, "memory"),
    rule!(SYS_munmap, "memory"),
    rule!(SYS_madvise, "memory that is given back"),
    rule!(SYS_getrandom, "the keys of tables that hash"),
    rule!(SYS_sigaltstack, "a thread's end"),
    rule!(SYS_exit_group, "the end"),
];

/// In a build with debug assertions the standard library asks of each descriptor that it closes
/// whether it is open.
pub const DEBUG: &[Rule] = &[rule!(
    SYS_fcntl,
    ONLY_A_CHECK,
    "the standard library's check of a descriptor that it closes"
)];
