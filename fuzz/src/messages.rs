//! Targets for which a crate's public functions are enough: messages and files of the host's own
//! programs, which are read again after something has gone wrong there.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use kata_like_boot::{Channel, FsdBoot, FsdReport, VmBoot, VmCommand, VmReport};
use kata_like_config::Config;
use kata_like_config::state::Record;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendFlags, send};

/// A message on a control socket. The first byte says what the receiver waits for.
pub fn boot(data: &[u8]) {
    let Some((kind, message)) = data.split_first() else {
        return;
    };
    let (ours, theirs) = Channel::pair().expect("make a pair of sockets");
    let theirs = theirs.into_fd();
    // A message that is too long for the socket is none.
    if message.is_empty() || send(&theirs, message, SendFlags::NOSIGNAL).is_err() {
        return;
    }
    match kind % 5 {
        0 => drop(VmBoot::receive(&ours)),
        1 => drop(FsdBoot::receive(&ours)),
        2 => drop(ours.receive::<VmCommand>()),
        3 => drop(ours.receive::<VmReport>()),
        _ => drop(ours.receive::<FsdReport>()),
    }
}

/// A configuration file, or a pod's record. What is taken for a record says the same once it is
/// written and read again.
pub fn config(data: &[u8]) {
    let mut file = File::from(memfd_create("config", MemfdFlags::CLOEXEC).expect("make a file"));
    file.write_all(data).expect("write a file");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    if let Ok(config) = Config::load_file(&path) {
        assert!(config.memory_mib >= 64 && config.memory_mib.is_multiple_of(2));
        assert!((1..=32).contains(&config.max_vcpus));
        assert!(config.kernel.is_absolute());
    }
    let _ = Record::parse(data);
}
