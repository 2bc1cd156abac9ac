//! The VMM's lists.
//!
//! The process has the list of [`BOOT`] before it reads a byte of the guest's kernel. Each thread
//! adds its own before the guest's first instruction, and may make the calls that are in both. No
//! thread that runs with the guest makes a descriptor, but for what the shim sends and for streams
//! that it connects.

use super::thread::{Process, Thread};
use crate::seccomp::{Check, Rule, Value};
use crate::{rule, values};

/// The VMM.
pub static PROCESS: Process = Process {
    name: "VMM",
    when: "The boot's filter is closed before the VMM reads a byte of the guest's kernel, that of
\
           each thread before the guest's first instruction. A thread may make the calls that are
\
           in both.",
    threads: &[&BOOT, &LOOP, &VCPU, &LIFE, &NET, &DISK, &WATCHDOG],
};

/// All threads, from the guest's memory on to the start of the last thread.
pub static BOOT: Thread = Thread {
    name: "boot",
    what: "makes the VM and the threads",
    lists: &[
        EVERYWHERE,
        OF_A_VCPU,
        OF_THE_LOOP,
        OF_DEVICES,
        OF_AN_INTERFACE,
        OF_A_DISK,
        OF_THE_WATCHDOG,
        OF_THE_BOOT,
    ],
};

/// The event loop: control socket, vsock, entropy, interrupts of the fs server.
pub static LOOP: Thread = Thread {
    name: "event loop",
    what: "serves the shim, vsock and the small devices",
    lists: &[EVERYWHERE, OF_THE_LOOP],
};

/// Runs the guest, and reads and writes registers.
pub static VCPU: Thread = Thread {
    name: "vCPU",
    what: "runs the guest",
    lists: &[EVERYWHERE, OF_A_VCPU],
};

/// Switches devices on and off.
pub static LIFE: Thread = Thread {
    name: "device switch",
    what: "switches devices on and off at the guest's wish",
    lists: &[EVERYWHERE, OF_DEVICES],
};

/// Serves an interface.
pub static NET: Thread = Thread {
    name: "interface",
    what: "moves frames between a tap and the guest",
    lists: &[EVERYWHERE, OF_AN_INTERFACE],
};

/// Serves a disk.
pub static DISK: Thread = Thread {
    name: "disk",
    what: "reads and writes a disk",
    lists: &[EVERYWHERE, OF_A_DISK],
};

/// Ends connections whose other side does not answer.
pub static WATCHDOG: Thread = Thread {
    name: "watchdog",
    what: "ends connections whose other side does not answer",
    lists: &[EVERYWHERE, OF_THE_WATCHDOG],
};

const DATA: &[Check] = &[Check::without(2, values![PROT_EXEC])];

const EVERYWHERE: &[Rule] = &[
    rule!(SYS_futex, "locks, and waiting for another thread"),
    rule!(SYS_sched_yield, "a lock that is about to be free"),
    rule!(
        SYS_restart_syscall,
        "a futex's wait goes on after the cgroup was frozen"
    ),
    rule!(SYS_brk, "memory of the allocator"),
    rule!(SYS_mmap, DATA, "memory of the allocator, never code"),
    rule!(SYS_munmap, "memory of the allocator"),
    rule!(SYS_write, "eventfds; the words of a panic"),
];

const fn kvm(name: &'static str, number: u32) -> Value {
    Value::new(name, number)
}

const RUN: &[Check] = &[Check::one_of(
    1,
    &[
        kvm("KVM_RUN", 0xae80),
        kvm("KVM_GET_REGS", 0x8090_ae81),
        kvm("KVM_GET_SREGS", 0x8138_ae83),
        kvm("KVM_GET_MP_STATE", 0x8004_ae98),
        kvm("KVM_GET_LAPIC", 0x8400_ae8e),
        kvm("KVM_GET_MSRS", 0xc008_ae88),
    ],
)];

const CLOCK: &str = "deadlines, on a host whose clock takes a call";

const OF_A_VCPU: &[Rule] = &[
    rule!(
        SYS_ioctl,
        RUN,
        "runs the vCPU; reads where it failed or stands"
    ),
    rule!(
        SYS_rt_sigreturn,
        "the signal that takes it out of the guest"
    ),
    rule!(SYS_clock_gettime, CLOCK),
];

const OWN: &[Check] = &[Check::own_process(0)];

const OF_THE_LOOP: &[Rule] = &[
    rule!(SYS_clock_gettime, CLOCK),
    rule!(SYS_epoll_pwait, "waits for events"),
    rule!(SYS_epoll_ctl, "streams come and go"),
    rule!(SYS_read, "eventfds; vsock"),
    rule!(SYS_sendmsg, "reports to the shim"),
    rule!(
        SYS_recvmsg,
        "the shim's commands, with the descriptors of disks and taps"
    ),
    rule!(
        SYS_mremap,
        "the allocator moves a long message to or from the shim"
    ),
    rule!(
        SYS_accept4,
        "vsock: streams are accepted from the shim, none is dialled"
    ),
    rule!(SYS_readv, "vsock: from a stream into the guest's buffers"),
    rule!(SYS_writev, "vsock: from the guest's buffers to a stream"),
    rule!(SYS_recvfrom, "vsock: looks whether a stream has ended"),
    rule!(SYS_shutdown, "vsock: the guest closes half a stream"),
    rule!(SYS_close, "streams; disks and taps that are taken away"),
    rule!(SYS_pread64, "figures of KVM"),
    rule!(SYS_fstat, "figures: how much memory the guest has touched"),
    rule!(SYS_getrandom, "entropy for the guest"),
    rule!(SYS_tgkill, OWN, "takes the vCPUs out of the guest"),
    rule!(SYS_sigaltstack, "the end of the process"),
    rule!(SYS_exit_group, "the end of the process"),
];

