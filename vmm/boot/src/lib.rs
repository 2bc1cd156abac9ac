//! Everything that passes between the shim and the processes that it starts for a pod.
//!
//! A child finds one connected `SOCK_SEQPACKET` socket as file descriptor [`CONTROL_FD`]. The first
//! message on it is the boot request: one JSON document, with every resource beside it as an open
//! file descriptor, in the order of the request's `…Fds` struct. Later messages are commands one
//! way and reports the other. End-of-file means that the other side is gone: the child then ends.
//!
//! Called by the shim and the command line tool (they send) and by vmm and fsd (they receive).
//! Deliberately absent: paths. A child gets what it uses, and never hears where it lies.

mod channel;
mod fsd;
mod kvm;
mod pace;
mod printk;
mod state;
mod vm;

pub use channel::{Channel, ChannelError, MAX_FDS, MAX_MESSAGE};
pub use fsd::{CachePolicy, FsdBoot, FsdFds, FsdReport, FsdShare};
pub use kvm::{KVM, KvmUnavailable, open_kvm};
pub use pace::Pace;
pub use printk::PrintkLayout;
pub use state::{Activity, QueueState, VcpuState, VmState};
pub use vm::{
    End, EndReason, Figures, HugePages, TAP_HEADER, VmBoot, VmCommand, VmFds, VmReport, VmShare,
};

use rustix::thread::UnshareFlags;

/// The number of the inherited control socket in a child.
pub const CONTROL_FD: std::os::fd::RawFd = 3;

/// The namespaces that a child is born in, beside a network of its own. So there is no process
/// that it could name, and nothing that it shares with one by System V IPC or a queue.
pub const BORN_IN: UnshareFlags = UnshareFlags::NEWPID
    .union(UnshareFlags::NEWCGROUP)
    .union(UnshareFlags::NEWIPC)
    .union(UnshareFlags::NEWUTS);

/// How long a child waits for its boot request.
const BOOT_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

/// The version of the messages in this crate. A child refuses any other version; its error has
/// both.
pub const VERSION: u32 = 2;
