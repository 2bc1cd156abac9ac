//! A WebSocket (RFC 6455) that carries Kubernetes' `v4.channel.k8s.io`: each binary message begins
//! with its channel's number.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::upgrade::upgrade;

const PROTOCOL: &str = "v4.channel.k8s.io";

/// In bytes; no message of a test is longer.
const MAX_MESSAGE: usize = 1 << 20;

/// Kinds of frames, and the bit that marks a message's last frame (RFC 6455, 5.2).
const CONTINUED: u8 = 0;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const FINAL: u8 = 0x80;
const MASKED: u8 = 0x80;

/// An open one.
pub(crate) struct WebSocket(TcpStream);

impl WebSocket {
    /// Opens the URL of a CRI call's answer. No read may take longer than `deadline`.
    pub fn open(url: &str, deadline: Duration) -> io::Result<Self> {
        let headers = format!(
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: {PROTOCOL}\r\n"
        );
        upgrade(url, &headers, PROTOCOL, deadline).map(Self)
    }

    /// Writes to a channel.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        self.send_frame(BINARY, &[&[channel], bytes].concat())
    }

    /// Takes one message: its channel and its content. `None` at the end.
    pub fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        let mut message = Vec::new();
        loop {
            let (first, mut payload) = match self.receive_frame() {
                // The server may close without a closing frame.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                other => other?,
            };
            match first & 0x0f {
                CLOSE => return Ok(None),
                PING => self.send_frame(PONG, &payload)?,
                BINARY | CONTINUED => {
                    message.append(&mut payload);
                    if first & FINAL != 0 && !message.is_empty() {
                        return Ok(Some((message.remove(0), message)));
                    }
                }
                _ => {}
            }
        }
    }

    fn receive_frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let socket = &mut self.0;
        let mut head = [0; 2];
        socket.read_exact(&mut head)?;
        let [first, second] = head;
        let length = match second {
            126 => {
                let mut length = [0; 2];
                socket.read_exact(&mut length)?;
                u64::from(u16::from_be_bytes(length))
            }
            127 => {
                let mut length = [0; 8];
                socket.read_exact(&mut length)?;
                u64::from_be_bytes(length)
            }
            short => u64::from(short),
        };
        let length = usize::try_from(length)
            .ok()
            .filter(|length| second & MASKED == 0 && *length <= MAX_MESSAGE)
            .ok_or_else(|| io::Error::other(format!("a frame of {length} bytes, or masked")))?;
        let mut payload = vec![0; length];
        socket.read_exact(&mut payload)?;
        Ok((first, payload))
    }

    /// A client must mask its frames; zeros leave the bytes as they are.
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
        self.0.write_all(&frame)
    }
}
