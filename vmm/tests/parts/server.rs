//! The fs server as the shim starts it: the pod's share and a listening socket per device.
//!
//! Every mount is made in the mount namespace of the test's own thread, which ends with it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kata_like_boot::{
    BORN_IN, CachePolicy, Channel, FsdBoot, FsdFds, FsdReport, FsdShare, VERSION,
};
use kata_like_limits::{Patience, scaled};
use kata_like_linux::birth::{Birth, Network, Newborn, birth};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, open_tree,
    unmount,
};
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid};

use super::{PATIENCE, SECOND};

/// One server process. Killed on drop.
pub struct FsServer {
    process: Newborn,
    folder: tempfile::TempDir,
    connections: RefCell<Vec<(&'static str, UnixStream)>>,
    _control: Channel,
}

impl FsServer {
    /// Serves an empty folder per share. The host may change `volumes`.
    pub fn start(shares: &[&'static str]) -> Self {
        kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNS).unwrap();
        let cut = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", cut).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let share = folder.path().join("share");
        fs::create_dir(&share).unwrap();
        mount_tmpfs(&share);
        mount_change(&share, MountPropagationFlags::SHARED).unwrap();
        for directory in shares {
            fs::create_dir(share.join(directory)).unwrap();
        }
        let clone = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let listen = |name| UnixListener::bind(folder.path().join(name)).unwrap().into();
        let fds = FsdFds {
            tree: open_tree(CWD, &share, clone).unwrap(),
            sockets: shares.iter().map(listen).collect(),
        };
        let connect = |name: &&'static str| {
            let socket = folder.path().join(name);
            (*name, UnixStream::connect(socket).unwrap())
        };
        let connections = shares.iter().map(connect).collect();
        let share = |directory: &&str| FsdShare {
            directory: (*directory).into(),
            cache: match *directory {
                "volumes" => CachePolicy::Shared,
                _ => CachePolicy::Private,
            },
        };
        let boot = FsdBoot {
            version: VERSION,
            shares: shares.iter().map(share).collect(),
            files: 65_536,
            memory_bytes: 4 << 30,
        };
        let (control, theirs) = Channel::pair().unwrap();
        let program = std::env::var_os("KATA_LIKE_FSD").expect("KATA_LIKE_FSD names the fs server");
        let stderr = std::io::stderr();
        let process = birth(&Birth {
            program: Path::new(&program),
            arguments: &["kata-like-fsd"],
            environment: &[],
            directory: Path::new("/"),
            cgroup: None,
            network: Network::New,
            namespaces: BORN_IN,
            mounts: None,
            label: None,
            oom_score: None,
            descriptors: &[None, None, Some(stderr.as_fd()), Some(theirs.as_fd())],
        })
        .unwrap();
        drop(theirs);
        boot.send(&fds, &control).unwrap();
        let (report, _) = control
            .receive_within::<FsdReport>(scaled(PATIENCE))
            .unwrap();
        assert_eq!(report, FsdReport::Serving);
        Self {
            process,
            folder,
            connections: RefCell::new(connections),
            _control: control,
        }
    }

    /// The connection for each share. There is one, so they can be had once.
    pub fn connections(&self) -> Vec<(&'static str, UnixStream)> {
        self.connections.take()
    }

    /// A file or folder of the share, for example `rootfs/c1`.
    pub fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join("share").join(path)
    }

    /// Mounts a file system into the share, on a new folder if there is none.
    pub fn mount(&self, path: &str) -> PathBuf {
        let at = self.path(path);
        let _ = fs::create_dir(&at);
        mount_tmpfs(&at);
        at
    }

    /// Unmounts the path as soon as nothing uses it.
    pub fn unmount_soon(&self, path: &str) {
        let patience = Patience::new(5 * SECOND);
        while let Err(errno) = unmount(self.path(path), UnmountFlags::empty()) {
            assert!(!patience.is_over(), "{path}: {errno}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.process.pidfd, signal).unwrap();
    }

    /// Waits for the server's end, at most a second.
    pub fn status(&self) -> WaitIdStatus {
        let patience = Patience::new(SECOND);
        loop {
            let process = WaitId::PidFd(self.process.pidfd.as_fd());
            let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
            if let Some(status) = waitid(process, ended).unwrap() {
                return status;
            }
            assert!(!patience.is_over(), "the fs server still runs");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for FsServer {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.process.pidfd, Signal::KILL);
        let process = WaitId::PidFd(self.process.pidfd.as_fd());
        let _ = waitid(process, WaitIdOptions::EXITED);
        let _ = unmount(self.path(""), UnmountFlags::DETACH);
    }
}

fn mount_tmpfs(at: &Path) {
    mount("none", at, "tmpfs", MountFlags::empty(), None).unwrap();
}
