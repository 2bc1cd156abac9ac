//! Why a step failed: one error for the shim, the agent and the programs between them.
//!
//! `Display` is the step and its object, `source` is the cause, and [`one_line`] joins the chain
//! for a user. Modules whose callers match on a cause keep an enum of their own and hand it on as
//! the source of a [`Failure`].

use std::error::Error;
use std::fmt::Display;
use std::time::Duration;

/// What kind of failure it is. `kata-like-agent-protocol` gives each kind its status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Kind {
    /// No such container or process, or it has exited.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The object is in a state that forbids this.
    WrongState,
    /// The request contradicts the protocol or the OCI runtime spec.
    BadRequest,
    /// A field asks for what we do not support; the text names the field.
    Unsupported,
    /// A step did not end in time.
    DeadlineExceeded,
    /// Anything else.
    Failed,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct Failure {
    kind: Kind,
    step: String,
    #[source]
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    /// A failure that is its own cause.
    pub fn new(kind: Kind, step: impl Into<String>) -> Self {
        Self {
            kind,
            step: step.into(),
            source: None,
        }
    }

    /// A step that failed because of `source`, of the kind [`Kind::Failed`].
    pub fn failed(
        step: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind: Kind::Failed,
            step: step.into(),
            source: Some(source.into()),
        }
    }

    /// A field that asks for what we do not support.
    pub fn unsupported(field: impl Display, why: impl Display) -> Self {
        let step = format!("{field} is not supported: {why}");
        Self::new(Kind::Unsupported, step)
    }

    /// A field whose value is not allowed.
    pub fn bad(field: impl Display, why: impl Display) -> Self {
        Self::new(Kind::BadRequest, format!("{field}: {why}"))
    }

    /// An object that is in a state which forbids what was asked.
    pub fn wrong_state(object: impl Display, state: &str, wanted: &str) -> Self {
        let step = format!("{object} is {state}, not {wanted}");
        Self::new(Kind::WrongState, step)
    }

    /// A step that is not done after `deadline`, in whole seconds.
    pub fn late(step: impl Display, deadline: Duration) -> Self {
        let step = format!("{step}: not done after {} s", deadline.as_secs());
        Self::new(Kind::DeadlineExceeded, step)
    }

    /// Puts a step before this failure, which becomes its source. The kind stays.
    pub fn during(self, step: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            step: step.into(),
            source: Some(Box::new(self)),
        }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The whole chain on one line.
    pub fn one_line(&self) -> String {
        one_line(self)
    }
}

/// Turns the error of a result into a [`Failure`] of the step that it ended.
pub trait Step<T> {
    /// `step` says what was being done and to what: `open(path).step(|| format!("open
    /// {path:?}"))?`.
    ///
    /// # Errors
    /// The result's own error, as the source of a [`Kind::Failed`].
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, Failure>;
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> Step<T> for Result<T, E> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, Failure> {
        self.map_err(|source| Failure::failed(step(), source))
    }
}

/// An error and its sources on one line: `step: cause: cause`. A source that its error has repeated
/// in its own text is not said again.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = cause.source();
    }
    line.replace(['\n', '\r'], " ")
}

/// A line that the guest may have written, made safe to print: nothing that moves a cursor, turns
/// the direction of a text, breaks a line or can't be seen, and at most `longest` characters.
pub fn clean(line: &str, longest: usize) -> String {
    let shown = |char: char| !char.is_control() && !is_unseen(char);
    line.chars()
        .map(|char| if shown(char) { char } else { ' ' })
        .take(longest)
        .collect()
}

/// Whether Unicode 16 has the character as a format character (Cf), as a separator of lines (Zl) or
/// paragraphs (Zp), or as one that is not shown (Default_Ignorable_Code_Point).
fn is_unseen(char: char) -> bool {
    matches!(char,
        '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
        | '\u{890}'..='\u{891}' | '\u{8e2}' | '\u{115f}'..='\u{1160}'
        | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
        | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_one_line_and_keeps_the_kind() {
        let cause = std::io::Error::other("no\nspace");
        let error = Failure::failed("make a", cause).during("start b");
        assert_eq!(error.one_line(), "start b: make a: no space");
        assert_eq!(error.kind(), Kind::Failed);
        let error = Failure::unsupported("hooks.prestart", "no").during("read c");
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(
            error.one_line(),
            "read c: hooks.prestart is not supported: no"
        );
        let error = Err::<(), _>(std::io::Error::other("no")).step(|| "open /x");
        assert_eq!(error.unwrap_err().one_line(), "open /x: no");
    }

    #[test]
    fn a_line_of_the_guest_s_is_cut_and_cleaned() {
        let line = clean(&format!("a\u{1b}[2J\n{}", "x".repeat(5000)), 2000);
        assert_eq!(line.chars().count(), 2000);
        assert!(line.starts_with("a [2J x"), "{line}");
    }

    #[test]
    fn nothing_turns_or_hides_a_text() {
        for unseen in [
            '\u{202e}',
            '\u{2066}',
            '\u{200b}',
            '\u{200f}',
            '\u{2028}',
            '\u{ad}',
            '\u{feff}',
            '\u{e0041}',
            '\u{fe0f}',
            '\u{9b}',
            '\u{7f}',
            '\0',
        ] {
            assert_eq!(clean(&format!("a{unseen}b"), 9), "a b", "{unseen:?}");
        }
        let shown = "äÖß 漢字 עברית हिन्दी e\u{301} 🦀 − \u{a0}";
        assert_eq!(clean(shown, 99), shown);
    }

    /// The standard library has a table of its own of what is not printed.
    #[test]
    fn what_is_replaced_is_printed_nowhere_else() {
        let marks = ['\u{34f}', '\u{115f}', '\u{1160}', '\u{3164}', '\u{ffa0}'];
        let mark = |char: &char| {
            let variations = ('\u{fe00}'..='\u{fe0f}').contains(char)
                || ('\u{e0100}'..='\u{e01ef}').contains(char)
                || ('\u{17b4}'..='\u{17b5}').contains(char)
                || ('\u{180b}'..='\u{180f}').contains(char);
            variations || marks.contains(char)
        };
        let unseen = ('\0'..=char::MAX).filter(|char| is_unseen(*char));
        for char in unseen.filter(|char| !mark(char)) {
            // Behind another character a mark is printed, and what has no shape is not.
            let escaped = format!("a{char}").escape_debug().to_string();
            assert!(escaped.starts_with("a\\u{"), "{char:?} {escaped}");
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Cause {
        text: &'static str,
        #[source]
        source: Option<Box<Cause>>,
    }

    fn chain(texts: &[&'static str]) -> Cause {
        let (text, rest) = texts.split_first().unwrap();
        let source = (!rest.is_empty()).then(|| Box::new(chain(rest)));
        Cause { text, source }
    }

    #[test]
    fn each_cause_is_said_once_and_all_on_one_line() {
        let line = |texts: &[&'static str]| one_line(&chain(texts));
        assert_eq!(line(&["open x", "read\ny", "gone"]), "open x: read y: gone");
        assert_eq!(line(&["open x: gone", "gone"]), "open x: gone");
    }
}
