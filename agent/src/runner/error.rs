//! What every step of the runner returns, and how a failure travels to the agent.
//!
//! A runner is a process of its own, so its failure becomes a line of text and a kind before it is
//! sent as JSON. Where runc has words for a failure, these are them.

use kata_like_failure::{Failure, Kind};
use serde::{Deserialize, Serialize};

/// The longest text that travels, in bytes. A container can make a text longer; the rest is cut.
const LONGEST: usize = 4096;

/// What every step of the runner returns.
pub(super) type Result<T, E = Failure> = std::result::Result<T, E>;

/// A failure as it travels.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Told {
    kind: Kind,
    text: String,
}

impl From<&Failure> for Told {
    fn from(failure: &Failure) -> Self {
        let mut text = failure.one_line();
        if text.len() > LONGEST {
            let mut ends = (0..=LONGEST).rev();
            let end = ends.find(|&end| text.is_char_boundary(end));
            text.truncate(end.unwrap_or(0));
        }
        Self {
            kind: failure.kind(),
            text,
        }
    }
}

impl From<Told> for Failure {
    fn from(told: Told) -> Self {
        Self::new(told.kind, told.text)
    }
}

/// The field that a failure refuses.
#[cfg(test)]
pub(super) fn refused(failure: &Failure) -> String {
    assert!(
        matches!(failure.kind(), Kind::Unsupported | Kind::BadRequest),
        "{failure:?}"
    );
    let text = failure.one_line();
    let field = text.split_once(": ").unwrap().0;
    field.trim_end_matches(" is not supported").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_like_failure::Step;

    fn travelled(failure: &Failure) -> Failure {
        let json = serde_json::to_vec(&Told::from(failure)).unwrap();
        serde_json::from_slice::<Told>(&json).unwrap().into()
    }

    #[test]
    fn a_failure_arrives_with_its_kind_and_the_whole_chain() {
        let error = rustix::io::Result::<()>::Err(rustix::io::Errno::NOENT).step(|| "open /x");
        let got = travelled(&error.unwrap_err());
        assert_eq!(got.kind(), Kind::Failed);
        let text = "open /x: No such file or directory (os error 2)";
        assert_eq!(got.one_line(), text);
        let got = travelled(&Failure::unsupported("linux.intelRdt", "no"));
        assert_eq!(got.kind(), Kind::Unsupported);
        assert_eq!(got.one_line(), "linux.intelRdt is not supported: no");
    }

    #[test]
    fn a_hostile_text_is_cut() {
        for start in ["", "x"] {
            let text = format!("{start}{}", "ä".repeat(5000));
            let got = travelled(&Failure::new(Kind::Failed, text));
            assert_eq!(got.one_line().len(), LONGEST - start.len());
        }
    }
}
