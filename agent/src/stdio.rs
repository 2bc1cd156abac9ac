//! The standard streams of a process: pipes or a terminal inside, vsock streams to the host.
//!
//! Called by `container/`: `prepare` before the process exists, `connect` when it does. The pipe or
//! terminal keeps what the process writes until the host has dialled. When the process ends, the
//! bytes that it has written are counted at once, so that the host knows how many to expect; they
//! go on flowing. A child that keeps a stream open delays nobody's exit.

pub mod port;
mod pump;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kata_like_failure::{Failure, Step};
use rustix::io::ioctl_fionbio;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::readiness::{BOTH, watch};
use crate::runner::Stdio;
use crate::stdio::port::{Expected, Token, Tokens};
use crate::stdio::pump::{PipeOutput, Terminal};

/// The streams that the host wants of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The tokens of stdin, stdout and stderr. `None`: no such stream.
    pub tokens: [Option<Token>; 3],
    /// The first size of the terminal, if there is one.
    pub terminal: Option<(u16, u16)>,
}

/// Our half of the streams of a process that does not run yet.
pub struct Plan {
    expected: [Option<Expected>; 3],
    input: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
}

/// Registers the tokens and makes the process's half.
pub fn prepare(tokens: &Arc<Tokens>, wanted: &Wanted) -> Result<(Stdio, Plan), Failure> {
    let [stdin, stdout, stderr] = wanted.tokens;
    let expect = |token: Option<Token>| token.map(|token| tokens.expect(token)).transpose();
    let mut plan = Plan {
        expected: [expect(stdin)?, expect(stdout)?, expect(stderr)?],
        input: None,
        outputs: [None, None],
    };
    if let Some((width, height)) = wanted.terminal {
        return Ok((Stdio::Terminal { width, height }, plan));
    }
    let failed = |result: io::Result<_>| result.step(|| "make the process's standard streams");
    let (stdin, input) = failed(inlet(stdin.is_some()))?;
    let (stdout, output) = failed(outlet(stdout.is_some()))?;
    let (stderr, error) = failed(outlet(stderr.is_some()))?;
    plan.input = input;
    plan.outputs = [output, error];
    Ok((
        Stdio::Streams {
            stdin,
            stdout,
            stderr,
        },
        plan,
    ))
}

/// Makes a stdin: the process's end, and ours.
fn inlet(wanted: bool) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    if !wanted {
        return Ok((null()?, None));
    }
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
    ioctl_fionbio(&ours, true)?;
    Ok((theirs, Some(ours)))
}

/// Makes a stdout or stderr: the process's end, and ours.
fn outlet(wanted: bool) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    if !wanted {
        return Ok((null()?, None));
    }
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    ioctl_fionbio(&ours, true)?;
    Ok((theirs, Some(ours)))
}

fn null() -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    Ok(file.into())
}

/// The streams of a process, while bytes flow. Dropping it ends them.
pub struct Streams {
    outputs: [Option<Arc<PipeOutput>>; 2],
    terminal: Option<Arc<Terminal>>,
    exited: watch::Sender<bool>,
    tasks: Vec<AbortHandle>,
}

impl Plan {
    /// Starts the flow. `terminal` is the master's end, if the process has a terminal.
    pub fn connect(self, terminal: Option<OwnedFd>) -> io::Result<Streams> {
        let [stdin, stdout, stderr] = self.expected;
        let mut streams = Streams::none();
        if let Some(master) = terminal {
            ioctl_fionbio(&master, true)?;
            let terminal = Arc::new(Terminal::new(watch(master, BOTH)?)?);
            streams.terminal = Some(terminal.clone());
            if let Some(stdin) = stdin {
                streams.spawn(pump::into_terminal(stdin, terminal.clone()));
            }
            let exited = streams.exited.subscribe();
            streams.spawn(pump::out_of_terminal(terminal, stdout, exited));
            return Ok(streams);
        }
        if let (Some(stdin), Some(pipe)) = (stdin, self.input) {
            let pipe = watch(pipe, Interest::WRITABLE | Interest::ERROR)?;
            streams.spawn(pump::into_pipe(stdin, pipe));
        }
        for (index, (expected, pipe)) in [stdout, stderr].into_iter().zip(self.outputs).enumerate()
        {
            if let (Some(expected), Some(pipe)) = (expected, pipe) {
                let pipe = watch(pipe, Interest::READABLE)?;
                let output = Arc::new(PipeOutput::new(pipe));
                if let Some(place) = streams.outputs.get_mut(index) {
                    *place = Some(output.clone());
                }
                let exited = streams.exited.subscribe();
                streams.spawn(pump::out_of_pipe(output, expected, exited));
            }
        }
        Ok(streams)
    }
}

impl Streams {
    /// The streams of a process that has none.
    pub fn none() -> Self {
        Self {
            outputs: [None, None],
            terminal: None,
            exited: watch::Sender::new(false),
            tasks: Vec::new(),
        }
    }

    fn spawn(&mut self, pump: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(pump).abort_handle());
    }

    /// Notes that the process has exited. Returns how many bytes its standard output and error have
    /// carried.
    pub fn exited(&self) -> [u64; 2] {
        self.exited.send_replace(true);
        if let Some(terminal) = &self.terminal {
            terminal.release();
            return [terminal.carried(), 0];
        }
        self.outputs
            .each_ref()
            .map(|output| output.as_ref().map_or(0, |output| output.carried()))
    }

    /// Sets the terminal's size. Does nothing without a terminal.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        let Some(terminal) = &self.terminal else {
            return Ok(());
        };
        let size = Winsize {
            ws_row: height,
            ws_col: width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(terminal.master(), size)?)
    }

    /// Whether all streams have come to their end.
    pub fn finished(&self) -> bool {
        self.tasks.iter().all(AbortHandle::is_finished)
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests;
