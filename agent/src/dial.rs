//! The one connection to the host: dialled once, then served.
//!
//! Called by `main`. The host is CID 2 and accepts exactly one connection on `AGENT_PORT`. After
//! that, nobody in the guest can call the host. When the connection ends, nobody owns the machine
//! any more: `Connection` tells the server of the API.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use kata_like_agent_protocol::AGENT_PORT;
use kata_like_failure::{Failure, Step};
use kata_like_linux::socket::{SocketOption, set};
use kata_like_linux::watch::Watched;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use rustix::net::sockopt::socket_error;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::readiness::{BOTH, watch};

/// The VMM answers a dial at once, but the host may be slow.
const DEADLINE: Duration = Duration::from_secs(30);

/// The control connection, and when it was made.
pub struct Dialled {
    /// The connection itself.
    pub connection: Connection,
    /// When the dial began: CLOCK_BOOTTIME in nanoseconds.
    pub at_ns: i64,
}

/// Dials the host.
pub async fn dial() -> Result<Dialled, Failure> {
    let now = clock_gettime(ClockId::Boottime);
    let at_ns = now
        .tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec);
    let port = AGENT_PORT;
    let step = |step| move || format!("dial vsock port {port} of the host: {step}");

    let fd = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .step(step("make a socket"))?;
    // The kernel's own deadline is two seconds, which a busy host can exceed.
    set(&fd, SocketOption::VsockConnectTimeout(DEADLINE))
        .step(step("set the socket's patience"))?;
    match connect(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, port)) {
        Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno).step(step("connect")),
    }
    let socket = watch(fd, BOTH).step(step("watch the socket"))?;
    let connected = timeout(DEADLINE, socket.writable()).await.map_err(|_| {
        let what = format!("no answer after {DEADLINE:?}");
        Failure::failed(format!("dial vsock port {port} of the host"), what)
    })?;
    connected.step(step("wait for the socket"))?.retain_ready();
    match socket_error(&socket) {
        Ok(Ok(())) => {}
        Ok(Err(errno)) | Err(errno) => return Err(errno).step(step("connect")),
    }
    Ok(Dialled {
        connection: Connection {
            socket,
            ended: Arc::new(Notify::new()),
        },
        at_ns,
    })
}

/// A connected stream socket that tells when its peer has gone.
pub struct Connection {
    socket: Watched<OwnedFd>,
    ended: Arc<Notify>,
}

impl Connection {
    /// Notified, for good, once nothing more can be read from the connection.
    pub fn ended(&self) -> Arc<Notify> {
        self.ended.clone()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.ended.notify_one();
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            let result = guard.try_io(|socket| {
                recv(socket.get_ref().as_fd(), &mut *unfilled, RecvFlags::empty())
                    .map(|(received, _)| received)
                    .map_err(io::Error::from)
            });
            match result {
                Ok(Ok(received)) => {
                    if received == 0 {
                        self.ended.notify_one();
                    }
                    buffer.advance(received);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    self.ended.notify_one();
                    return Poll::Ready(Err(error));
                }
                Err(_not_ready) => {}
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.socket.poll_write_ready(context))?;
            let result = guard.try_io(|socket| {
                send(socket.get_ref().as_fd(), bytes, SendFlags::NOSIGNAL).map_err(io::Error::from)
            });
            match result {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_not_ready) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(&self.socket, Shutdown::Write).map_err(io::Error::from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SocketFlags, SocketType, socketpair};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn the_end_of_the_connection_is_told() {
        let (ours, theirs) = socketpair(
            rustix::net::AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        let mut connection = Connection {
            socket: watch(ours, BOTH).unwrap(),
            ended: Arc::new(Notify::new()),
        };
        let ended = connection.ended();
        connection.write_all(b"out").await.unwrap();
        let mut read = [0; 8];
        assert_eq!(rustix::io::read(&theirs, &mut read).unwrap(), 3);
        rustix::io::write(&theirs, b"in").unwrap();
        assert_eq!(connection.read(&mut read).await.unwrap(), 2);
        let early = timeout(Duration::from_millis(20), ended.notified()).await;
        assert!(early.is_err(), "still open");
        drop(theirs);
        assert_eq!(connection.read(&mut read).await.unwrap(), 0);
        timeout(Duration::from_secs(1), ended.notified())
            .await
            .expect("told");
    }
}