const OFFLOADS: &[Check] = &[Check::one_of(1, &[kvm("TUNSETOFFLOAD", 0x4004_54d0)])];

const OF_DEVICES: &[Rule] = &[
    rule!(SYS_clock_gettime, CLOCK),
    rule!(SYS_epoll_ctl, "a device's descriptors are watched, or not"),
    rule!(SYS_read, "what is left in an eventfd"),
    rule!(SYS_sendmsg, "vhost-user, to the fs server"),
    rule!(SYS_recvmsg, "vhost-user, the fs server's answers"),
    rule!(SYS_close, "the streams of a vsock device that is reset"),
    rule!(
        SYS_ioctl,
        OFFLOADS,
        "what the driver of an interface takes on itself"
    ),
];

const OF_AN_INTERFACE: &[Rule] = &[
    rule!(SYS_ppoll, "waits for frames"),
    rule!(SYS_read, "eventfds"),
    rule!(SYS_readv, "a frame from the tap into the guest's buffers"),
    rule!(SYS_writev, "a frame from the guest's buffers to the tap"),
];

const OF_A_DISK: &[Rule] = &[
    rule!(SYS_ppoll, "waits for requests"),
    rule!(SYS_read, "eventfds"),
    rule!(SYS_preadv, "the guest reads"),
    rule!(SYS_pwritev, "the guest writes"),
    rule!(SYS_fdatasync, "the guest flushes"),
];

const OF_THE_WATCHDOG: &[Rule] = &[
    rule!(SYS_clock_gettime, CLOCK),
    rule!(
        SYS_shutdown,
        "ends a connection that does not answer in time"
    ),
    rule!(
        SYS_close,
        "a connection that its device has let go of meanwhile"
    ),
];

const KVM: &[Check] = &[Check::one_of(
    1,
    &[
        kvm("KVM_GET_API_VERSION", 0xae00),
        kvm("KVM_CREATE_VM", 0xae01),
        kvm("KVM_CHECK_EXTENSION", 0xae03),
        kvm("KVM_GET_VCPU_MMAP_SIZE", 0xae04),
        kvm("KVM_GET_SUPPORTED_CPUID", 0xc008_ae05),
        kvm("KVM_CREATE_VCPU", 0xae41),
        kvm("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
        kvm("KVM_SET_TSS_ADDR", 0xae47),
        kvm("KVM_SET_IDENTITY_MAP_ADDR", 0x4008_ae48),
        kvm("KVM_CREATE_IRQCHIP", 0xae60),
        kvm("KVM_IRQFD", 0x4020_ae76),
        kvm("KVM_IOEVENTFD", 0x4040_ae79),
        kvm("KVM_SET_REGS", 0x4090_ae82),
        kvm("KVM_SET_SREGS", 0x4138_ae84),
        kvm("KVM_SET_MSRS", 0x4008_ae89),
        kvm("KVM_SET_LAPIC", 0x4400_ae8f),
        kvm("KVM_SET_CPUID2", 0x4008_ae90),
        kvm("KVM_GET_STATS_FD", 0xaece),
    ],
)];

const DESCRIPTORS: &[Check] = &[Check::one_of(
    1,
    values![F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETFD],
)];

const NAMES: &[Check] = &[Check::one_of(0, values![PR_SET_NAME, PR_SET_NO_NEW_PRIVS])];

/// The flags of pthread_create(3), all of them and no other: not a process, no namespace.
const A_THREAD: &[Check] = &[Check::one_of(
    0,
    &[Value::new(
        "CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|SETTLS|PARENT_SETTID|CHILD_CLEARTID",
        (libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_SETTLS
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_CHILD_CLEARTID) as u32,
    )],
)];

const OF_THE_BOOT: &[Rule] = &[
    rule!(SYS_ioctl, KVM, "makes the VM"),
    rule!(SYS_lseek, "the sizes of kernel and initrd"),
    rule!(SYS_eventfd2, "interrupts and kicks of the devices"),
    rule!(SYS_epoll_create1, "the event loop"),
    rule!(
        SYS_fcntl,
        DESCRIPTORS,
        "flags of a socket, a second descriptor of one"
    ),
    rule!(SYS_madvise, "stacks"),
    rule!(SYS_clone, A_THREAD, "starts a thread, and nothing else"),
    Rule::absent(
        libc::SYS_clone3,
        "SYS_clone3",
        "its flags can't be checked; the C library then calls `clone`",
    ),
    rule!(SYS_mprotect, DATA, "stacks, never code"),
    rule!(SYS_rseq, "the C library's, in a new thread"),
    rule!(SYS_set_robust_list, "the C library's, in a new thread"),
    rule!(SYS_gettid, "a vCPU's thread tells its number"),
    rule!(SYS_sched_getaffinity, "the bounds of a new thread's stack"),
    rule!(
        SYS_rt_sigaction,
        "the signal that takes vCPUs out of the guest"
    ),
    rule!(SYS_rt_sigprocmask, "the C library's, around a new thread"),
    rule!(
        SYS_prctl,
        NAMES,
        "a thread's name; no_new_privs once more before a filter"
    ),
    rule!(SYS_seccomp, "a thread's own filter"),
];
