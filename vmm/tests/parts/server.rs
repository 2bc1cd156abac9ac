//! The fs server as the shim starts it: the pod's share and a listening socket per device.
//!
//! Every mount is made in the mount namespace of the test's own thread, which ends with it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

use kata_like_boot::{CachePolicy, Channel, FsdBoot, FsdFds, FsdReport, FsdShare, VERSION};
use kata_like_limits::{Patience, scaled};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, open_tree,
    unmount,
};

use super::{PATIENCE, SECOND, spawn};

/// One server process. Killed on drop.
pub struct FsServer {
    process: Child,
    folder: tempfile::TempDir,
    shares: Vec<&'static str>,
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
        };
        let (control, theirs) = Channel::pair().unwrap();
        let program = std::env::var_os("KATA_LIKE_FSD").expect("KATA_LIKE_FSD names the fs server");
        let process = spawn(Path::new(&program), theirs.into_fd());
        boot.send(&fds, &control).unwrap();
        let (report, _) = control
            .receive_within::<FsdReport>(scaled(PATIENCE))
            .unwrap();
        assert_eq!(report, FsdReport::Serving);
        Self {
            process,
            folder,
            shares: shares.to_vec(),
            _control: control,
        }
    }

    /// A connection for each share.
    pub fn connections(&self) -> Vec<(&'static str, UnixStream)> {
        let connect = |name: &&'static str| {
            let socket = self.folder.path().join(name);
            (*name, UnixStream::connect(socket).unwrap())
        };
        self.shares.iter().map(connect).collect()
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

    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: a plain system call on a child that was not waited for, so the id is its own.
        unsafe { libc::kill(self.process.id() as libc::pid_t, signal) };
    }

    /// Waits for the server's end, at most a second.
    pub fn status(&mut self) -> ExitStatus {
        let patience = Patience::new(SECOND);
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(!patience.is_over(), "the fs server still runs");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for FsServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = unmount(self.path(""), UnmountFlags::DETACH);
    }
}

fn mount_tmpfs(at: &Path) {
    mount("none", at, "tmpfs", MountFlags::empty(), None).unwrap();
}
