//! The stream port: the host dials it for each standard stream, and a token says which one.
//!
//! Called by `main` (to bind it before anything else can) and by `stdio::prepare` (to expect a
//! token). The host may dial before the call that names the token: then the stream is parked for a
//! while. Only the host is listened to. A container can connect to this port over vsock, but as a
//! peer of this machine, and it cannot guess a token (128 random bits).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kata_like_agent_protocol::{STREAM_PORT, TOKEN_LENGTH};
use kata_like_failure::Failure;
use kata_like_linux::lock;
use kata_like_linux::watch::Watched;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, getpeername, listen, socket,
};
use rustix::net::{SocketFlags, accept_with};
use tokio::io::Interest;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use crate::readiness::{BOTH, read_exact, watch, when_ready};

/// The token that opens a stream.
pub type Token = [u8; TOKEN_LENGTH];

/// A connected stream socket.
pub type Socket = Watched<OwnedFd>;

/// How long a new connection may take to send its token, and how many may be doing so.
const TOKEN_DEADLINE: Duration = Duration::from_secs(10);
const GREETING: usize = 128;

/// How long a stream is parked whose token nobody expects yet, and how many are.
const PARKED_FOR: Duration = Duration::from_secs(30);
const PARKED: usize = 128;

/// Why the port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("open vsock port {STREAM_PORT} for streams: {step}")]
pub struct PortError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// The port, bound and listening.
pub struct StreamPort {
    listener: Watched<OwnedFd>,
}

impl StreamPort {
    /// Binds the port.
    pub fn open() -> Result<Self, PortError> {
        let failed = |step| move |source: io::Error| PortError { step, source };
        let fd = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .map_err(|errno| failed("make a socket")(errno.into()))?;
        let address = VsockAddr::new(libc::VMADDR_CID_ANY, STREAM_PORT);
        bind(fd.as_raw_fd(), &address).map_err(|errno| failed("bind")(errno.into()))?;
        // All streams of many processes can come at once.
        let backlog = Backlog::new(1024).unwrap_or(Backlog::MAXCONN);
        listen(&fd, backlog).map_err(|errno| failed("listen")(errno.into()))?;
        let listener = watch(fd, Interest::READABLE).map_err(failed("watch"))?;
        Ok(Self { listener })
    }

    /// Takes connections from now on. Returns the table of expected tokens.
    pub fn serve(self) -> Arc<Tokens> {
        let tokens = Arc::new(Tokens::default());
        tokio::spawn(take_connections(self.listener, tokens.clone()));
        tokens
    }
}

