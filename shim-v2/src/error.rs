//! Why a step of the sandbox failed, with the kind that the caller maps to containerd's codes.
//!
//! `Display` is the step and its object, the chain of sources the cause; `one_line` joins them once,
//! for `ctr` and the journal. Imported by `sandbox` and the parts below it.

use std::error::Error;

pub use kata_like_boot::one_line;

/// What kind of failure it is: the caller maps it to one of containerd's status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxErrorKind {
    /// No such container or process.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// Not in this state.
    WrongState,
    /// The request is malformed.
    BadRequest,
    /// A field asks for what is not supported; the text names it.
    Unsupported,
    /// The guest did not answer in time.
    DeadlineExceeded,
    /// Anything else.
    Failed,
}

/// Why a step of the sandbox failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct SandboxError {
    kind: SandboxErrorKind,
    step: String,
    #[source]
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl SandboxError {
    /// An error of this kind that is its own cause.
    pub fn new(kind: SandboxErrorKind, step: impl Into<String>) -> Self {
        Self {
            kind,
            step: step.into(),
            source: None,
        }
    }

    /// A step that failed for another error's reason.
    pub fn failed(
        step: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind: SandboxErrorKind::Failed,
            step: step.into(),
            source: Some(source.into()),
        }
    }

    /// A field of the spec that asks for what can't be given.
    pub fn unsupported(field: impl std::fmt::Display, why: impl std::fmt::Display) -> Self {
        Self::new(
            SandboxErrorKind::Unsupported,
            format!("{field} is not supported: {why}"),
        )
    }

    /// The step that this failure is a part of, put before it; the kind stays.
    pub fn during(self, step: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            step: step.into(),
            source: Some(Box::new(self)),
        }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> SandboxErrorKind {
        self.kind
    }

    /// The whole chain on one line.
    pub fn one_line(&self) -> String {
        one_line(self)
    }
}

/// A line that the guest may have had a hand in, for people: no control characters, at most so many
/// characters.
pub fn clean(line: &str, longest: usize) -> String {
    line.chars()
        .map(|char| if char.is_control() { ' ' } else { char })
        .take(longest)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_one_line_and_keeps_the_kind() {
        let cause = std::io::Error::other("no\nspace");
        let error = SandboxError::failed("make a", cause).during("start b");
        assert_eq!(error.one_line(), "start b: make a: no space");
        assert_eq!(error.kind(), SandboxErrorKind::Failed);
        let error = SandboxError::unsupported("hooks.prestart", "no").during("read c");
        assert_eq!(error.kind(), SandboxErrorKind::Unsupported);
        assert_eq!(
            error.one_line(),
            "read c: hooks.prestart is not supported: no"
        );
    }

    #[test]
    fn a_line_of_the_guest_s_is_cut_and_cleaned() {
        let line = clean(&format!("a\u{1b}[2J\n{}", "x".repeat(5000)), 2000);
        assert_eq!(line.chars().count(), 2000);
        assert!(line.starts_with("a [2J x"), "{line}");
    }
}
