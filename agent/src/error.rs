//! What can go wrong with a call of the host, by the kind of answer it gets.
//!
//! Made everywhere below `service.rs`, which alone turns it into a status code.

use std::error::Error;
use std::time::Duration;

use tokio::time::timeout;

use crate::runner::RunnerError;

/// Why a call could not be done. `Display` is the step and its object; the cause is the source.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The request contradicts `agent.proto` or the OCI runtime spec.
    #[error("{what}: {why}")]
    BadRequest {
        /// The field.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A field that this agent does not implement.
    #[error("{field} is not supported: {why}")]
    Unsupported {
        /// Its name as in the OCI runtime spec.
        field: String,
        /// What is unsupported about it.
        why: String,
    },
    /// No container of this name.
    #[error("no container {container}")]
    NoSuchContainer {
        /// The name asked for.
        container: String,
    },
    /// No such process, or it has exited.
    #[error("no running process {process}")]
    NoSuchProcess {
        /// `CONTAINER` or `CONTAINER/EXEC`.
        process: String,
    },
    /// The name is taken.
    #[error("{what} exists already")]
    AlreadyExists {
        /// Kind and name.
        what: String,
    },
    /// Not in this state.
    #[error("{what} is {state}, not {wanted}")]
    WrongState {
        /// Kind and name.
        what: String,
        /// What it is.
        state: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
    /// The runner could not set up a process; its text is for the user as it is.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// A step failed.
    #[error("{step}")]
    Failed {
        /// What was being done, and to what.
        step: String,
        /// Why it failed.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A step took too long. It goes on, but nobody waits for it.
    #[error("{step}: not done after {seconds} s")]
    Timeout {
        /// What was being done, and to what.
        step: String,
        /// The deadline.
        seconds: u64,
    },
}

impl PodError {
    /// A step that failed: `map_err(PodError::failed("open X"))`.
    pub fn failed<E>(step: impl Into<String>) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let step = step.into();
        move |source| Self::Failed {
            step,
            source: source.into(),
        }
    }

    /// A field with a value it may not have.
    pub fn bad(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::BadRequest {
            what: what.into(),
            why: why.into(),
        }
    }
}

/// The chain of an error in one line, step by step down to the cause.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    line.replace('\n', " ")
}

/// How long a step may block: a file system of the host's can take its time, or for ever, and many guests that start at
/// once share the host's CPUs. Less than the host waits for the whole; it gives up earlier on a guest that stands still.
pub const BLOCKING_DEADLINE: Duration = Duration::from_secs(240);

/// Does what may block on a thread of its own, and does not wait for it without end.
pub async fn blocking<T, E>(
    step: &'static str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, PodError>
where
    T: Send + 'static,
    E: Into<Box<dyn Error + Send + Sync>> + Send + 'static,
{
    match timeout(BLOCKING_DEADLINE, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result.map_err(PodError::failed(step)),
        // It was cancelled: a panic would have ended the machine.
        Ok(Err(error)) => Err(PodError::failed(step)(error)),
        Err(_) => Err(PodError::Timeout {
            step: step.into(),
            seconds: BLOCKING_DEADLINE.as_secs(),
        }),
    }
}
