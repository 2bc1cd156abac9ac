//! containerd's ends of a process's standard streams, joined to the guest's.
//!
//! Called by `pod`: [`Stdio::open`] before the process exists, so that a wrong path fails early;
//! [`Stdio::attach`] with the guest's streams; [`Stdio::drained`] before its exit is told;
//! [`Stdio::close`] when it is deleted. Where a stream goes is as under runc's shim: the path of a
//! FIFO or of a file, `file://PATH`, `binary://PATH?k=v` (see `logger`), or nothing.
//!
//! What must hold:
//! - A FIFO is opened for reading and writing, so that a reader that leaves gives no EPIPE and one
//!   that comes back goes on reading. It is closed when the guest's stream has ended: only then
//!   does the reader see end-of-file.
//! - `CloseIO` closes our own write end of the stdin FIFO, no more: the stream ends when the
//!   client's end is closed too, and what is under way still arrives.
//! - A reader that stalls delays its own bytes and nothing else.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::logger::Logger;
use crate::uri;

/// How much is moved at once: what a pipe holds.
const CHUNK: usize = 64 << 10;
/// How long an exit waits for a reader that takes nothing.
const STALLED_READER: Duration = Duration::from_millis(400);
/// How long an exit waits for bytes that the guest has announced and does not send.
const STALLED_GUEST: Duration = Duration::from_secs(5);
/// How long an exit, or a deletion, waits for output in all.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// How long the streams of a lost guest may take to end.
const LOST_DEADLINE: Duration = Duration::from_millis(300);

/// Where containerd wants a process's streams; an empty text is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// A FIFO that is read, or a file.
    pub stdin: String,
    /// Where standard output goes.
    pub stdout: String,
    /// Where standard error goes; unused with a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// Where bytes of the guest are written to.
#[derive(Debug)]
enum Sink {
    Pipe(pipe::Sender),
    File(tokio::fs::File),
}

impl Sink {
    /// Writes the beginning of what is given, as much as there is room for. Answers how much.
    async fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.write(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                file.flush().await?;
                Ok(bytes.len())
            }
        }
    }
}

/// Where a process's input is read from.
#[derive(Debug)]
enum Source {
    Pipe(pipe::Receiver),
    File(tokio::fs::File),
}

impl Source {
    async fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(into).await,
            Self::File(file) => file.read(into).await,
        }
    }
}

/// How far an output stream has come.
#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    /// Bytes that the reader's side has taken.
    written: u64,
    /// A write to the reader's side is under way.
    writing: bool,
    /// Nothing more will come.
    ended: bool,
}

/// containerd's ends of the three streams, and what moves bytes between them and the guest's.
#[derive(Debug)]
pub struct Stdio {
    has_stdin: bool,
    has_stdout: bool,
    has_stderr: bool,
    ends: Mutex<Ends>,
    stdout: watch::Sender<Flow>,
    stderr: watch::Sender<Flow>,
}

#[derive(Debug, Default)]
struct Ends {
    stdin: Option<Source>,
    /// Our own write end, which keeps stdin open while clients come and go.
    stdin_keeper: Option<pipe::Sender>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
    input: Option<AbortHandle>,
    outputs: Vec<AbortHandle>,
}

impl Stdio {
    /// Opens containerd's ends. `namespace` and `container` are told to a logging program.
    pub async fn open(
        paths: &StdioPaths,
        namespace: &str,
        container: &str,
    ) -> Result<Self, Failure> {
        let mut ends = Ends::default();
        if !paths.stdin.is_empty() {
            let path = Path::new(&paths.stdin);
            let (source, keeper) = open_source(path)
                .await
                .map_err(open_failed("stdin", path))?;
            ends.stdin = Some(source);
            ends.stdin_keeper = keeper;
        }
        let wants_stderr = !paths.terminal && !paths.stderr.is_empty();
        match paths.stdout.split_once("://") {
            Some(("binary", _)) => {
                let (logger, stdout, stderr) =
                    Logger::start(&paths.stdout, namespace, container).await?;
                let failed = open_failed("stdout", Path::new(&paths.stdout));
                ends.stdout = Some(sender(stdout).map_err(&failed)?);
                if !paths.terminal {
                    ends.stderr = Some(sender(stderr).map_err(failed)?);
                }
                ends.logger = Some(logger);
            }
            Some(("file", _)) => {
                let parsed = uri::parse(&paths.stdout, "file");
                let (path, _) = parsed
                    .ok_or_else(|| bad_stdout(format!("no absolute path in {:?}", paths.stdout)))?;
                let file = open_log_file(&path).await?;
                if !paths.terminal {
                    let second = file
                        .try_clone()
                        .await
                        .map_err(open_failed("stderr", &path))?;
                    ends.stderr = Some(Sink::File(second));
                }
                ends.stdout = Some(Sink::File(file));
            }
            Some(("fifo", path)) => ends.stdout = Some(open_sink("stdout", path).await?),
            Some((scheme, _)) => {
                return Err(bad_stdout(format!(
                    "unknown scheme {scheme:?} in {:?}",
                    paths.stdout
                )));
            }
            None if paths.stdout.is_empty() => {}
            None => ends.stdout = Some(open_sink("stdout", &paths.stdout).await?),
        }
        if wants_stderr && ends.stderr.is_none() {
            let path = paths
                .stderr
                .strip_prefix("fifo://")
                .unwrap_or(&paths.stderr);
            ends.stderr = Some(open_sink("stderr", path).await?);
        }
        Ok(Self {
            has_stdin: ends.stdin.is_some(),
            has_stdout: ends.stdout.is_some(),
            has_stderr: ends.stderr.is_some(),
            stdout: watch::Sender::new(Flow {
                ended: ends.stdout.is_none(),
                ..Flow::default()
            }),
            stderr: watch::Sender::new(Flow {
                ended: ends.stderr.is_none(),
                ..Flow::default()
            }),
            ends: Mutex::new(ends),
        })
    }

