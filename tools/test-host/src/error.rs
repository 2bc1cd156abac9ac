//! Why the test host could not be had. A failing command is no error here: its exit code is passed on.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// What was being done, to what, and why it failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Wrong use of the command line.
    #[error("{0}")]
    Usage(String),
    /// A file or directory could not be used.
    #[error("{step} {}", path.display())]
    File {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A program could not be started.
    #[error("start {program} to {step}")]
    Spawn {
        /// What it was to do.
        step: String,
        /// The program.
        program: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A program failed.
    #[error("{step}: {program} ended with {status}: {stderr}")]
    Program {
        /// What it was to do.
        step: String,
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// What it said last.
        stderr: String,
    },
    /// A system call failed.
    #[error("{step}")]
    System {
        /// What was being done, to what.
        step: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Something that was expected is not there.
    #[error("{step}: {why}")]
    Missing {
        /// What was being done.
        step: &'static str,
        /// What was not as expected.
        why: String,
    },
    /// The host's kernel panicked, or QEMU ended, before the command did.
    #[error("the test host died before the command ended ({status}); its last lines:\n{console}")]
    Died {
        /// How QEMU ended.
        status: String,
        /// The tail of the kernel log.
        console: String,
    },
    /// The host did not come up.
    #[error("wait for the test host: not up after {deadline:?}; its last lines:\n{console}")]
    NotUp {
        /// How long was waited.
        deadline: Duration,
        /// The tail of the kernel log.
        console: String,
    },
    /// The deadline of the whole run has passed.
    #[error("the command did not end within {deadline:?}; the test host was stopped")]
    Deadline {
        /// The deadline.
        deadline: Duration,
    },
}

impl HostError {
    /// A file or directory could not be used.
    pub fn file(step: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { step, path, source }
    }

    /// A system call failed; takes std's and rustix's errors.
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
