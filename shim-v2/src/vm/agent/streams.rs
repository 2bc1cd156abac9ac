//! The tokens that open a process's standard streams.

use std::fs::File;
use std::io::{self, Read};

use kata_like_agent_protocol::{TOKEN_LENGTH, agent};

/// The standard streams of a process: the token that opens each, or none for `/dev/null`.
#[derive(Clone, Debug, Default)]
pub struct StreamTokens {
    /// Opens the standard input.
    pub stdin: Option<[u8; 16]>,
    /// Opens the standard output; with a terminal, the terminal's.
    pub stdout: Option<[u8; 16]>,
    /// Opens the standard error; none with a terminal.
    pub stderr: Option<[u8; 16]>,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// The terminal's first width in columns; 0: the spec's, if it has one.
    pub width: u32,
    /// The terminal's first height in rows; 0: the spec's, if it has one.
    pub height: u32,
}

/// What opens a stream: random bytes.
pub fn new_token() -> io::Result<[u8; TOKEN_LENGTH]> {
    let mut token = [0; TOKEN_LENGTH];
    File::open("/dev/urandom")?.read_exact(&mut token)?;
    Ok(token)
}

pub(super) fn streams_of(tokens: &StreamTokens) -> agent::Streams {
    let bytes = |token: Option<[u8; 16]>| token.map(Vec::from).unwrap_or_default();
    agent::Streams {
        stdin: bytes(tokens.stdin),
        stdout: bytes(tokens.stdout),
        stderr: bytes(tokens.stderr),
        terminal: tokens.terminal,
        width: tokens.width,
        height: tokens.height,
        ..Default::default()
    }
}
