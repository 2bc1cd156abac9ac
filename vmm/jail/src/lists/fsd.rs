//! The fs server's lists.
//!
//! A filter is a thread's own for ever, and a new thread gets its maker's. So all threads are made
//! first, and no list has a call that makes one.

use super::thread::{Process, Thread};
use crate::seccomp::{Check, Rule, Value};
use crate::{rule, values};

/// The fs server.
pub static PROCESS: Process = Process {
    name: "fs server",
    when: "Each thread closes its filter before the guest's first request.",
    threads: &[&WORKER, &VHOST, &WAITER],
};

/// Serves the guest's requests.
pub static WORKER: Thread = Thread {
    name: "worker",
    what: "serves the guest's requests",
    lists: &[FILES_AND_DIRECTORIES, AS_THE_GUESTS_USER, OF_A_WORKER],
};

/// Answers the VMM's vhost-user messages.
pub static VHOST: Thread = Thread {
    name: "vhost-user",
    what: "takes the guest's memory and queues from the VMM",
    lists: &[OF_VHOST],
};

/// Waits: for the others, for the shim.
pub static WAITER: Thread = Thread {
    name: "waiter",
    what: "waits for the others, for the shim",
    lists: &[TO_WAIT],
};

const NO_CODE: &[Check] = &[Check::without(2, values![PROT_EXEC])];

const OF_DESCRIPTORS: &[Check] = &[Check::one_of(
    1,
    values![F_GETFD, F_GETFL, F_DUPFD_CLOEXEC, F_OFD_GETLK, F_OFD_SETLK],
)];

const ONLY_A_CHECK: &[Check] = &[Check::one_of(1, values![F_GETFD])];

const ABOUT_CAPABILITIES: &[Check] = &[Check::one_of(0, values![PR_CAPBSET_READ])];
const ABOUT_AMBIENT_ONES: &[Check] = &[
    Check::one_of(0, values![PR_CAP_AMBIENT]),
    Check::one_of(1, values![PR_CAP_AMBIENT_IS_SET]),
];

const FILE_TYPE: Value = Value::new("S_IFMT", libc::S_IFMT);

const FILES: &[Check] = &[Check::masked(
    2,
    FILE_TYPE,
    &[
        Value::new("0", 0),
        Value::new("S_IFREG", libc::S_IFREG),
        Value::new("S_IFIFO", libc::S_IFIFO),
        Value::new("S_IFSOCK", libc::S_IFSOCK),
    ],
)];
const WHITEOUT: &[Check] = &[
    Check::masked(2, FILE_TYPE, values![S_IFCHR]),
    Check::one_of(3, &[Value::new("0", 0)]),
];

const FILES_AND_DIRECTORIES: &[Rule] = &[
    rule!(SYS_copy_file_range, "copies between two files"),
    rule!(SYS_dup, "a file's second descriptor, to sync it"),
    rule!(SYS_fallocate, "room in a file"),
    rule!(
        SYS_fchdir,
        "to `/proc/self/fd` and back, for attributes of special files"
    ),
    rule!(SYS_fchmod, "mode of an open file"),
    rule!(SYS_fchmodat, "mode of a file"),
    rule!(SYS_fchownat, "owner of a file"),
    rule!(SYS_fdatasync, "a file's content to the disk"),
    rule!(SYS_fgetxattr, "attributes of a file"),
    rule!(SYS_flistxattr, "attributes of a file"),
    rule!(SYS_flock, "locks of whole files"),
    rule!(SYS_fremovexattr, "attributes of a file"),
    rule!(SYS_fsetxattr, "attributes of a file"),
    rule!(SYS_fstat, "facts about an open file"),
    rule!(SYS_fstatfs, "the room of a file system"),
    rule!(SYS_fsync, "a file to the disk"),
    rule!(SYS_ftruncate, "size of a file"),
    rule!(SYS_getdents64, "names in a directory"),
    rule!(SYS_getxattr, "attributes of a special file"),
    rule!(SYS_linkat, "a second name"),
    rule!(SYS_listxattr, "attributes of a special file"),
    rule!(SYS_lseek, "place in a directory; holes in a file"),
    rule!(SYS_mkdirat, "a directory"),
    rule!(
        SYS_openat,
        "files by a checked name below an open directory"
    ),
    rule!(SYS_openat2, "the same, never by way of a link"),
    rule!(SYS_preadv2, "the guest reads"),
    rule!(SYS_pwritev2, "the guest writes"),
    rule!(SYS_readlinkat, "what a link says"),
    rule!(SYS_removexattr, "attributes of a special file"),
    rule!(SYS_renameat2, "another name"),
    rule!(SYS_setxattr, "attributes of a special file"),
    rule!(SYS_statx, "facts about a file"),
    rule!(SYS_symlinkat, "a link"),
    rule!(SYS_syncfs, "a file system to the disk"),
    rule!(SYS_unlinkat, "a name goes"),
    rule!(SYS_utimensat, "times of a file"),
    rule!(SYS_mknodat, FILES, "files, FIFOs and sockets, no device"),
    rule!(
        SYS_mknodat,
        WHITEOUT,
        "the device 0, which marks a hidden file in an overlay"
    ),
    rule!(
        SYS_fcntl,
        OF_DESCRIPTORS,
        "locks of open files; no command names a process or has a signal sent"
    ),
];

