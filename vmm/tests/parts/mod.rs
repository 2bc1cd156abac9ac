//! What the test programs start a guest from: its kernel, its PID 1 in an initrd, its processes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "each of them uses a part of it")]

pub mod guest;
pub mod host;
pub mod server;

use std::fs;
use std::io::{Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kata_like_boot::CONTROL_FD;

/// A guest's way from start to end takes a few seconds under emulation.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const SECOND: Duration = Duration::from_secs(1);

/// The guest kernel; its `printk.json` lies beside it.
pub fn kernel() -> PathBuf {
    std::env::var_os("KATA_LIKE_KERNEL")
        .expect("KATA_LIKE_KERNEL names the guest kernel")
        .into()
}

/// A program for the guest, from its source below `vmm`.
pub fn compiled(source: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("program");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    let compiler = Command::new("cc")
        .args(["-static", "-O1", "-s", "-o"])
        .arg(&binary)
        .arg(&source)
        .status();
    assert!(compiler.unwrap().success(), "compile {}", source.display());
    fs::read(binary).unwrap()
}

/// A "newc" cpio archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
pub fn cpio(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let trailer: (&str, u32, &[u8]) = ("TRAILER!!!", 0, b"");
    for (number, (name, mode, content)) in files.iter().chain([&trailer]).enumerate() {
        let fields = [
            number as u32 + 1,
            *mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08X}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// An unnamed file with this content.
pub fn temporary(content: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file.into()
}

/// Starts one of our binaries with its control socket as descriptor 3.
pub fn spawn(program: &Path, control: OwnedFd) -> Child {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    // SAFETY: dup2 is async-signal-safe; the closure owns the descriptor that it duplicates.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(control.as_raw_fd(), CONTROL_FD) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            // Without effect on a duplicate; needed if the socket is number 3 itself.
            libc::fcntl(CONTROL_FD, libc::F_SETFD, 0);
            Ok(())
        });
    }
    command.spawn().unwrap()
}
