//! The terminal in front of this program, where there is one: what is typed goes to the host as it
//! is.
//!
//! `machine` holds a [`Raw`] while the host runs, and `inside` gives the command a terminal of the
//! same size. Where the standard input is a file or a pipe, the command gets a pipe.

use std::ffi::OsString;
use std::io::{self, IsTerminal};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::error::HostError;

/// Keys are passed on one by one, Ctrl-C among them; the terminal is as before when this value
/// goes.
pub struct Raw(Termios);

impl Raw {
    /// `None` where the standard input is no terminal.
    pub fn enter() -> Result<Option<Self>, HostError> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before =
            tcgetattr(io::stdin()).map_err(HostError::system("read the terminal's settings"))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)
            .map_err(HostError::system("change the terminal's settings"))?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// The command as it is to be run in the host: on a terminal if there is one here. util-linux'
/// `script` makes it.
pub fn wrapped(command: &[OsString]) -> Vec<OsString> {
    let Some(size) = io::stdin()
        .is_terminal()
        .then(|| tcgetwinsize(io::stdin()).ok())
        .flatten()
    else {
        return command.to_vec();
    };
    let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
    let (rows, columns) = (size.ws_row.max(1), size.ws_col.max(1));
    let words: Vec<_> = command
        .iter()
        .map(|word| quoted(&word.to_string_lossy()))
        .collect();
    let inner = format!(
        "stty rows {rows} cols {columns}; export TERM={}; exec {}",
        quoted(&term),
        words.join(" ")
    );
    [
        "script",
        "-q",
        "-e",
        "-E",
        "always",
        "-c",
        &inner,
        "/dev/null",
    ]
    .map(OsString::from)
    .into()
}

/// As one word of a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
