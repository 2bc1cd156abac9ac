//! The program, started as the shim starts it, with a share that is mounted only for it.

use std::cell::RefCell;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kata_like_boot::{
    BORN_IN, CachePolicy, Channel, FsdBoot, FsdFds, FsdReport, FsdShare, VERSION,
};
use kata_like_linux::birth::{Birth, Network, Newborn, birth};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, open_tree,
    unmount,
};
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid};
use rustix::thread::UnshareFlags;

use crate::guest::MEMORY;

pub const SECOND: Duration = Duration::from_secs(1);

/// How many files a guest may keep where a test does not care.
pub const FILES: u64 = 65_536;

/// A server with a share of its own: `rootfs` (private) and `volumes` (shared).
pub struct Server {
    process: Newborn,
    ended: Option<WaitIdStatus>,
    pub control: Option<Channel>,
    pub share: PathBuf,
    pub sockets: Vec<PathBuf>,
    /// The VMM's ends, each until the test takes it.
    connections: RefCell<Vec<Option<UnixStream>>>,
    _state: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Self {
        let server = Self::spawn(&["rootfs", "volumes"]);
        assert_eq!(server.report(), FsdReport::Serving);
        server
    }

    pub fn spawn(directories: &[&str]) -> Self {
        Self::spawn_as(BORN_IN, FILES, directories)
    }

    pub fn spawn_as(namespaces: UnshareFlags, files: u64, directories: &[&str]) -> Self {
        kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNS).unwrap();
        let cut = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", cut).unwrap();
        let state = tempfile::tempdir().unwrap();
        let share = state.path().join("share");
        fs::create_dir(&share).unwrap();
        mount_tmpfs(&share);
        mount_change(&share, MountPropagationFlags::SHARED).unwrap();
        fs::create_dir(share.join("rootfs")).unwrap();
        fs::create_dir(share.join("volumes")).unwrap();
        fs::write(share.join("file"), "").unwrap();
        let tree = open_tree(
            CWD,
            &share,
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE,
        )
        .unwrap();
        let sockets: Vec<_> = (0..directories.len())
            .map(|number| state.path().join(format!("{number}.sock")))
            .collect();
        let listening: Vec<_> = sockets
            .iter()
            .map(|path| OwnedFd::from(UnixListener::bind(path).unwrap()))
            .collect();
        let connect = |path| Some(UnixStream::connect(path).unwrap());
        let connections = sockets.iter().map(connect).collect();
        let boot = FsdBoot {
            version: VERSION,
            shares: directories
                .iter()
                .map(|directory| FsdShare {
                    directory: (*directory).into(),
                    cache: match *directory {
                        "volumes" => CachePolicy::Shared,
                        _ => CachePolicy::Private,
                    },
                })
                .collect(),
            files,
            memory_bytes: MEMORY as u64,
        };
        let (ours, theirs) = Channel::pair().unwrap();
        let stderr = std::io::stderr();
        let process = birth(&Birth {
            program: Path::new(env!("CARGO_BIN_EXE_kata-like-fsd")),
            arguments: &["kata-like-fsd"],
            environment: &[],
            directory: Path::new("/"),
            cgroup: None,
            network: Network::New,
            namespaces,
            mounts: None,
            label: None,
            oom_score: None,
            descriptors: &[None, None, Some(stderr.as_fd()), Some(theirs.as_fd())],
        })
        .unwrap();
        drop(theirs);
        let fds = FsdFds {
            tree,
            sockets: listening,
        };
        // A server that has ended already says why in its report.
        let _ = boot.send(&fds, &ours);
        Self {
            process,
            ended: None,
            control: Some(ours),
            share,
            sockets,
            connections: RefCell::new(connections),
            _state: state,
        }
    }

    pub fn report(&self) -> FsdReport {
        let control = self.control.as_ref().unwrap();
        control.receive_within(10 * SECOND).unwrap().0
    }

    pub fn connect(&self, share: usize) -> UnixStream {
        self.connections.borrow_mut()[share].take().unwrap()
    }

    pub fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.process.pid))
    }

    pub fn status(&self, key: &str) -> String {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap().trim().to_string()
    }

    pub fn is_running(&mut self) -> bool {
        self.look(WaitIdOptions::NOHANG).is_none()
    }

    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.process.pidfd, signal).unwrap();
    }

    /// How it ended.
    pub fn ended_within(&mut self, deadline: Duration) -> WaitIdStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.look(WaitIdOptions::NOHANG) {
                return status;
            }
            assert!(start.elapsed() < deadline, "still running");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn look(&mut self, how: WaitIdOptions) -> Option<WaitIdStatus> {
        if self.ended.is_none() {
            let process = WaitId::PidFd(self.process.pidfd.as_fd());
            self.ended = waitid(process, WaitIdOptions::EXITED | how).unwrap();
        }
        self.ended
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.process.pidfd, Signal::KILL);
        self.look(WaitIdOptions::empty());
        let _ = unmount(&self.share, UnmountFlags::DETACH);
    }
}

pub fn mount_tmpfs(at: &Path) {
    mount("none", at, "tmpfs", MountFlags::empty(), None).unwrap();
}
