//! File descriptors that the runtime watches for being ready.
//!
//! Used by whoever waits for a socket, a pipe, a terminal or a file of the kernel's.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Reading and writing.
pub const BOTH: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// Has `fd` watched for `interest`. It must be non-blocking to be of use.
pub fn watch(fd: impl Into<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    let fd: OwnedFd = fd.into();
    // SAFETY: the descriptor must be open, and stay the same file until the `AsyncFd` is dropped.
    // - An `OwnedFd` is open and its number never changes; nobody else may close it.
    // - The `AsyncFd` owns it from here on; `get_mut`, by which it could be exchanged for another,
    //   is called nowhere in this crate.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
