//! Linux system calls that no library here wraps, each a safe function that is written once.
//!
//! Shim, VMM, fs server and agent import it; it imports none of them and knows nothing of pods. A
//! function is here if two programs need it, or if it takes unsafe code that a caller would
//! otherwise argue for. Where rustix has a safe function, callers use that one.
//!
//! Each function is safe in itself: what it demands of its caller it checks, or its types rule the
//! rest out. Errors are the kernel's own; the caller says what it was doing.

pub mod birth;
pub mod bpf;
pub mod clone;
pub mod command;
pub mod fd;
pub mod landlock;
mod lock;
pub mod mount;
pub mod namespace;
mod numbers;
pub mod signal;
pub mod socket;
pub mod tun;
#[cfg(feature = "tokio")]
pub mod watch;

pub use lock::lock;
