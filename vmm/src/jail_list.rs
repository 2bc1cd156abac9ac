//! The system calls that each kind of thread may make, and with which arguments.
//!
//! Called by `machine`. The process has the list of [`Kind::Boot`] before it reads a byte of the
//! guest's kernel. Each thread adds its own before the guest's first instruction, and the calls
//! that it may make are those in both. No list opens, names, connects or starts anything, and none
//! of a thread that runs with the guest makes a descriptor, but for what the shim sends and for
//! streams that it connects. Any other call kills the process; the shim sees SIGSYS.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use kata_like_jail::JailError;
use kata_like_jail::seccomp::{Check, Filter, Rule, Threads};
use rustix::process::Pid;

/// How long all threads may take to close their jails.
const CLOSING: Duration = Duration::from_secs(10);

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of them, from the guest's memory on to the start of the last thread.
    Boot,
    /// The event loop: control socket, vsock, entropy, interrupts of the fs server.
    Loop,
    /// Runs the guest, and reads and writes registers.
    Vcpu,
    /// Switches devices on and off.
    Life,
    /// Serves an interface.
    Net,
    /// Serves a disk.
    Disk,
    /// Ends connections whose other side does not answer.
    Watchdog,
}

/// Not executable.
const DATA: &[Check] = &[Check::without(2, libc::PROT_EXEC as u32)];

/// Memory and locks of the C library and the standard library, eventfds, the words of a panic.
const EVERYWHERE: &[Rule] = &[
    Rule::any(libc::SYS_futex),
    Rule::any(libc::SYS_sched_yield),
    Rule::any(libc::SYS_restart_syscall), // a futex's wait after a freeze
    Rule::any(libc::SYS_brk),
    Rule::only(libc::SYS_mmap, DATA),
    Rule::any(libc::SYS_munmap),
    Rule::any(libc::SYS_write),
];

/// KVM_RUN; KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_MP_STATE, KVM_GET_LAPIC and KVM_GET_MSRS: where a
/// vCPU failed or stands.
const RUN: &[Check] = &[Check::one_of(
    1,
    &[
        0xae80,
        0x8090_ae81,
        0x8138_ae83,
        0x8004_ae98,
        0x8400_ae8e,
        0xc008_ae88,
    ],
)];

const VCPU: &[Rule] = &[
    Rule::only(libc::SYS_ioctl, RUN),
    Rule::any(libc::SYS_rt_sigreturn), // of the signal that takes it out of the guest
    Rule::any(libc::SYS_clock_gettime), // a clock that needs a call, as the next ones
];

const LOOP: &[Rule] = &[
    Rule::any(libc::SYS_clock_gettime),
    Rule::any(libc::SYS_epoll_pwait),
    Rule::any(libc::SYS_epoll_ctl),
    Rule::any(libc::SYS_read),
    // the control socket, with the descriptors of disks and taps
    Rule::any(libc::SYS_sendmsg),
    Rule::any(libc::SYS_recvmsg),
    Rule::any(libc::SYS_mremap), // its messages are long
    // vsock: streams are accepted, none is dialled
    Rule::any(libc::SYS_accept4),
    Rule::any(libc::SYS_readv),
    Rule::any(libc::SYS_writev),
    Rule::any(libc::SYS_recvfrom),
    Rule::any(libc::SYS_shutdown),
    Rule::any(libc::SYS_close),
    // figures, entropy
    Rule::any(libc::SYS_pread64),
    Rule::any(libc::SYS_fstat),
    Rule::any(libc::SYS_getrandom),
    // the end
    Rule::any(libc::SYS_sigaltstack),
    Rule::any(libc::SYS_exit_group),
];

/// TUNSETOFFLOAD: what the driver of an interface takes on itself.
const OFFLOADS: &[Check] = &[Check::one_of(1, &[0x4004_54d0])];

const LIFE: &[Rule] = &[
    Rule::any(libc::SYS_clock_gettime),
    Rule::any(libc::SYS_epoll_ctl),
    Rule::any(libc::SYS_read),
    Rule::any(libc::SYS_sendmsg), // vhost-user
    Rule::any(libc::SYS_recvmsg),
    Rule::any(libc::SYS_close), // the streams of a vsock device that is reset
    Rule::only(libc::SYS_ioctl, OFFLOADS),
];

const NET: &[Rule] = &[
    Rule::any(libc::SYS_ppoll),
    Rule::any(libc::SYS_read),
    Rule::any(libc::SYS_readv),
    Rule::any(libc::SYS_writev),
];

const DISK: &[Rule] = &[
    Rule::any(libc::SYS_ppoll),
    Rule::any(libc::SYS_read),
    Rule::any(libc::SYS_preadv),
    Rule::any(libc::SYS_pwritev),
    Rule::any(libc::SYS_fdatasync),
];

const WATCHDOG: &[Rule] = &[
    Rule::any(libc::SYS_clock_gettime),
    Rule::any(libc::SYS_shutdown),
    Rule::any(libc::SYS_close), // a connection that its device has let go of meanwhile
];

/// What makes a VM of a `/dev/kvm`: its version and extensions, the VM, its memory, interrupt
/// controllers and vCPUs with their registers, the connections of the slots, the statistics.
const KVM: &[Check] = &[Check::one_of(
    1,
    &[
        0xae00,
        0xae01,
        0xae03,
        0xae04,
        0xae41,
        0xae47,
        0xae60,
        0xaece,
        0xc008_ae05,
        0x4020_ae46,
        0x4008_ae48,
        0x4020_ae76,
        0x4040_ae79,
        0x4090_ae82,
        0x4138_ae84,
        0x4008_ae89,
        0x4400_ae8f,
        0x4008_ae90,
    ],
)];

