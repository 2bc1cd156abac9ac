//! Moves bytes between a vsock stream and a pipe or terminal. Takes no more from one side than the
//! other takes.
//!
//! Spawned by `stdio`, one task for each stream. Between pipe and stream the kernel moves the pages
//! (splice(2)): the agent never sees the bytes. A terminal can't be spliced to a socket, so its
//! output passes a buffer here.
//!
//! Invariants: stdin ends for the process only after its last byte has been written. `carried` is
//! exact when the process has gone: what it wrote is either counted or still in the pipe or
//! terminal. A host that stops reading loses the rest but never blocks the process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kata_like_linux::lock;
use kata_like_linux::watch::Watched;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::pipe::{SpliceFlags, splice};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use tokio::io::Interest;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::readiness::{when_ready, write_all};
use crate::stdio::port::{Expected, Socket};

/// How long after the exit of a process its output waits for a host that has not dialled.
const LINGER: Duration = Duration::from_secs(30);

/// How much we ask of one splice: more than a pipe holds.
const CHUNK: usize = 1 << 20;

/// How much of a terminal's output we read at once, and at most when its process has gone: all that
/// Linux keeps (drivers/tty/tty_buffer.c, TTYB_DEFAULT_MEM_LIMIT), with room.
const TERMINAL_CHUNK: usize = 16 << 10;
const TERMINAL_REST: usize = 256 << 10;

/// How long the host may take to close a stream after its last byte.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// Our end of a process's standard output or error.
pub struct PipeOutput {
    pipe: Watched<OwnedFd>,
    sent: Mutex<u64>,
}

impl PipeOutput {
    pub fn new(pipe: Watched<OwnedFd>) -> Self {
        Self {
            pipe,
            sent: Mutex::new(0),
        }
    }

    /// Counts the bytes that have been written to the pipe.
    pub fn carried(&self) -> u64 {
        let sent = lock(&self.sent);
        // A pipe always answers. If it did not, what we have sent would be the best we know.
        sent.saturating_add(ioctl_fionread(&self.pipe).unwrap_or(0))
    }

    /// Moves what is there into the stream, or nowhere. 0: the pipe has ended.
    fn send(&self, socket: Option<&Socket>) -> rustix::io::Result<usize> {
        let mut sent = lock(&self.sent);
        let moved = match socket {
            Some(socket) => move_pages(&self.pipe, socket)?,
            None => rustix::io::read(&self.pipe, &mut [0; TERMINAL_CHUNK])?,
        };
        *sent = sent.saturating_add(moved as u64);
        Ok(moved)
    }
}

/// Our end of a process's terminal.
pub struct Terminal {
    master: Watched<OwnedFd>,
    /// The other end, until the process has gone. Some processes close all that they have of it and
    /// open it again later, and in between the terminal has not ended.
    slave: Mutex<Option<OwnedFd>>,
    output: Mutex<Buffer>,
    hung_up: Notify,
}

/// Bytes that are read from a terminal and not yet sent.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    sent: u64,
}

impl Buffer {
    fn pending(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    fn took(&mut self, count: usize) {
        self.start += count;
        self.sent = self.sent.saturating_add(count as u64);
        if self.pending().is_empty() {
            self.bytes.clear();
            self.bytes.shrink_to(TERMINAL_CHUNK);
            self.start = 0;
        }
    }

    fn read(&mut self, master: &Watched<OwnedFd>) -> rustix::io::Result<usize> {
        let end = self.bytes.len();
        self.bytes.resize(end + TERMINAL_CHUNK, 0);
        let result = match self.bytes.get_mut(end..) {
            Some(room) => rustix::io::read(master, room),
            None => Ok(0),
        };
        self.bytes.truncate(end + result.unwrap_or(0));
        result
    }
}

impl Terminal {
    /// Takes the master's end of a terminal, which does not block.
    pub fn new(master: Watched<OwnedFd>) -> rustix::io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        Ok(Self {
            master,
            slave: Mutex::new(Some(slave)),
            output: Mutex::default(),
            hung_up: Notify::new(),
        })
    }

    /// Notes that the process has gone: the terminal ends with the last who still has it open.
    pub fn release(&self) {
        *lock(&self.slave) = None;
    }

