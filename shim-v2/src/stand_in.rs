//! A task's stand-in: a host process that containerd, CRI and others can look at.
//!
//! Clients read `/proc/PID/ns/net`, build namespace paths from the pid and look at its cgroup, so
//! each task has one: in the pod's network namespace, in the container's own cgroup, with a pid of
//! its own. It does nothing and holds nothing: its root is an empty directory, it has no capability
//! and one descriptor, a pipe whose other end the shim holds. It ends when that pipe closes, which
//! the kernel does when the shim is gone. Called by `pod`; [`main`] by `main` before any
//! runtime starts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::thread::UnshareFlags;

use crate::spawn::{Birth, BirthError, Child, Network, birth};

/// The first argument of a stand-in's process.
pub const ARGUMENT: &str = "stand-in";

/// How long a killed stand-in may take to be gone.
const END: Duration = Duration::from_secs(2);

/// Why there is no stand-in.
#[derive(Debug, thiserror::Error)]
pub enum StandInError {
    /// It could not be born.
    #[error("start the stand-in of {task}")]
    Birth {
        task: String,
        /// Why it failed.
        #[source]
        source: BirthError,
    },
    /// A system call of the shim failed.
    #[error("{step} for the stand-in of {task}")]
    Io {
        /// What was being done.
        step: &'static str,
        task: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A living stand-in. Dropped, it ends.
#[derive(Debug)]
pub struct StandIn {
    child: Child,
    /// The end of its pipe that keeps it alive.
    #[allow(dead_code, reason = "its drop is what ends the stand-in")]
    hold: OwnedFd,
}

impl StandIn {
    /// Starts the stand-in of `task`. `empty` is the path of an empty directory, `oom_score` its
    /// oom_score_adj. Blocks for as long as an exec takes; needs a runtime of tokio.
    pub fn start(
        task: &str,
        cgroup: BorrowedFd,
        network: Network,
        empty: &Path,
        oom_score: i32,
    ) -> Result<Self, StandInError> {
        let arguments = ["containerd-shim-kata-like-v2", ARGUMENT, task];
        Self::start_as(&arguments, task, Some(cgroup), network, empty, oom_score)
    }

    fn start_as(
        arguments: &[&str],
        task: &str,
        cgroup: Option<BorrowedFd>,
        network: Network,
        empty: &Path,
        oom_score: i32,
    ) -> Result<Self, StandInError> {
        let io = |step| {
            move |source| StandInError::Io {
                step,
                task: task.into(),
                source,
            }
        };
        let (ends, hold) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|errno| io("make a pipe")(errno.into()))?;
        let stderr = io::stderr();
        let newborn = birth(&Birth {
            program: Path::new("/proc/self/exe"),
            arguments,
            environment: &[],
            directory: empty,
            cgroup,
            network,
            namespaces: UnshareFlags::empty(),
            mounts: None,
            label: None,
            oom_score: Some(oom_score),
            descriptors: &[Some(ends.as_fd()), None, Some(stderr.as_fd())],
        })
        .map_err(|source| StandInError::Birth {
            task: task.into(),
            source,
        })?;
        let child = Child::watch(newborn).map_err(io("watch"))?;
        Ok(Self { child, hold })
    }

    pub fn pid(&self) -> u32 {
        self.child.pid
    }

    /// The process, to wait for its end.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Ends it and waits until it is gone.
    pub async fn end(self) {
        self.child.end(END).await;
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.child.kill();
    }
}

/// The stand-in's whole life. Called first of all by `main` when the first argument is
/// [`ARGUMENT`]; never returns.
pub fn main() -> ! {
    let status = match settle() {
        Ok(()) => {
            wait();
            0
        }
        Err((step, errno)) => {
            eprintln!("stand-in: {step}: {}", io::Error::from(errno));
            1
        }
    };
    std::process::exit(status)
}

/// Gives up what the process was born with. It was started in the empty directory.
fn settle() -> Result<(), (&'static str, rustix::io::Errno)> {
    use rustix::thread::{CapabilitySet, CapabilitySets};

    rustix::process::chroot(".").map_err(|errno| ("enter the empty root", errno))?;
    rustix::process::chdir("/").map_err(|errno| ("enter the empty root", errno))?;
    let _ = rustix::thread::set_name(c"stand-in");
    rustix::thread::set_no_new_privs(true).map_err(|errno| ("set no_new_privs", errno))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(|errno| ("drop capabilities", errno))?;
    // Nothing in this process uses a descriptor above 0 any more; an error message after this would
    // be lost, and there is none.
    let _ = kata_like_linux::fd::close(1..=u32::MAX);
    Ok(())
}

/// Waits for the end of the pipe, whatever comes through it.
fn wait() {
    let mut bytes = [0u8; 16];
    loop {
        // Descriptor 0: the shim gave it, and nothing here closes it.
        match rustix::io::read(io::stdin(), &mut bytes) {
            Ok(0) => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spawn::Exit;

    /// Not a test: the stand-in's process of the tests below.
    #[test]
    #[ignore = "run by the other tests as a process of its own"]
    fn as_process() {
        main()
    }

    fn start(empty: &Path) -> StandIn {
        let arguments = ["x", "--exact", "stand_in::tests::as_process", "--ignored"];
        StandIn::start_as(&arguments, "task", None, Network::New, empty, 0).unwrap()
    }

    async fn settled(pid: u32, empty: &Path) {
        for _ in 0..500 {
            let root = std::fs::read_link(format!("/proc/{pid}/root")).unwrap();
            let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            if root == empty && fds.count() == 1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the stand-in does not settle");
    }

    #[tokio::test]
    async fn it_holds_nothing_and_ends_with_its_maker() {
        let empty = tempfile::tempdir().unwrap();
        let (one, other) = (start(empty.path()), start(empty.path()));
        assert_ne!(one.pid(), other.pid());
        for stand_in in [&one, &other] {
            settled(stand_in.pid(), empty.path()).await;
        }
        // As when the shim is killed: nobody signals, the pipe closes.
        let StandInParts { child, hold } = take_apart(one);
        drop(hold);
        let exit = tokio::time::timeout(Duration::from_secs(5), child.exited()).await;
        assert_eq!(exit.unwrap(), Exit::Status(0));
        assert_eq!(other.child().exit(), None);
        let child = other.child().clone();
        other.end().await;
        assert_eq!(child.exit(), Some(Exit::Signal(9)));
    }

    struct StandInParts {
        child: Child,
        hold: OwnedFd,
    }

    fn take_apart(stand_in: StandIn) -> StandInParts {
        let child = stand_in.child.clone();
        let hold = stand_in.hold.try_clone().unwrap();
        // Without its `drop`, which kills; the original of the pipe is closed by hand.
        let raw = std::os::fd::AsRawFd::as_raw_fd(&stand_in.hold);
        std::mem::forget(stand_in);
        // SAFETY: the owner was forgotten just now and closes it no more.
        drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) });
        StandInParts { child, hold }
    }
}