const SETFSID: &str = "acts as the guest's user while a file is made";

const AS_THE_GUESTS_USER: &[Rule] = &[
    rule!(
        SYS_prctl,
        ABOUT_CAPABILITIES,
        "read when FSETID is dropped for a write"
    ),
    rule!(
        SYS_prctl,
        ABOUT_AMBIENT_ONES,
        "read when FSETID is dropped for a write"
    ),
    rule!(SYS_capget, "drops FSETID for a write"),
    rule!(SYS_capset, "drops FSETID for a write"),
    rule!(SYS_getegid, SETFSID),
    rule!(SYS_geteuid, SETFSID),
    rule!(SYS_setgroups, SETFSID),
    rule!(SYS_setresgid, SETFSID),
    rule!(SYS_setresuid, SETFSID),
];

const ALLOCATOR: &str = "memory of the allocator";
const NEVER_CODE: &str = "memory of the allocator, never code";
const LAST_WORDS: &str = "why the server ends, to the shim";
const CHECKED_CLOSE: &str = "a check of a descriptor before it is closed, in a debug build";
const PANIC: &str = "the words of a panic name the thread";
const THE_END: &str = "the end of the process";

const OF_A_WORKER: &[Rule] = &[
    rule!(SYS_close, "files that the guest forgets"),
    rule!(SYS_epoll_wait, "waits for requests"),
    rule!(SYS_read, "eventfds"),
    rule!(
        SYS_timerfd_settime,
        "looks again whether a lock has become free"
    ),
    rule!(SYS_write, "eventfds; the words of a panic"),
    rule!(SYS_brk, ALLOCATOR),
    rule!(SYS_futex, "locks"),
    rule!(SYS_madvise, ALLOCATOR),
    rule!(SYS_mremap, ALLOCATOR),
    rule!(SYS_munmap, ALLOCATOR),
    rule!(SYS_mmap, NO_CODE, NEVER_CODE),
    rule!(SYS_mprotect, NO_CODE, NEVER_CODE),
    rule!(SYS_exit_group, THE_END),
    rule!(SYS_gettid, PANIC),
    rule!(SYS_sendmsg, LAST_WORDS),
    rule!(SYS_sigaltstack, THE_END),
];

const OF_VHOST: &[Rule] = &[
    rule!(
        SYS_recvmsg,
        "the VMM's messages, with the guest's memory and eventfds"
    ),
    rule!(SYS_sendmsg, "answers to the VMM"),
    rule!(SYS_epoll_ctl, "the queues' eventfds are watched, or not"),
    rule!(SYS_close, "eventfds and memory that are replaced"),
    rule!(SYS_write, "eventfds; the words of a panic"),
    rule!(SYS_fcntl, ONLY_A_CHECK, CHECKED_CLOSE),
    rule!(SYS_mmap, NO_CODE, "the guest's memory, never code"),
    rule!(SYS_mprotect, NO_CODE, NEVER_CODE),
    rule!(SYS_munmap, "the guest's memory, when it is mapped anew"),
    rule!(SYS_madvise, ALLOCATOR),
    rule!(SYS_brk, ALLOCATOR),
    rule!(SYS_futex, "locks"),
    rule!(SYS_rt_sigprocmask, "the end of the thread"),
    rule!(SYS_sigaltstack, "the end of the thread"),
    rule!(SYS_exit, "the end of the thread"),
    rule!(SYS_exit_group, THE_END),
    rule!(SYS_gettid, PANIC),
];

const TO_WAIT: &[Rule] = &[
    rule!(SYS_futex, "waits for another thread"),
    rule!(SYS_ppoll, "waits for the shim's end"),
    rule!(SYS_sendmsg, LAST_WORDS),
    rule!(SYS_write, "the words of a panic"),
    rule!(SYS_munmap, ALLOCATOR),
    rule!(SYS_brk, ALLOCATOR),
    rule!(SYS_sigaltstack, THE_END),
    rule!(SYS_exit_group, THE_END),
    rule!(SYS_gettid, PANIC),
    rule!(SYS_mmap, NO_CODE, NEVER_CODE),
];
