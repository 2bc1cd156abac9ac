//! What the host has for a guest: disks, and taps in a network namespace of the test's own thread.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::Command;

use kata_like_boot::TAP_HEADER;

/// A sparse disk of 64 MiB that begins with these words: a loop device, since the VMM may write to
/// no file. It goes with its last descriptor.
pub fn disk(words: &str) -> File {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(words.as_bytes()).unwrap();
    file.as_file().set_len(64 << 20).unwrap();
    let losetup = |arguments: &[&str]| {
        let done = Command::new("losetup").args(arguments).output().unwrap();
        assert!(done.status.success(), "losetup {arguments:?}: {done:?}");
        String::from_utf8(done.stdout).unwrap().trim().to_owned()
    };
    let path = losetup(&["--find", "--show", file.path().to_str().unwrap()]);
    let device = File::options().read(true).write(true).open(&path).unwrap();
    losetup(&["--detach", &path]);
    device
}

/// Moves this thread to a network namespace of its own, which ends with the thread.
pub fn enter_new_namespace() {
    kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
}

/// A tap as the shim makes it.
pub fn tap(name: &str) -> OwnedFd {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    kata_like_linux::tun::attach(&tun, name, FLAGS).unwrap();
    kata_like_linux::tun::set_header_size(&tun, TAP_HEADER as libc::c_int).unwrap();
    rustix::io::ioctl_fionbio(&tun, true).unwrap();
    tun.into()
}

const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Runs `ip`, which must succeed.
pub fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status();
    assert!(done.unwrap().success(), "ip {arguments}");
}
