//! The system calls that each kind of thread may make, with the reason for each.
//!
//! One file for each process. The process makes filters of its lists; `kata-like jail` prints them.
//! No list opens a file by its path (but for the fs server's worker), makes or connects a socket,
//! starts a program, mounts, traces or sends a signal to another process.

pub mod fsd;
pub mod proxy;
mod thread;
pub mod vmm;

pub use thread::{Process, Thread};

/// Each process that has lists.
pub const PROCESSES: [&Process; 3] = [&vmm::PROCESS, &fsd::PROCESS, &proxy::PROCESS];
