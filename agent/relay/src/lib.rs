//! Joins two stream sockets, so that the programs at their far ends see one connection.
//!
//! Called by the shim (TCP on the host and a UNIX socket of the VMM) and by the agent (vsock and
//! TCP in the guest). Bytes pass with back-pressure: a side is read only as fast as the other side
//! takes. When one side ends its direction the relay ends it on the other side, and the opposite
//! direction goes on (half-close). A reset is passed on as a reset.
//!
//! UNIX sockets and vsock know no reset. A side that leaves without having shut its direction down
//! counts as one that has reset. To find out, the relay makes an empty send after the last byte: it
//! fails if the other end is closed altogether (net/unix/af_unix.c, unix_stream_sendmsg;
//! net/vmw_vsock/af_vsock.c, vsock_connectible_sendmsg).

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kata_like_linux::watch::{Held, Watched};
use rustix::buffer::spare_capacity;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// How many bytes are moved at once. A direction holds that many only if its receiver is behind.
const CHUNK: usize = 32 << 10;

/// A non-blocking stream socket that the runtime watches.
pub trait Stream: AsFd + Send + Sync {
    /// Runs `operation` as soon as the socket is ready for it, and again after each EAGAIN.
    fn when_ready<T: Send>(
        &self,
        interest: Interest,
        operation: impl FnMut(BorrowedFd) -> Result<T, Errno> + Send,
    ) -> impl Future<Output = io::Result<T>> + Send;
}

/// The runtime's own sockets, which have no common trait for this.
macro_rules! of_the_runtime {
    ($($socket:ty),*) => {$(
        impl Stream for $socket {
            async fn when_ready<T: Send>(
                &self,
                interest: Interest,
                mut operation: impl FnMut(BorrowedFd) -> Result<T, Errno> + Send,
            ) -> io::Result<T> {
                let attempt = || Ok(operation(self.as_fd())?);
                self.async_io(interest, attempt).await
            }
        }
    )*};
}

of_the_runtime!(TcpStream, UnixStream);

impl Stream for Watched<OwnedFd> {
    async fn when_ready<T: Send>(
        &self,
        interest: Interest,
        mut operation: impl FnMut(BorrowedFd) -> Result<T, Errno> + Send,
    ) -> io::Result<T> {
        let attempt = |fd: &Held<OwnedFd>| Ok(operation(fd.as_fd())?);
        self.async_io(interest, attempt).await
    }
}

/// Joins two sockets until both directions have ended, however long nothing moves, and closes them.
/// If the future is dropped earlier it closes them, too.
pub async fn relay(one: impl Stream, other: impl Stream) {
    let shut = [AtomicBool::new(false), AtomicBool::new(false)];
    let [one_shut, other_shut] = &shut;
    let ends = tokio::try_join!(
        carry((&one, one_shut), (&other, other_shut)),
        carry((&other, other_shut), (&one, one_shut)),
    );
    if !matches!(ends, Ok((End::Told, End::Told))) {
        reset(&one);
        reset(&other);
    }
}

/// Makes the closing of a TCP socket a reset, which discards unsent bytes. Other sockets close as
/// usual.
pub fn reset(socket: impl AsFd) {
    // Fails for no socket.
    let _ = set_socket_linger(socket, Some(Duration::ZERO));
}

/// How a direction has ended.
enum End {
    /// The receiver has all bytes and knows that no more come.
    Told,
    /// The receiver takes no more. What it sends is still carried.
    NotTaken,
}

/// Carries one direction. A failure is the sender's and ends both directions. Beside each socket:
/// whether it already knows that no more comes.
async fn carry<A: Stream, B: Stream>(
    (from, from_shut): (&A, &AtomicBool),
    (to, to_shut): (&B, &AtomicBool),
) -> io::Result<End> {
    loop {
        // No memory is held while nothing moves.
        let receive = |fd: BorrowedFd| {
            let mut chunk = Vec::with_capacity(CHUNK);
            retry_on_intr(|| recv(fd, spare_capacity(&mut chunk), RecvFlags::empty()))?;
            Ok(chunk)
        };
        let chunk = from.when_ready(Interest::READABLE, receive).await?;
        if chunk.is_empty() {
            break;
        }
        if send_all(to, &chunk).await.is_err() {
            return Ok(End::NotTaken);
        }
    }
    if !from_shut.load(Ordering::Relaxed) {
        send(from, &[], SendFlags::NOSIGNAL)?;
    }
    to_shut.store(true, Ordering::Relaxed);
    Ok(match shutdown(to, Shutdown::Write) {
        Ok(()) => End::Told,
        Err(_) => End::NotTaken,
    })
}

async fn send_all(to: &impl Stream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let send = |fd: BorrowedFd| retry_on_intr(|| send(fd, bytes, SendFlags::NOSIGNAL));
        let sent = to.when_ready(Interest::WRITABLE, send).await?;
        bytes = bytes.get(sent..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
