//! File descriptors that the runtime watches until they are ready.
//!
//! Used for sockets, pipes, terminals and files of the kernel's.

use std::io;
use std::os::fd::OwnedFd;

use kata_like_linux::watch::Watched;
use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;

/// For reading and writing.
pub const BOTH: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// Watches `fd` for `interest`. It should be non-blocking.
pub fn watch(fd: impl Into<OwnedFd>, interest: Interest) -> io::Result<Watched<OwnedFd>> {
    Watched::new(fd.into(), interest)
}

/// Does `operation` as soon as `fd` is ready for it, and again when a signal interrupts it. The
/// latter happens without any waiting, too: accept(2) on a vsock socket answers EINTR rather than
/// EAGAIN while a signal is pending (net/vmw_vsock/af_vsock.c, vsock_accept).
pub async fn when_ready<T, E: Into<io::Error>>(
    fd: &Watched<OwnedFd>,
    interest: Interest,
    mut operation: impl FnMut(&OwnedFd) -> Result<T, E>,
) -> io::Result<T> {
    loop {
        let attempt = fd.async_io(interest, |fd| operation(fd).map_err(Into::into));
        match attempt.await {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Fills the buffer from a socket, and takes no byte more. An end before that is an error.
pub async fn read_exact(socket: &Watched<OwnedFd>, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        let receive = |socket: &OwnedFd| recv(socket, &mut *buffer, RecvFlags::empty());
        let (count, _) = when_ready(socket, Interest::READABLE, receive).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer = buffer.get_mut(count..).unwrap_or_default();
    }
    Ok(())
}

/// Writes all of `bytes`.
pub async fn write_all(to: &Watched<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let write = |to: &OwnedFd| rustix::io::write(to, bytes);
        let written = when_ready(to, Interest::WRITABLE, write).await?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[tokio::test]
    async fn an_interrupted_operation_is_tried_again() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&writer, b"x").unwrap();
        let reader = watch(reader, Interest::READABLE).unwrap();
        let mut answers = [Err(Errno::INTR), Err(Errno::INTR), Ok(7)].into_iter();
        let next = when_ready(&reader, Interest::READABLE, |_| answers.next().unwrap());
        assert_eq!(next.await.unwrap(), 7);
    }
}
