//! The fs server as the shim starts it: the share's mount and a listening socket for each device.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::CString;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use kata_like_boot::{CachePolicy, Channel, FsdBoot, FsdFds, FsdReport, FsdShare, VERSION};

use crate::parts::{PATIENCE, spawn};

/// One server process. Killed on drop.
pub struct FsServer {
    process: Child,
    folder: tempfile::TempDir,
    tags: Vec<&'static str>,
    _control: Channel,
}

impl FsServer {
    /// Serves an empty folder for each tag.
    pub fn start(tags: &[&'static str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let share = folder.path().join("share");
        for tag in tags {
            std::fs::create_dir_all(share.join(tag)).unwrap();
        }
        // The server makes the top read-only: what is to be written to is a mount of its own.
        bind(&share);
        for tag in tags {
            bind(&share.join(tag));
        }
        let listen = |tag: &&str| UnixListener::bind(folder.path().join(tag)).unwrap().into();
        let fds = FsdFds {
            tree: open_tree(&share),
            sockets: tags.iter().map(listen).collect(),
        };
        let share = |tag: &&str| FsdShare {
            directory: (*tag).to_owned(),
            cache: CachePolicy::Shared,
        };
        let boot = FsdBoot {
            version: VERSION,
            shares: tags.iter().map(share).collect(),
        };
        let (control, theirs) = Channel::pair().unwrap();
        let program = std::env::var_os("KATA_LIKE_FSD").expect("KATA_LIKE_FSD names the server");
        let process = spawn(Path::new(&program), theirs.into_fd());
        boot.send(&fds, &control).unwrap();
        let (report, _): (FsdReport, _) = control.receive_within(PATIENCE).unwrap();
        assert_eq!(report, FsdReport::Serving);
        Self {
            process,
            folder,
            tags: tags.to_vec(),
            _control: control,
        }
    }

    /// A connection for each tag.
    pub fn connections(&self) -> Vec<(&'static str, UnixStream)> {
        let connect = |tag: &&'static str| {
            let socket = self.folder.path().join(tag);
            (*tag, UnixStream::connect(socket).unwrap())
        };
        self.tags.iter().map(connect).collect()
    }

    /// A tag's folder.
    pub fn path(&self, tag: &str) -> PathBuf {
        self.folder.path().join("share").join(tag)
    }

    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: a plain system call on a child that was not waited for, so the id is its own.
        unsafe { libc::kill(self.process.id() as libc::pid_t, signal) };
    }
}

impl Drop for FsServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let share = self.folder.path().join("share");
        let _ = Command::new("umount").arg("-Rl").arg(share).status();
    }
}

fn bind(folder: &Path) {
    let mount = Command::new("mount")
        .args(["--bind", "--make-shared"])
        .args([folder, folder])
        .status();
    assert!(mount.unwrap().success());
}

fn open_tree(path: &Path) -> OwnedFd {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as u32;
    // SAFETY: `path` is a live C string; the call takes no other memory.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    assert!(fd >= 0, "open_tree: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just returned this descriptor; nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}