async fn take_connections(listener: Watched<OwnedFd>, tokens: Arc<Tokens>) {
    let greeting = Arc::new(Semaphore::new(GREETING));
    loop {
        // The semaphore is never closed, so this is always a permit.
        let permit = greeting.clone().acquire_owned().await;
        let socket = match accept(&listener).await {
            Ok(Some(socket)) => socket,
            Ok(None) => continue,
            Err(error) => {
                // After a lack of files or memory: the next try may find some again.
                log::warn!("take a stream on vsock port {STREAM_PORT}: {error}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let tokens = tokens.clone();
        tokio::spawn(async move {
            let _permit = permit;
            match timeout(TOKEN_DEADLINE, read_token(&socket)).await {
                Ok(Ok(token)) => tokens.arrived(token, socket, Instant::now()),
                Ok(Err(error)) => log::warn!("take a stream: read its token: {error}"),
                Err(_) => log::warn!("take a stream: no token after {TOKEN_DEADLINE:?}"),
            }
        });
    }
}

/// Takes the next connection, if it is the host's.
async fn accept(listener: &Watched<OwnedFd>) -> io::Result<Option<Socket>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let accept = |listener: &OwnedFd| accept_with(listener, flags);
    let fd = when_ready(listener, Interest::READABLE, accept).await?;
    let peer: VsockAddr = getpeername(fd.as_raw_fd())?;
    if peer.cid() != libc::VMADDR_CID_HOST {
        log::warn!(
            "refuse a stream from vsock CID {}: not the host",
            peer.cid()
        );
        return Ok(None);
    }
    Ok(Some(watch(fd, BOTH)?))
}

/// Reads the token, and no byte of what follows it.
async fn read_token(socket: &Socket) -> io::Result<Token> {
    let mut token = [0; TOKEN_LENGTH];
    read_exact(socket, &mut token).await?;
    Ok(token)
}

/// Who waits for which token, and which streams wait for somebody.
#[derive(Default)]
pub struct Tokens {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    expected: HashMap<Token, oneshot::Sender<Socket>>,
    parked: VecDeque<(Instant, Token, Socket)>,
}

impl Tokens {
    /// Expects a stream with this token, until the result is dropped.
    pub fn expect(self: &Arc<Self>, token: Token) -> Result<Expected, Failure> {
        let (arrive, arrived) = oneshot::channel();
        let mut table = self.table();
        table.forget(Instant::now());
        if table.expected.contains_key(&token) {
            return Err(Failure::bad("streams", "a token is used twice"));
        }
        match table.parked.iter().position(|parked| parked.1 == token) {
            Some(index) => {
                if let Some((_, _, socket)) = table.parked.remove(index) {
                    // The receiver is still here.
                    let _ = arrive.send(socket);
                }
            }
            None => {
                table.expected.insert(token, arrive);
            }
        }
        drop(table);
        Ok(Expected {
            tokens: self.clone(),
            token,
            arrived,
        })
    }

    fn arrived(&self, token: Token, socket: Socket, now: Instant) {
        let mut table = self.table();
        table.forget(now);
        match table.expected.remove(&token) {
            // If the receiver was dropped meanwhile, the stream is closed.
            Some(arrive) => drop(arrive.send(socket)),
            None => table.parked.push_back((now, token, socket)),
        }
    }

    /// Hands in a stream, for tests without vsock.
    #[cfg(test)]
    pub fn park(&self, token: Token, socket: Socket) {
        self.arrived(token, socket, Instant::now());
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Held for single operations only. None of them leaves it half done.
        lock(&self.table)
    }
}

impl Table {
    /// Closes what has been parked for too long, and the oldest if there are too many.
    fn forget(&mut self, now: Instant) {
        while let Some((since, _, _)) = self.parked.front() {
            let old = now.saturating_duration_since(*since) > PARKED_FOR;
            if !old && self.parked.len() < PARKED {
                break;
            }
            self.parked.pop_front();
        }
    }
}

/// A stream that the host will dial. When this is dropped before, the token is unknown again.
pub struct Expected {
    tokens: Arc<Tokens>,
    token: Token,
    arrived: oneshot::Receiver<Socket>,
}

impl Expected {
    /// Waits for the stream. Cancelling loses nothing.
    pub async fn dialled(&mut self) -> Socket {
        match (&mut self.arrived).await {
            Ok(socket) => socket,
            // The sender leaves the table only with a stream or with `self`.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.arrived.close();
        let mut table = self.tokens.table();
        // Removes our own entry only: the token could be expected anew since its stream arrived.
        if table
            .expected
            .get(&self.token)
            .is_some_and(oneshot::Sender::is_closed)
        {
            table.expected.remove(&self.token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvFlags, SocketFlags, SocketType, recv, socketpair};

    fn pair() -> (Socket, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let family = rustix::net::AddressFamily::UNIX;
        let (ours, theirs) = socketpair(family, SocketType::STREAM, flags, None).unwrap();
        (watch(ours, BOTH).unwrap(), theirs)
    }

    fn open(socket: &OwnedFd) -> bool {
        let mut byte = [0];
        recv(socket, &mut byte, RecvFlags::empty()) == Err(rustix::io::Errno::AGAIN)
    }

    #[tokio::test]
    async fn a_token_finds_its_stream_whoever_comes_first() {
        let tokens = Arc::new(Tokens::default());
        let (early, late) = ([1; 16], [2; 16]);
        let (first, _first) = pair();
        let (second, _second) = pair();
        let (first_fd, second_fd) = (first.as_raw_fd(), second.as_raw_fd());
        tokens.arrived(early, first, Instant::now());
        let mut early = tokens.expect(early).unwrap();
        let mut later = tokens.expect(late).unwrap();
        tokens.arrived(late, second, Instant::now());
        assert_eq!(early.dialled().await.as_raw_fd(), first_fd);
        assert_eq!(later.dialled().await.as_raw_fd(), second_fd);
    }

    #[tokio::test]
    async fn an_unknown_token_is_closed_in_the_end_and_never_paired() {
        let tokens = Arc::new(Tokens::default());
        let (socket, theirs) = pair();
        let start = Instant::now();
        tokens.arrived([9; 16], socket, start);
        let mut other = tokens.expect([1; 16]).unwrap();
        assert!(
            timeout(Duration::from_millis(20), other.dialled())
                .await
                .is_err()
        );
        assert!(open(&theirs));
        let (another, _another) = pair();
        tokens.arrived(
            [8; 16],
            another,
            start + PARKED_FOR + Duration::from_secs(1),
        );
        assert!(!open(&theirs));
    }

    #[tokio::test]
    async fn parked_streams_are_bounded() {
        let tokens = Arc::new(Tokens::default());
        let mut theirs = Vec::new();
        for index in 0..PARKED + 5 {
            let (socket, their) = pair();
            let mut token = [0; 16];
            token[..8].copy_from_slice(&index.to_le_bytes());
            tokens.arrived(token, socket, Instant::now());
            theirs.push(their);
        }
        assert_eq!(theirs.iter().filter(|socket| open(socket)).count(), PARKED);
    }

    #[tokio::test]
    async fn a_token_is_expected_once_and_not_after_it_is_given_up() {
        let tokens = Arc::new(Tokens::default());
        let expected = tokens.expect([1; 16]).unwrap();
        assert!(tokens.expect([1; 16]).is_err());
        drop(expected);
        assert!(tokens.table().expected.is_empty());
        assert!(tokens.expect([1; 16]).is_ok());
    }

    #[tokio::test]
    async fn the_bytes_after_a_token_are_left_in_the_stream() {
        let (socket, theirs) = pair();
        rustix::io::write(&theirs, &[7; 10]).unwrap();
        let reading = tokio::spawn(async move { (read_token(&socket).await, socket) });
        tokio::task::yield_now().await;
        rustix::io::write(&theirs, &[[7; 6].as_slice(), b"rest"].concat()).unwrap();
        let (token, socket) = reading.await.unwrap();
        assert_eq!(token.unwrap(), [7; 16]);
        let mut rest = [0; 16];
        let (count, _) = recv(socket.get_ref(), &mut rest, RecvFlags::empty()).unwrap();
        assert_eq!(&rest[..count], b"rest");
    }

    #[tokio::test]
    async fn half_a_token_is_no_token() {
        let (socket, theirs) = pair();
        rustix::io::write(&theirs, &[7; 10]).unwrap();
        drop(theirs);
        assert!(read_token(&socket).await.is_err());
    }
}
