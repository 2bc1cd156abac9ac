//! SPDY/3.1, as `kubectl` up to 1.30 and many libraries speak it: several streams on one
//! connection. Each has headers that say what it is, and each of its directions has an end of its
//! own.
//!
//! Headers are compressed by zlib, whose blocks may be stored uncompressed; we write such blocks.
//! The headers that come back say nothing that we need, so we skip them. (spdy-protocol-draft3-1;
//! RFC 1951, 3.2.4)

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::upgrade::upgrade;

/// Types of control frames, and the bits that they all begin with.
const CONTROL: u16 = 0x8003;
const SYN_STREAM: u16 = 1;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;

/// The flag of the last frame of a stream's direction.
const FIN: u8 = 1;

/// The start of zlib's stream, without a dictionary.
const ZLIB: [u8; 2] = [0x78, 0x01];

/// An empty stored block; a reader then has everything before it.
const FLUSH: [u8; 5] = [0, 0, 0, 0xff, 0xff];

/// What a stream has brought.
#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    ended: bool,
}

/// An open connection.
pub struct Spdy {
    socket: TcpStream,
    /// By number; those that a client opens are odd.
    streams: BTreeMap<u32, Received>,
}

impl Spdy {
    /// Opens the URL of a CRI call's answer for a protocol of Kubernetes. No read may take longer
    /// than `deadline`.
    pub fn open(url: &str, protocol: &str, deadline: Duration) -> io::Result<Self> {
        let headers = format!("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n");
        Ok(Self {
            socket: upgrade(url, &headers, protocol, deadline)?,
            streams: BTreeMap::new(),
        })
    }

    /// Opens a stream with these headers, whose names are in lower case; returns its number.
    pub fn stream(&mut self, headers: &[(&str, &str)]) -> io::Result<u32> {
        let first = self.streams.is_empty();
        let id = self.streams.len() as u32 * 2 + 1;
        let mut block = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.extend((text.len() as u32).to_be_bytes());
            block.extend(text.as_bytes());
        }
        let mut payload = [id.to_be_bytes(), [0; 4]].concat();
        payload.extend([0; 2]);
        payload.extend(if first { &ZLIB[..] } else { &[] });
        payload.extend(stored(&block)?);
        self.control(SYN_STREAM, &payload)?;
        self.streams.insert(id, Received::default());
        Ok(id)
    }

    /// Writes to a stream.
    pub fn send(&mut self, stream: u32, bytes: &[u8]) -> io::Result<()> {
        self.data(stream, 0, bytes)
    }

    /// Ends a stream's direction to the server.
    pub fn end(&mut self, stream: u32) -> io::Result<()> {
        self.data(stream, FIN, &[])
    }

    /// Reads a stream to its end.
    pub fn finish(&mut self, stream: u32) -> io::Result<Vec<u8>> {
        while self.streams.get(&stream).is_some_and(|one| !one.ended) {
            self.receive()?;
        }
        let received = self.streams.get_mut(&stream);
        let received = received.ok_or_else(|| io::Error::other(format!("no stream {stream}")))?;
        Ok(std::mem::take(&mut received.bytes))
    }

    /// Takes one frame.
    fn receive(&mut self) -> io::Result<()> {
        let mut head = [0; 8];
        match self.socket.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.end_all();
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let [a, b, c, d, flags, length @ ..] = head;
        let length = u32::from_be_bytes([0, length[0], length[1], length[2]]);
        let mut payload = vec![0; length as usize];
        self.socket.read_exact(&mut payload)?;
        if a & 0x80 == 0 {
            let stream = self.streams.entry(u32::from_be_bytes([a, b, c, d]));
            let stream = stream.or_default();
            stream.bytes.append(&mut payload);
            stream.ended |= flags & FIN != 0;
            return Ok(());
        }
        match u16::from_be_bytes([c, d]) {
            RST_STREAM => {
                let id = payload.first_chunk().copied().map(u32::from_be_bytes);
                if let Some(stream) = id.and_then(|id| self.streams.get_mut(&id)) {
                    stream.ended = true;
                }
            }
            PING => self.control(PING, &payload)?,
            GOAWAY => self.end_all(),
            _ => {}
        }
        Ok(())
    }

    fn end_all(&mut self) {
        for stream in self.streams.values_mut() {
            stream.ended = true;
        }
    }

    fn control(&mut self, kind: u16, payload: &[u8]) -> io::Result<()> {
        let [a, b] = CONTROL.to_be_bytes();
        let [c, d] = kind.to_be_bytes();
        self.frame([a, b, c, d], 0, payload)
    }

    fn data(&mut self, stream: u32, flags: u8, bytes: &[u8]) -> io::Result<()> {
        self.frame(stream.to_be_bytes(), flags, bytes)
    }

    fn frame(&mut self, head: [u8; 4], flags: u8, payload: &[u8]) -> io::Result<()> {
        let length = payload.len() as u32;
        if length >= 1 << 24 {
            return Err(io::Error::other("a frame that is too long"));
        }
        let mut frame = head.to_vec();
        frame.extend((u32::from(flags) << 24 | length).to_be_bytes());
        frame.extend(payload);
        self.socket.write_all(&frame)
    }
}

/// Bytes as an uncompressed block of a compressed stream.
fn stored(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(bytes.len()).map_err(|_| io::Error::other("too many headers"))?;
    let mut block = vec![0];
    block.extend(length.to_le_bytes());
    block.extend((!length).to_le_bytes());
    block.extend(bytes);
    block.extend(FLUSH);
    Ok(block)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_stored_block_has_its_length_twice() {
        let block = super::stored(b"ab").expect("it is short");
        let wanted = [0, 2, 0, 0xfd, 0xff, b'a', b'b', 0, 0, 0, 0xff, 0xff];
        assert_eq!(block, wanted);
    }
}