    /// The master's end.
    pub fn master(&self) -> &Watched<OwnedFd> {
        &self.master
    }

    /// Counts the bytes that have come out of the terminal. Takes what it holds first: only a read
    /// makes the kernel hand over what is on its way (n_tty_read, tty_buffer_flush_work).
    pub fn carried(&self) -> u64 {
        let mut output = lock(&self.output);
        while output.pending().len() < TERMINAL_REST {
            match output.read(&self.master) {
                Ok(1..) | Err(Errno::INTR) => {}
                Ok(0) | Err(_) => break,
            }
        }
        output.sent.saturating_add(output.pending().len() as u64)
    }

    /// Reads on if all is sent. 0: the terminal has ended, since all who had it open are gone.
    fn fill(&self) -> rustix::io::Result<usize> {
        let mut output = lock(&self.output);
        match output.pending().len() {
            0 => output.read(&self.master),
            pending => Ok(pending),
        }
    }

    fn send(&self, socket: Option<&Socket>) -> rustix::io::Result<usize> {
        let mut output = lock(&self.output);
        let sent = match socket {
            Some(socket) => send(socket, output.pending(), SendFlags::NOSIGNAL)?,
            None => output.pending().len(),
        };
        output.took(sent);
        Ok(sent)
    }

    fn is_sent(&self) -> bool {
        lock(&self.output).pending().is_empty()
    }
}

/// Moves the host's bytes into the process's stdin.
pub async fn into_pipe(mut expected: Expected, pipe: Watched<OwnedFd>) {
    let socket = tokio::select! {
        socket = expected.dialled() => socket,
        () = reader_gone(&pipe) => return,
    };
    if let Err(error) = fill_pipe(&socket, &pipe).await {
        log::warn!("move a stream into a process's stdin: {error}");
    }
    // Both are closed here. The process sees the end of its stdin after the last byte. If it was
    // the process that left, the host sees that nobody reads.
}

