//! An error as it is reported over the control socket, and by whoever hears of it: one line.

use std::error::Error;

/// An error and its sources on one line: `step: cause: cause`. A source that its error has repeated in
/// its own text is not said again.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Step {
        text: &'static str,
        #[source]
        source: Option<Box<Step>>,
    }

    fn chain(texts: &[&'static str]) -> Step {
        let (text, rest) = texts.split_first().unwrap();
        let source = (!rest.is_empty()).then(|| Box::new(chain(rest)));
        Step { text, source }
    }

    #[test]
    fn each_cause_is_said_once_and_all_on_one_line() {
        let line = |texts: &[&'static str]| one_line(&chain(texts));
        assert_eq!(line(&["open x", "read\ny", "gone"]), "open x: read y: gone");
        assert_eq!(line(&["open x: gone", "gone"]), "open x: gone");
    }
}
