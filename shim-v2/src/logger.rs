//! A logging program that takes a process's output: `binary://PATH?key=value`.
//!
//! Called by `stdio`. The program runs with `key value …` as its arguments and nothing in its
//! environment but `CONTAINER_ID` and `CONTAINER_NAMESPACE`. Descriptor 3 is the read end of
//! standard output, 4 that of standard error, and 5 a pipe that it closes, or writes a byte to,
//! when it is ready. When the output has ended it has a second to end by itself, and then twelve
//! from a SIGTERM. (Facts: containerd, `cmd/containerd-shim-runc-v2/process/io.go`.)

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use kata_like_linux::command::hand_over;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use kata_like_failure::Failure;

use crate::uri;

/// How long a program may take until it is ready.
const READY_DEADLINE: Duration = Duration::from_secs(10);
/// How long a program may take from the end of the output to its own.
const EOF_DEADLINE: Duration = Duration::from_secs(1);
/// How long a program may take from SIGTERM to its end.
const END_DEADLINE: Duration = Duration::from_secs(12);

/// Why a logging program does not run.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// The URI is not one of a program.
    #[error("read the logging URI {0:?}: no absolute path of a program in it")]
    Uri(String),
    /// A step of its start.
    #[error("start the logging program {}: {step}", program.display())]
    Start {
        program: PathBuf,
        /// What was being done.
        step: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

impl From<LoggerError> for Failure {
    fn from(error: LoggerError) -> Self {
        Self::failed(error.to_string(), error)
    }
}

/// A running logging program.
#[derive(Debug)]
pub struct Logger {
    program: PathBuf,
    child: Child,
}

impl Logger {
    /// Runs the program of `uri` and waits until it is ready. Answers it with the ends to write
    /// standard output and standard error to.
    pub async fn start(
        uri: &str,
        namespace: &str,
        container: &str,
    ) -> Result<(Self, OwnedFd, OwnedFd), LoggerError> {
        let (program, arguments) =
            uri::parse(uri, "binary").ok_or_else(|| LoggerError::Uri(uri.to_owned()))?;
        let failed = |step| {
            let program = program.clone();
            move |source| LoggerError::Start {
                program,
                step,
                source,
            }
        };
        let (stdout_read, stdout) = pair().map_err(failed("make a pipe"))?;
        let (stderr_read, stderr) = pair().map_err(failed("make a pipe"))?;
        let (ready, ready_write) = pair().map_err(failed("make a pipe"))?;
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", container)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let handed = [&stdout_read, &stderr_read, &ready_write].map(AsFd::as_fd);
        hand_over(command.as_std_mut(), &handed, 3).map_err(failed("copy its descriptors"))?;
        let child = command.spawn().map_err(failed("run it"))?;
        drop((command, stdout_read, stderr_read, ready_write));

        let logger = Self { program, child };
        logger.wait_ready(ready).await?;
        Ok((logger, stdout, stderr))
    }

    async fn wait_ready(&self, ready: OwnedFd) -> Result<(), LoggerError> {
        let failed = |source| LoggerError::Start {
            program: self.program.clone(),
            step: "wait until it is ready",
            source,
        };
        let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(failed)?;
        match tokio::time::timeout(READY_DEADLINE, ready.read(&mut [0])).await {
            Ok(read) => read.map(drop).map_err(failed),
            Err(_) => {
                self.signal(Signal::SIGKILL);
                Err(failed(io::ErrorKind::TimedOut.into()))
            }
        }
    }

    /// The output has ended, and its pipes are closed. Most programs end with them; others are
    /// told, and killed if need be.
    pub fn end(mut self) {
        tokio::spawn(async move {
            if tokio::time::timeout(EOF_DEADLINE, self.child.wait())
                .await
                .is_ok()
            {
                return;
            }
            self.signal(Signal::SIGTERM);
            if tokio::time::timeout(END_DEADLINE, self.child.wait())
                .await
                .is_err()
            {
                tracing::warn!(program = %self.program.display(), "kill a logging program that does not end");
                let _ = self.child.kill().await;
            }
        });
    }

    fn signal(&self, signal: Signal) {
        // The id is there as long as the child has not been waited for.
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }
}

/// A pipe: read end, write end.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe2(OFlag::O_CLOEXEC)?)
}
