//! A connection to a port of a pod by WebSocket: one channel of data, and one for errors.
//!
//! The first two bytes of each channel are the port's number. This protocol version can't end one
//! direction alone.

use std::io;
use std::time::Duration;

use crate::websocket::WebSocket;

/// The channels of the first requested port.
const DATA: u8 = 0;
const ERROR: u8 = 1;

/// An open connection.
pub struct Forward {
    socket: WebSocket,
    data: Vec<u8>,
    error: Vec<u8>,
}

impl Forward {
    /// Opens the URL of PortForward's answer for this port. No read may take longer than
    /// `deadline`.
    pub fn open(url: &str, port: u16, deadline: Duration) -> io::Result<Self> {
        let mut forward = Self {
            socket: WebSocket::open(&format!("{url}?port={port}"), deadline)?,
            data: Vec::new(),
            error: Vec::new(),
        };
        while forward.data.len() < 2 || forward.error.len() < 2 {
            if !forward.receive()? {
                return Err(io::Error::other("it ended before the ports were told"));
            }
        }
        for channel in [&mut forward.data, &mut forward.error] {
            let told: Vec<u8> = channel.drain(..2).collect();
            if told != port.to_le_bytes() {
                return Err(io::Error::other(format!("port {told:?}, not {port}")));
            }
        }
        Ok(forward)
    }

    /// Writes to the port.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.send(DATA, bytes)
    }

    /// Reads `length` bytes from the port.
    pub fn read(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.data.len() < length {
            if !self.receive()? {
                let (data, error) = (&self.data, String::from_utf8_lossy(&self.error));
                let what = format!("it ended after {} bytes: {error:?}", data.len());
                return Err(io::Error::other(what));
            }
        }
        Ok(self.data.drain(..length).collect())
    }

    /// Reads to the end: the rest of the data, and the text of errors.
    pub fn finish(mut self) -> io::Result<(Vec<u8>, String)> {
        while self.receive()? {}
        let error = String::from_utf8_lossy(&self.error).into_owned();
        Ok((self.data, error))
    }

    /// Takes one message; false at the end.
    fn receive(&mut self) -> io::Result<bool> {
        match self.socket.receive()? {
            None => return Ok(false),
            Some((DATA, bytes)) => self.data.extend(bytes),
            Some((ERROR, bytes)) => self.error.extend(bytes),
            Some((other, _)) => {
                return Err(io::Error::other(format!("a message on channel {other}")));
            }
        }
        Ok(true)
    }
}