    /// Whether the process gets a standard input.
    pub fn has_stdin(&self) -> bool {
        self.has_stdin
    }

    /// Whether anybody wants the standard output.
    pub fn has_stdout(&self) -> bool {
        self.has_stdout
    }

    /// Whether anybody wants the standard error.
    pub fn has_stderr(&self) -> bool {
        self.has_stderr
    }

    /// Joins the guest's streams to containerd's; each is there exactly if it was asked for.
    pub fn attach(
        &self,
        stdin: Option<UnixStream>,
        stdout: Option<UnixStream>,
        stderr: Option<UnixStream>,
    ) {
        let mut ends = self.ends();
        if let (Some(from), Some(to)) = (ends.stdin.take(), stdin) {
            ends.input = Some(tokio::spawn(pump_in(from, to)).abort_handle());
        }
        let outputs = [
            (ends.stdout.take(), stdout, &self.stdout),
            (ends.stderr.take(), stderr, &self.stderr),
        ];
        for (to, from, flow) in outputs {
            if let (Some(to), Some(from)) = (to, from) {
                let pump = tokio::spawn(pump_out(from, to, flow.clone()));
                ends.outputs.push(pump.abort_handle());
            }
        }
    }

    /// Closes our own write end of stdin: it ends when the client closes its own.
    pub fn close_stdin(&self) {
        self.ends().stdin_keeper = None;
    }

    /// The process is gone: nothing reads its input any more.
    pub fn end_input(&self) {
        let mut ends = self.ends();
        ends.stdin = None;
        ends.stdin_keeper = None;
        if let Some(input) = ends.input.take() {
            input.abort();
        }
    }

    /// Waits until the reader's side has taken so many bytes of each stream, as long as there is
    /// progress. Whether it has.
    pub async fn drained(&self, stdout_bytes: u64, stderr_bytes: u64) -> bool {
        let (stdout, stderr) = tokio::join!(
            reached(self.stdout.subscribe(), stdout_bytes),
            reached(self.stderr.subscribe(), stderr_bytes),
        );
        stdout && stderr
    }

    /// The guest is gone: what it sent is still written, for a moment.
    pub async fn lost(&self) {
        self.ended_within(LOST_DEADLINE).await;
    }

    /// Waits for the streams' ends as long as their reader takes something, `patience` at a time,
    /// then closes what is still open: the reader sees end-of-file.
    pub async fn close(&self, patience: Duration) {
        tokio::join!(
            settled(self.stdout.subscribe(), patience),
            settled(self.stderr.subscribe(), patience),
        );
        self.end_input();
        let (outputs, logger) = {
            let mut ends = self.ends();
            ends.stdout = None;
            ends.stderr = None;
            (std::mem::take(&mut ends.outputs), ends.logger.take())
        };
        for output in outputs {
            output.abort();
        }
        if let Some(logger) = logger {
            logger.end();
        }
    }

    async fn ended_within(&self, patience: Duration) {
        let both = async {
            ended(&self.stdout).await;
            ended(&self.stderr).await;
        };
        let _ = tokio::time::timeout(patience, both).await;
    }

    fn ends(&self) -> std::sync::MutexGuard<'_, Ends> {
        lock(&self.ends)
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        let ends = self.ends();
        for pump in ends.outputs.iter().chain(&ends.input) {
            pump.abort();
        }
    }
}

