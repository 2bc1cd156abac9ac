//! The streams of an exec or attach: one WebSocket (RFC 6455) that carries Kubernetes' `v4.channel.k8s.io`.
//!
//! Each binary message begins with its channel's number. The error channel brings the end as JSON, a `Status` of
//! Kubernetes' API. This version can't end the standard input; a terminal's end is a byte.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// What a message is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// To the process.
    Stdin = 0,
    /// From the process, and all of a terminal's.
    Stdout = 1,
    /// From the process.
    Stderr = 2,
    /// How it ended.
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
    /// The exit code that the status tells.
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

/// No message of a test is longer.
const MAX_MESSAGE: usize = 1 << 20;

/// Kinds of frames, and the bit that says that a message ends with it (RFC 6455, 5.2).
const CONTINUED: u8 = 0;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const FINAL: u8 = 0x80;
const MASKED: u8 = 0x80;

/// An open one.
pub struct Stream {
    socket: TcpStream,
    ended: Ended,
}

impl Stream {
    /// Opens what Exec or Attach has answered. No read may take longer than `deadline`.
    pub fn open(url: &str, deadline: Duration) -> io::Result<Self> {
        let (host, path) = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split_once('/'))
            .ok_or_else(|| io::Error::other(format!("{url:?} is no plain HTTP address")))?;
        let mut socket = TcpStream::connect(host)?;
        socket.set_read_timeout(Some(deadline))?;
        socket.set_write_timeout(Some(deadline))?;
        write!(
            socket,
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        )?;
        // Byte by byte: what comes after the head is the first frame.
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") && head.len() < 8192 {
            socket.read_exact(&mut byte)?;
            head.extend(byte);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let chosen = head.to_ascii_lowercase();
        if !head.starts_with("HTTP/1.1 101") || !chosen.contains("v4.channel.k8s.io") {
            return Err(io::Error::other(format!("no stream: {head:?}")));
        }
        Ok(Self {
            socket,
            ended: Ended::default(),
        })
    }

    /// Writes to a channel.
    pub fn send(&mut self, channel: Channel, bytes: &[u8]) -> io::Result<()> {
        let message = [&[channel as u8], bytes].concat();
        self.send_frame(BINARY, &message)
    }

    /// Tells a terminal its size.
    pub fn resize(&mut self, columns: u16, rows: u16) -> io::Result<()> {
        let size = format!(r#"{{"Width":{columns},"Height":{rows}}}"#);
        self.send(Channel::Resize, size.as_bytes())
    }

    /// Reads until the standard output holds a text.
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
        let mut message = Vec::new();
        loop {
            let (first, mut payload) = match self.receive_frame() {
                // The server may close without a word.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let what = format!("nothing more within the deadline: {:?}", self.ended);
                    return Err(io::Error::new(io::ErrorKind::TimedOut, what));
                }
                other => other?,
            };
            match first & 0x0f {
                CLOSE => return Ok(false),
                PING => self.send_frame(PONG, &payload)?,
                BINARY | CONTINUED => {
                    message.append(&mut payload);
                    if first & FINAL != 0 {
                        break;
                    }
                }
                _ => {}
            }
        }
        let Some((channel, bytes)) = message.split_first() else {
            return Ok(true);
        };
        match channel {
            1 => self.ended.stdout.extend(bytes),
            2 => self.ended.stderr.extend(bytes),
            3 => self.ended.status.push_str(&String::from_utf8_lossy(bytes)),
            other => return Err(io::Error::other(format!("a message on channel {other}"))),
        }
        Ok(true)
    }

    fn receive_frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.socket.read_exact(&mut head)?;
        let [first, second] = head;
        let length = match second {
            126 => {
                let mut length = [0; 2];
                self.socket.read_exact(&mut length)?;
                u64::from(u16::from_be_bytes(length))
            }
            127 => {
                let mut length = [0; 8];
                self.socket.read_exact(&mut length)?;
                u64::from_be_bytes(length)
            }
            short => u64::from(short),
        };
        let length = usize::try_from(length)
            .ok()
            .filter(|length| second & MASKED == 0 && *length <= MAX_MESSAGE)
            .ok_or_else(|| io::Error::other(format!("a frame of {length} bytes, or masked")))?;
        let mut payload = vec![0; length];
        self.socket.read_exact(&mut payload)?;
        Ok((first, payload))
    }

    /// A client's frames are masked; by zeros, which leave the bytes as they are.
    fn send_frame(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let mut frame = vec![FINAL | kind];
        match u16::try_from(payload.len()) {
            Ok(length @ ..126) => frame.push(MASKED | length as u8),
            Ok(length) => {
                frame.push(MASKED | 126);
                frame.extend(length.to_be_bytes());
            }
            Err(_) => return Err(io::Error::other("a message that is too long")),
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        self.socket.write_all(&frame)
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