/// Flags of a socket, a second descriptor of one, and the standard library's check of a descriptor
/// that it closes.
const DESCRIPTORS: &[Check] = &[Check::one_of(
    1,
    &[
        libc::F_GETFL as u32,
        libc::F_SETFL as u32,
        libc::F_DUPFD_CLOEXEC as u32,
        libc::F_GETFD as u32,
    ],
)];

/// The name of a thread, and no_new_privs once more, as the filter's library has it.
const NAMES: &[Check] = &[Check::one_of(
    0,
    &[libc::PR_SET_NAME as u32, libc::PR_SET_NO_NEW_PRIVS as u32],
)];

/// In a build with debug assertions the standard library asks of each descriptor that it closes
/// whether it is open.
const DEBUG: &[Rule] = &[Rule::only(
    libc::SYS_fcntl,
    &[Check::one_of(1, &[libc::F_GETFD as u32])],
)];

/// What only the boot needs.
const BOOT: &[Rule] = &[
    Rule::only(libc::SYS_ioctl, KVM),
    Rule::any(libc::SYS_lseek), // kernel and initrd
    Rule::any(libc::SYS_eventfd2),
    Rule::any(libc::SYS_epoll_create1),
    Rule::only(libc::SYS_fcntl, DESCRIPTORS),
    Rule::any(libc::SYS_madvise),
    // threads
    Rule::any(libc::SYS_clone3),
    Rule::any(libc::SYS_clone),
    Rule::only(libc::SYS_mprotect, DATA),
    Rule::any(libc::SYS_rseq),
    Rule::any(libc::SYS_set_robust_list),
    Rule::any(libc::SYS_gettid),
    Rule::any(libc::SYS_sched_getaffinity),
    Rule::any(libc::SYS_rt_sigaction),
    Rule::any(libc::SYS_rt_sigprocmask),
    Rule::only(libc::SYS_prctl, NAMES),
    Rule::any(libc::SYS_seccomp),
];

impl Kind {
    fn lists(self) -> &'static [&'static [Rule<'static>]] {
        match self {
            Self::Boot => &[EVERYWHERE, VCPU, LOOP, LIFE, NET, DISK, WATCHDOG, BOOT],
            Self::Loop => &[EVERYWHERE, LOOP],
            Self::Vcpu => &[EVERYWHERE, VCPU],
            Self::Life => &[EVERYWHERE, LIFE],
            Self::Net => &[EVERYWHERE, NET],
            Self::Disk => &[EVERYWHERE, DISK],
            Self::Watchdog => &[EVERYWHERE, WATCHDOG],
        }
    }

    /// Its list as the kernel takes it, for a thread of `process`, which is this one: in its jail
    /// it can't ask for its number.
    pub fn filter(self, process: Pid) -> Result<Filter, JailError> {
        let us = [process.as_raw_nonzero().get().cast_unsigned()];
        let to_us = [Check::one_of(0, &us)];
        Filter::new(&self.rules(&to_us))
    }

    /// Its list. Signals go to the thread group that `to_us` checks.
    fn rules<'a>(self, to_us: &'a [Check<'a>]) -> Vec<Rule<'a>> {
        let mut rules: Vec<Rule> = Vec::new();
        for rule in self.lists().iter().copied().flatten() {
            if !rules.contains(rule) {
                rules.push(*rule);
            }
        }
        if matches!(self, Self::Boot | Self::Loop) {
            // To the vCPUs' threads, that they come out of the guest.
            rules.push(Rule::only(libc::SYS_tgkill, to_us));
        }
        if cfg!(debug_assertions) && matches!(self, Self::Loop | Self::Life | Self::Watchdog) {
            rules.extend(DEBUG);
        }
        rules
    }
}

/// Sees to it that each thread closes its jail before the guest runs.
pub struct Jails {
    process: Pid,
    tell: Sender<Result<(), JailError>>,
    told: Receiver<Result<(), JailError>>,
    open: usize,
}

/// The jail of one thread, to be closed by it.
pub struct Door {
    filter: Arc<Filter>,
    tell: Sender<Result<(), JailError>>,
}

impl Jails {
    /// For the threads of `process`, which is this one.
    pub fn new(process: Pid) -> Self {
        let (tell, told) = channel();
        Self {
            process,
            tell,
            told,
            open: 0,
        }
    }

    /// One for each of `count` threads of this kind.
    pub fn doors(&mut self, kind: Kind, count: usize) -> Result<Vec<Door>, JailError> {
        let filter = Arc::new(kind.filter(self.process)?);
        self.open += count;
        let door = || Door {
            filter: filter.clone(),
            tell: self.tell.clone(),
        };
        Ok((0..count).map(|_| door()).collect())
    }

    /// One for the one thread of this kind.
    pub fn door(&mut self, kind: Kind) -> Result<Door, JailError> {
        self.open += 1;
        Ok(Door {
            filter: Arc::new(kind.filter(self.process)?),
            tell: self.tell.clone(),
        })
    }

    /// Waits until all are closed.
    pub fn closed(self) -> Result<(), JailError> {
        for _ in 0..self.open {
            let closed = self.told.recv_timeout(CLOSING);
            closed.unwrap_or_else(|_| Err(JailError::late()))?;
        }
        Ok(())
    }
}

impl Door {
    /// Closes the calling thread's jail for good. Failure is told to [`Jails::closed`].
    pub fn close(self) {
        let _ = self.tell.send(self.filter.install(Threads::Calling));
    }
}

#[cfg(test)]
#[path = "jail_tests.rs"]
mod tests;