async fn fill_pipe(socket: &Socket, pipe: &Watched<OwnedFd>) -> io::Result<()> {
    loop {
        let mut readable = tokio::select! {
            readable = socket.readable() => readable?,
            () = reader_gone(pipe) => return Ok(()),
        };
        let mut writable = pipe.writable().await?;
        match move_pages(socket, pipe) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let (can_read, can_write) = ready(socket, pipe)?;
                if !can_read {
                    readable.clear_ready();
                }
                if !can_write {
                    writable.clear_ready();
                }
            }
            // The process has closed its stdin.
            Err(Errno::PIPE) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until nobody can read from the pipe any more.
async fn reader_gone(pipe: &Watched<OwnedFd>) {
    loop {
        let Ok(mut guard) = pipe.ready(Interest::ERROR).await else {
            return;
        };
        let mut polled = [PollFd::new(pipe, PollFlags::empty())];
        let gone = poll(&mut polled, Some(&Timespec::default()));
        if gone.is_ok()
            && polled
                .iter()
                .any(|it| it.revents().contains(PollFlags::ERR))
        {
            return;
        }
        guard.clear_ready();
    }
}

/// Moves the process's output to the host, until all who could write have gone.
pub async fn out_of_pipe(
    output: Arc<PipeOutput>,
    expected: Expected,
    exited: watch::Receiver<bool>,
) {
    if let Some(socket) = dialled(expected, exited).await
        && drain_pipe(&output, Some(&socket)).await.is_ok()
    {
        return close(&socket).await;
    }
    // The host does not read, or no longer. The pipe can't fail by itself.
    let _ = drain_pipe(&output, None).await;
}

async fn drain_pipe(output: &PipeOutput, socket: Option<&Socket>) -> io::Result<()> {
    loop {
        let mut readable = output.pipe.readable().await?;
        let mut writable = match socket {
            Some(socket) => Some((socket, socket.writable().await?)),
            None => None,
        };
        match output.send(socket) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match &mut writable {
                Some((socket, writable)) => {
                    let (can_read, can_write) = ready(&output.pipe, socket)?;
                    if !can_read {
                        readable.clear_ready();
                    }
                    if !can_write {
                        writable.clear_ready();
                    }
                }
                None => readable.clear_ready(),
            },
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Moves the terminal's output to the host, or nowhere if it is not wanted.
pub async fn out_of_terminal(
    terminal: Arc<Terminal>,
    expected: Option<Expected>,
    exited: watch::Receiver<bool>,
) {
    let socket = match expected {
        Some(expected) => dialled(expected, exited).await,
        None => None,
    };
    let sent = drain_terminal(&terminal, socket.as_ref()).await;
    if sent.is_err() {
        // The host has stopped reading. The process may go on writing.
        let _ = drain_terminal(&terminal, None).await;
    }
    terminal.hung_up.notify_one();
    if let Some(socket) = socket {
        close(&socket).await;
    }
}

async fn drain_terminal(terminal: &Terminal, socket: Option<&Socket>) -> io::Result<()> {
    loop {
        if terminal.is_sent() {
            let mut readable = terminal.master.readable().await?;
            match terminal.fill() {
                // EIO is a terminal's end (tty_ioctl(4)).
                Ok(0) | Err(Errno::IO) => return Ok(()),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    readable.clear_ready();
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        let Some(socket) = socket else {
            let _ = terminal.send(None);
            continue;
        };
        let mut writable = socket.writable().await?;
        match terminal.send(Some(socket)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => writable.clear_ready(),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Moves the host's bytes into the terminal. Their end does not end the terminal: its input has no
/// end but the character for it.
pub async fn into_terminal(mut expected: Expected, terminal: Arc<Terminal>) {
    let typing = async {
        let socket = expected.dialled().await;
        let mut keys = [0; 4096];
        loop {
            let count = receive(&socket, &mut keys).await?;
            match keys.get(..count) {
                Some(keys) if count > 0 => write_all(&terminal.master, keys).await?,
                _ => return io::Result::Ok(()),
            }
        }
    };
    tokio::select! {
        result = typing => match result {
            // EIO: everybody has closed it.
            Err(error) if error.raw_os_error() != Some(libc::EIO) => {
                log::warn!("move a stream into a process's terminal: {error}");
            }
            _ => {}
        },
        () = terminal.hung_up.notified() => {}
    }
}

/// Waits for the host's dial, until the process has been gone for `LINGER`.
async fn dialled(mut expected: Expected, mut exited: watch::Receiver<bool>) -> Option<Socket> {
    let given_up = async {
        if exited.wait_for(|exited| *exited).await.is_ok() {
            sleep(LINGER).await;
        }
    };
    tokio::select! {
        socket = expected.dialled() => Some(socket),
        () = given_up => None,
    }
}

/// Says that the last byte has been sent, and gives the host the time to read it all.
async fn close(socket: &Socket) {
    if shutdown(socket, Shutdown::Write).is_err() {
        return;
    }
    let mut nothing = [0; 64];
    let _ = timeout(CLOSE_DEADLINE, async {
        while receive(socket, &mut nothing)
            .await
            .is_ok_and(|count| count > 0)
        {}
    })
    .await;
}

async fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    let receive = |socket: &OwnedFd| recv(socket, &mut *buffer, RecvFlags::empty());
    let (count, _) = when_ready(socket, Interest::READABLE, receive).await?;
    Ok(count)
}

/// Moves what is there between a pipe and a socket, without waiting for either.
fn move_pages(from: &Watched<OwnedFd>, to: &Watched<OwnedFd>) -> rustix::io::Result<usize> {
    splice(
        from,
        None,
        to,
        None,
        CHUNK,
        SpliceFlags::NONBLOCK | SpliceFlags::MOVE,
    )
}

/// Which side of a splice was not ready: EAGAIN does not say.
fn ready(from: &Watched<OwnedFd>, to: &Watched<OwnedFd>) -> io::Result<(bool, bool)> {
    let mut polled = [
        PollFd::new(from, PollFlags::IN),
        PollFd::new(to, PollFlags::OUT),
    ];
    poll(&mut polled, Some(&Timespec::default()))?;
    let [from, to] = polled.each_ref().map(|it| !it.revents().is_empty());
    Ok((from, to))
}
