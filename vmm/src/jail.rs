//! What the process gives up, and how each thread closes a jail of its own.
//!
//! Called by `machine`: [`confine`] before it reads a byte of the guest's kernel, [`Jails`] for the
//! threads, which close theirs before the guest's first instruction. The lists of system calls are
//! in `kata_like_jail::lists::vmm`. A call that is not in them kills the process; the shim sees
//! SIGSYS.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use kata_like_jail::JailError;
use kata_like_jail::lists::{Thread, vmm};
use kata_like_jail::seccomp::{Check, Filter, Rule, Threads};
use kata_like_jail::{rule, values};
use rustix::process::{Pid, Resource};

use crate::layout::{DISK_SLOTS, NET_SLOTS};

/// How long all threads may take to close their jails.
const CLOSING: Duration = Duration::from_secs(10);

/// The most open files: as many as vsock has streams, and those of all slots, vCPUs and threads.
const MAX_FILES: u64 = 1024 + 256;

/// The most address space beside guest memory, in bytes: most of it for the stacks of 32 vCPUs'
/// threads.
const ELBOW_ROOM: u64 = 256 << 20;

/// The threads of a VMM beside its vCPUs: event loop, watchdog, device switch, a worker for each
/// slot that is filled later; and one that some kernels make in the process at the first KVM_RUN
/// (kvm-nx-lpage-recovery), without which no vCPU runs.
const OTHER_THREADS: u64 = 3 + (NET_SLOTS + DISK_SLOTS) as u64 + 1;

/// In a build with debug assertions the standard library asks of each descriptor that it closes
/// whether it is open.
const DEBUG: &[Rule] = &[rule!(
    SYS_fcntl,
    &[Check::one_of(1, values![F_GETFD])],
    "a check of a descriptor before it is closed, in a debug build"
)];

/// What of the boot request the jail depends on.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The user id to take: nobody else's, for the threads of one user are counted together.
    pub uid: u32,
    /// The guest's memory, in bytes.
    pub memory_bytes: u64,
    /// How many vCPUs there will be.
    pub vcpus: u8,
}

/// Gives up what the process has beside its descriptors. Before the first thread: most of this
/// concerns the calling one, and those that it starts. `process` is this one.
pub fn confine(bounds: Bounds, process: Pid) -> Result<(), JailError> {
    if !kata_like_jail::enter_empty_root()? {
        eprintln!(
            "kata-like-vmm: the SELinux label forbids an empty root: it keeps files off alone"
        );
    }
    kata_like_jail::drop_identity(bounds.uid)?;
    if !kata_like_jail::shut_out()? {
        eprintln!("kata-like-vmm: the kernel has no Landlock: files are kept off by the rest");
    }
    // Nothing here writes to a file: guest memory has its size. A write to one is an error, not the
    // process's end.
    kata_like_linux::signal::ignore(libc::SIGXFSZ)
        .map_err(|why: io::Error| JailError::new("ignore the signal of a file's limit", why))?;
    for (what, most) in [
        (Resource::Fsize, 0),
        (Resource::Nofile, MAX_FILES),
        (Resource::Nproc, OTHER_THREADS + u64::from(bounds.vcpus)),
        (Resource::As, bounds.memory_bytes.saturating_add(ELBOW_ROOM)),
    ] {
        kata_like_jail::limit(what, most)?;
    }
    filter(&vmm::BOOT, process)?.install(Threads::Calling)
}

/// A thread's list as the kernel takes it. `process` is this one: in its jail it can't ask for its
/// number.
pub fn filter(thread: &Thread, process: Pid) -> Result<Filter, JailError> {
    let closes = [&vmm::LOOP, &vmm::LIFE, &vmm::WATCHDOG].contains(&thread);
    let more = match cfg!(debug_assertions) && closes {
        true => DEBUG,
        false => &[],
    };
    thread.filter(process, more)
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
    pub fn doors(&mut self, kind: &Thread, count: usize) -> Result<Vec<Door>, JailError> {
        let filter = Arc::new(filter(kind, self.process)?);
        self.open += count;
        let door = || Door {
            filter: filter.clone(),
            tell: self.tell.clone(),
        };
        Ok((0..count).map(|_| door()).collect())
    }

    /// One for the one thread of this kind.
    pub fn door(&mut self, kind: &Thread) -> Result<Door, JailError> {
        self.open += 1;
        Ok(Door {
            filter: Arc::new(filter(kind, self.process)?),
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

#[cfg(test)]
#[path = "jail_attacks.rs"]
mod attacks;
