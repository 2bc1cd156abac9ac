//! The streams of an exec or attach by WebSocket.
//!
//! The error channel brings the end as JSON, a `Status` of Kubernetes' API. This protocol version
//! can't end the standard input; a terminal's end is a byte.

use std::io;
use std::time::Duration;

use serde_json::Value;

use crate::websocket::WebSocket;

/// Which channel a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// To the process.
    Stdin = 0,
    /// From the process; with a terminal all its output.
    Stdout = 1,
    /// From the process.
    Stderr = 2,
    /// How the process ended.
    Error = 3,
    /// The terminal's new size.
    Resize = 4,
}

/// What a stream has brought until its end.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// The standard output.
    pub stdout: Vec<u8>,
    /// The standard error.
    pub stderr: Vec<u8>,
    /// `Status` as text; empty if none came, as when an attached container ends.
    pub status: String,
}

impl Ended {
    /// The exit code in the status.
    pub fn exit_code(&self) -> Option<i32> {
        let status: Value = serde_json::from_str(&self.status).ok()?;
        if status["status"] == "Success" {
            return Some(0);
        }
        let causes = status["details"]["causes"].as_array()?;
        let code = causes.iter().find(|cause| cause["reason"] == "ExitCode")?;
        code["message"].as_str()?.parse().ok()
    }
}

/// An open connection.
pub struct Stream {
    socket: WebSocket,
    ended: Ended,
}

impl Stream {
    /// Opens the URL of Exec's or Attach's answer. No read may take longer than `deadline`.
    pub fn open(url: &str, deadline: Duration) -> io::Result<Self> {
        Ok(Self {
            socket: WebSocket::open(url, deadline)?,
            ended: Ended::default(),
        })
    }

    /// Writes to a channel.
    pub fn send(&mut self, channel: Channel, bytes: &[u8]) -> io::Result<()> {
        self.socket.send(channel as u8, bytes)
    }

    /// Tells a terminal its size.
    pub fn resize(&mut self, columns: u16, rows: u16) -> io::Result<()> {
        let size = format!(r#"{{"Width":{columns},"Height":{rows}}}"#);
        self.send(Channel::Resize, size.as_bytes())
    }

    /// Reads until the standard output contains `text`.
    pub fn read_until(&mut self, text: &str) -> io::Result<()> {
        let holds = |ended: &Ended| String::from_utf8_lossy(&ended.stdout).contains(text);
        while !holds(&self.ended) {
            if !self.receive()? {
                let what = format!("the stream ended before {text:?}: {:?}", self.ended);
                return Err(io::Error::other(what));
            }
        }
        Ok(())
    }

    /// Reads to the end.
    pub fn finish(mut self) -> io::Result<Ended> {
        while self.receive()? {}
        Ok(self.ended)
    }

    /// Takes one message; false at the end.
    fn receive(&mut self) -> io::Result<bool> {
        let message = self.socket.receive().map_err(|error| {
            let what = format!("{error} after {:?}", self.ended);
            io::Error::new(error.kind(), what)
        })?;
        match message {
            None => return Ok(false),
            Some((1, bytes)) => self.ended.stdout.extend(bytes),
            Some((2, bytes)) => self.ended.stderr.extend(bytes),
            Some((3, bytes)) => self.ended.status.push_str(&String::from_utf8_lossy(&bytes)),
            Some((other, _)) => {
                return Err(io::Error::other(format!("a message on channel {other}")));
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_the_exit_code() {
        let of = |status: &str| {
            let ended = Ended {
                status: status.into(),
                ..Default::default()
            };
            ended.exit_code()
        };
        assert_eq!(of(r#"{"status":"Success"}"#), Some(0));
        let failed = r#"{"status":"Failure","reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(of(failed), Some(7));
        assert_eq!(of(r#"{"status":"Failure","reason":"InternalError"}"#), None);
        assert_eq!(of(""), None);
    }
}
