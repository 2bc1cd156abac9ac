//! Why the runner could not do what the spec asks: one line for the user, and a kind for the answer.
//!
//! An error is made in a process of its own and travels to the agent as JSON, so the chain of causes
//! is joined where it arises: step, object, cause. Where runc has words for a failure, these are them.

use std::error::Error;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// The longest text that travels; the rest of a hostile one is cut.
const LONGEST: usize = 4096;

/// Why a container or an exec did not come up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum RunnerError {
    /// The spec asks for something that is not supported.
    #[error("{field}: {reason}")]
    Unsupported {
        /// The field's path in the OCI spec, as in `linux.personality`.
        field: String,
        /// What in it is not supported.
        reason: String,
    },
    /// The spec contradicts itself or the OCI specification.
    #[error("{field}: {reason}")]
    InvalidSpec {
        /// The field's path in the OCI spec.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A step failed.
    #[error("{message}")]
    Failed {
        /// Step, object and cause.
        message: String,
    },
}

/// What every step of the runner returns.
pub type Result<T, E = RunnerError> = std::result::Result<T, E>;

impl RunnerError {
    /// A field whose value is not supported.
    pub(super) fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            reason: cut(reason.into()),
        }
    }

    /// A field whose value makes no sense.
    pub(super) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidSpec {
            field: field.into(),
            reason: cut(reason.into()),
        }
    }

    /// A step that failed for a reason that has no error type of its own.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::Failed {
            message: cut(message.into()),
        }
    }
}

fn cut(mut text: String) -> String {
    if text.len() > LONGEST {
        let end = (0..=LONGEST)
            .rev()
            .find(|&end| text.is_char_boundary(end))
            .unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// Puts the step in front of a cause.
pub(super) trait Step<T> {
    /// `step` says what was being done and to what.
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Error> Step<T> for Result<T, E> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| {
            let mut message: String = step().into();
            let mut cause: Option<&dyn Error> = Some(&error);
            while let Some(error) = cause {
                let text = error.to_string();
                // Some libraries repeat their source in their own text.
                if !message.ends_with(&text) {
                    let _ = write!(message, ": {text}");
                }
                cause = error.source();
            }
            RunnerError::failed(message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_names_step_object_and_cause() {
        let error = rustix::io::Result::<()>::Err(rustix::io::Errno::NOENT).step(|| "open /x");
        assert_eq!(
            error.unwrap_err().to_string(),
            "open /x: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_hostile_text_is_cut() {
        let error = RunnerError::failed("ä".repeat(5000));
        assert_eq!(error.to_string().len(), LONGEST);
    }
}
