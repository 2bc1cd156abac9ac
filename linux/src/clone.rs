//! clone3(2): a process that is born where it belongs, in its namespaces and its cgroup.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::numbers::Call;

/// Flags of linux/sched.h; libc's constants don't fit their type.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What came of a clone: who returns from the call.
#[derive(Debug)]
pub enum Cloned {
    /// The new process.
    Child,
    /// The process that called.
    Parent {
        /// The new process's pid.
        pid: u32,
        /// Refers to the process, whoever has its pid later.
        pidfd: OwnedFd,
    },
}

/// `struct clone_args`, up to the last field that is used here.
#[repr(C, align(8))]
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

impl Arguments {
    /// Of a child whose end its parent hears of, without any handler of signals.
    pub(crate) fn of_a_child() -> Self {
        Self {
            flags: CLONE_CLEAR_SIGHAND,
            exit_signal: libc::SIGCHLD as u64,
            ..Self::default()
        }
    }

    /// Of a child of our own parent's.
    fn of_a_sibling() -> Self {
        Self {
            flags: libc::CLONE_PARENT as u64,
            ..Self::default()
        }
    }

    /// Born in new namespaces: `CLONE_NEW…`.
    pub(crate) fn new_namespaces(mut self, kinds: u64) -> Self {
        self.flags |= kinds & NAMESPACES;
        self
    }

    /// Born in this directory of cgroup2.
    pub(crate) fn in_cgroup(mut self, cgroup: BorrowedFd<'_>) -> Self {
        self.flags |= CLONE_INTO_CGROUP;
        self.cgroup = cgroup.as_raw_fd() as u64; // open, and so not negative
        self
    }
}

/// What may be asked for as a new namespace. CLONE_NEWTIME is none: clone3 has another bit in its
/// place.
const NAMESPACES: u64 = (libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWUTS) as u64;

/// Makes a sibling of this process in new namespaces (`CLONE_NEW…`), born in `cgroup`.
///
/// It is a child of our parent, who reaps it although we may be gone by then. EINVAL if this
/// process has a second thread: the sibling would have a copy of that thread's locks, held for
/// ever.
pub fn sibling(namespaces: u64, cgroup: BorrowedFd<'_>) -> io::Result<Cloned> {
    // Changes nothing; the kernel refuses it to whoever has other threads (unshare(2)).
    Call::Unshare(libc::CLONE_THREAD).make()?;
    let arguments = Arguments::of_a_sibling()
        .new_namespaces(namespaces)
        .in_cgroup(cgroup);
    // SAFETY: this thread is the only one, so the child is a whole copy of the process, in which
    // every lock is held by the thread that goes on there or by none.
    unsafe { clone3(arguments) }
}

/// Makes a process: as fork(2) does, in its own copy of our memory.
///
/// # Safety
///
/// If the process has other threads, then the child may only do what is safe in a handler of
/// signals: the locks that they hold, the allocator's too, stay locked in it for ever.
pub(crate) unsafe fn clone3(mut arguments: Arguments) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    arguments.flags |= libc::CLONE_PIDFD as u64;
    arguments.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    // SAFETY: `Arguments` can hold neither CLONE_VM nor a stack, so the child goes on with a copy
    // of our memory on a copy of our stack. What else that takes is the caller's promise.
    // - `arguments` is a live struct clone_args whose size is passed.
    // - The kernel writes to `pidfd`, a live c_int, in the parent alone. After success it is a new
    //   descriptor that nobody else owns.
    unsafe {
        match libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_ref(&arguments),
            size_of::<Arguments>(),
        ) {
            -1 => Err(io::Error::last_os_error()),
            0 => Ok(Cloned::Child),
            pid => Ok(Cloned::Parent {
                pid: u32::try_from(pid).unwrap_or_default(),
                pidfd: OwnedFd::from_raw_fd(pidfd),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// The harness has threads.
    #[test]
    fn a_process_with_threads_gets_no_sibling() {
        let directory = std::fs::File::open("/").unwrap();
        let test = std::thread::spawn(move || sibling(0, directory.as_fd()).map(drop));
        let refused = test.join().unwrap().unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn only_namespaces_can_be_asked_for() {
        let asked = libc::CLONE_NEWNET as u64 | libc::CLONE_VM as u64;
        let arguments = Arguments::of_a_child().new_namespaces(asked);
        assert_eq!(
            arguments.flags,
            CLONE_CLEAR_SIGHAND | libc::CLONE_NEWNET as u64
        );
    }
}
