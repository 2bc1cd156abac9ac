//! The program, started as the shim starts it, with a share that is mounted only for it.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kata_like_boot::{
    CONTROL_FD, CachePolicy, Channel, FsdBoot, FsdFds, FsdReport, FsdShare, VERSION,
};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, open_tree,
    unmount,
};

pub const SECOND: Duration = Duration::from_secs(1);

/// A server with a share of its own: `rootfs` (private) and `volumes` (shared).
pub struct Server {
    child: Child,
    pub control: Option<Channel>,
    pub share: PathBuf,
    pub sockets: Vec<PathBuf>,
    _state: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Self {
        let server = Self::spawn(&["rootfs", "volumes"]);
        assert_eq!(server.report(), FsdReport::Serving);
        server
    }

    pub fn spawn(directories: &[&str]) -> Self {
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
        let listening = sockets
            .iter()
            .map(|path| OwnedFd::from(UnixListener::bind(path).unwrap()))
            .collect();
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
        };
        let (ours, theirs) = Channel::pair().unwrap();
        let inherited = theirs.as_fd().as_raw_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kata-like-fsd"));
        command.stdin(Stdio::null());
        // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe. Both
        // descriptors are plain numbers, open in the parent until `theirs` is dropped below.
        unsafe {
            command.pre_exec(move || match libc::dup2(inherited, CONTROL_FD) {
                CONTROL_FD => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command.spawn().unwrap();
        drop(theirs);
        let fds = FsdFds {
            tree,
            sockets: listening,
        };
        boot.send(&fds, &ours).unwrap();
        Self {
            child,
            control: Some(ours),
            share,
            sockets,
            _state: state,
        }
    }

    pub fn report(&self) -> FsdReport {
        let control = self.control.as_ref().unwrap();
        control.receive_within(10 * SECOND).unwrap().0
    }

    pub fn connect(&self, share: usize) -> UnixStream {
        UnixStream::connect(&self.sockets[share]).unwrap()
    }

    pub fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.child.id()))
    }

    pub fn status(&self, key: &str) -> String {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap().trim().to_string()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn ended_within(&mut self, deadline: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < deadline, "still running");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = unmount(&self.share, UnmountFlags::DETACH);
    }
}

pub fn mount_tmpfs(at: &Path) {
    mount("none", at, "tmpfs", MountFlags::empty(), None).unwrap();
}