async fn pump_in(mut from: Source, mut to: UnixStream) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) => break,
            Ok(length) => {
                let Some(bytes) = chunk.get(..length) else {
                    break;
                };
                // The guest's end is gone: the process has closed its input.
                if to.write_all(bytes).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "read a process's stdin");
                break;
            }
        }
    }
    let _ = to.shutdown().await;
}

async fn pump_out(mut from: UnixStream, mut to: Sink, flow: watch::Sender<Flow>) {
    let mut chunk = vec![0; CHUNK];
    // A read error is the guest's end, too: its VM is gone.
    'stream: while let Ok(length @ 1..) = from.read(&mut chunk).await {
        let mut rest = chunk.get(..length).unwrap_or_default();
        flow.send_modify(|flow| flow.writing = true);
        while !rest.is_empty() {
            let written = match to.write(rest).await {
                Ok(written @ 1..) => written,
                Ok(0) => break 'stream,
                Err(error) => {
                    tracing::warn!(%error, "write a process's output");
                    break 'stream;
                }
            };
            rest = rest.get(written..).unwrap_or_default();
            // Each piece is told: a slow reader is no stalled one.
            flow.send_modify(|flow| {
                flow.written += written as u64;
                flow.writing = !rest.is_empty();
            });
        }
    }
    drop(to);
    flow.send_modify(|flow| flow.ended = true);
}

async fn reached(mut flow: watch::Receiver<Flow>, wanted: u64) -> bool {
    let deadline = Instant::now() + DRAIN_DEADLINE;
    loop {
        let now = *flow.borrow_and_update();
        if now.ended || now.written >= wanted {
            return true;
        }
        let patience = if now.writing {
            STALLED_READER
        } else {
            STALLED_GUEST
        };
        let until = deadline.min(Instant::now() + patience);
        match tokio::time::timeout_at(until, flow.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return true,
            Err(_) => return false,
        }
    }
}

/// Waits for a stream's end as long as something moves.
async fn settled(mut flow: watch::Receiver<Flow>, patience: Duration) {
    let deadline = Instant::now() + DRAIN_DEADLINE;
    while !flow.borrow_and_update().ended {
        let until = deadline.min(Instant::now() + patience);
        if !matches!(
            tokio::time::timeout_at(until, flow.changed()).await,
            Ok(Ok(()))
        ) {
            return;
        }
    }
}

async fn ended(flow: &watch::Sender<Flow>) {
    // The sender lives: the wait can't fail.
    let _ = flow.subscribe().wait_for(|flow| flow.ended).await;
}

/// A FIFO with our own write end, or a regular file: a device could hold a reading thread for ever.
async fn open_source(path: &Path) -> io::Result<(Source, Option<pipe::Sender>)> {
    match pipe::OpenOptions::new().open_receiver(path) {
        Ok(pipe) => {
            let keeper = pipe::OpenOptions::new().open_sender(path)?;
            Ok((Source::Pipe(pipe), Some(keeper)))
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            match tokio::fs::metadata(path).await?.is_file() {
                true => Ok((Source::File(tokio::fs::File::open(path).await?), None)),
                false => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

/// A FIFO for reading and writing, or any other file for appending.
async fn open_sink(stream: &'static str, path: &str) -> Result<Sink, Failure> {
    let path = Path::new(path);
    match pipe::OpenOptions::new().read_write(true).open_sender(path) {
        Ok(pipe) => Ok(Sink::Pipe(pipe)),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            let mut options = tokio::fs::OpenOptions::new();
            options
                .append(true)
                .open(path)
                .await
                .map(Sink::File)
                .map_err(open_failed(stream, path))
        }
        Err(error) => Err(open_failed(stream, path)(error)),
    }
}

async fn open_log_file(path: &Path) -> Result<tokio::fs::File, Failure> {
    let open = async {
        if let Some(parent) = path.parent() {
            tokio::fs::create_dir_all(parent).await?;
        }
        let mut options = tokio::fs::OpenOptions::new();
        options
            .append(true)
            .create(true)
            .mode(0o644)
            .open(path)
            .await
    };
    open.await.map_err(open_failed("stdout", path))
}

fn sender(fd: OwnedFd) -> io::Result<Sink> {
    pipe::Sender::from_owned_fd(fd).map(Sink::Pipe)
}

fn open_failed(stream: &'static str, path: &Path) -> impl Fn(io::Error) -> Failure {
    let step = format!("open {stream} of the process, {}", path.display());
    move |source| Failure::failed(step.clone(), source)
}

fn bad_stdout(why: String) -> Failure {
    Failure::new(Kind::Failed, format!("open stdout of the process: {why}"))
}

#[cfg(test)]
mod tests;
