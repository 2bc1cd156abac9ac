//! Why there is no test host. A failing command is no error here: its exit code is passed on.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The host failed, not the command. (EX_SOFTWARE of sysexits.h)
pub const HOST_FAILED: u8 = 70;

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("{0}")]
    Usage(String),
    #[error("{step} {}", path.display())]
    File {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("start {program} to {step}")]
    Spawn {
        step: String,
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("{step}: {program} ended with {status}: {stderr}")]
    Program {
        step: String,
        program: String,
        status: String,
        /// The end of its standard error.
        stderr: String,
    },
    #[error("{step}")]
    System {
        step: String,
        #[source]
        source: io::Error,
    },
    /// Something that was expected is not there.
    #[error("{step}: {why}")]
    Missing {
        step: &'static str,
        /// What was not as expected.
        why: String,
    },
    /// The host's kernel panicked, or QEMU ended, before the command did.
    #[error("the test host died before the command ended ({status}); its last lines:\n{console}")]
    Died {
        status: String,
        /// The tail of the kernel log.
        console: String,
    },
    #[error("wait for the test host: not up after {deadline:?}; its last lines:\n{console}")]
    NotUp {
        deadline: Duration,
        /// The tail of the kernel log.
        console: String,
    },
    /// The deadline of the whole run has passed.
    #[error("the command did not end within {deadline:?}; the test host was stopped")]
    Deadline { deadline: Duration },
}

impl HostError {
    /// For a file or directory that could not be used.
    pub fn file(step: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { step, path, source }
    }

    /// For a system call that failed; takes errors of std and of rustix.
    pub fn system<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        let step = step.into();
        move |source| Self::System {
            step,
            source: source.into(),
        }
    }

    /// The whole chain of causes in one line.
    pub fn one_line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            line.push_str(&format!(": {error}"));
            cause = error.source();
        }
        line
    }
}
