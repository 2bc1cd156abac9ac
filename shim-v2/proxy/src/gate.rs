//! What the guest may send on the agent's connection: the one answer to each request, and no more.
//!
//! ttrpc's client keeps what comes in for a call in a mailbox without a bound, and takes frames of
//! up to 4 MiB. So it reads through a gate, which looks at each frame's header before the client
//! gets it. A frame that is no answer, that nobody has asked for or that is too long ends the
//! connection. What can wait in the client is then one answer of [`MAX_ANSWER`] bytes for each
//! call under way, and how many those are is up to the shim's callers. No clock is needed: with
//! no answer owed, the guest can't send a byte.

use std::collections::HashSet;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use kata_like_agent_protocol::MAX_ANSWER;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::proto::{
    MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader,
};

/// The most answers that the guest may owe. A call that was given up leaves one.
const MOST_OWED: usize = 1024;

/// What the guest has done that it may not, once it has.
pub(crate) type Offence = Arc<OnceLock<String>>;

/// A connection with its gate.
#[derive(Debug)]
pub(crate) struct Gate<S> {
    connection: S,
    requests: Frames,
    answers: Frames,
    /// The ids of requests without an answer.
    owed: HashSet<u32>,
    /// Callers learn of the end of a connection in many ways, but from here why it was.
    offence: Offence,
}

impl<S> Gate<S> {
    pub(crate) fn new(connection: S) -> Self {
        Self {
            connection,
            requests: Frames::default(),
            answers: Frames::default(),
            owed: HashSet::new(),
            offence: Offence::default(),
        }
    }

    pub(crate) fn offence(&self) -> Offence {
        Arc::clone(&self.offence)
    }

    fn forbidden(&self, why: String) -> io::Error {
        io::Error::new(
            io::ErrorKind::InvalidData,
            self.offence.get_or_init(|| why).as_str(),
        )
    }

    /// The proxy has sent these bytes, which come next.
    pub(crate) fn sent(&mut self, bytes: &[u8]) -> io::Result<()> {
        let owed = &mut self.owed;
        let checked = self.requests.follow(bytes, |header| {
            if header.type_ != MESSAGE_TYPE_REQUEST {
                return Err("the proxy sends a frame that is no request".to_owned());
            }
            if owed.len() >= MOST_OWED {
                return Err(format!("the guest owes {MOST_OWED} answers"));
            }
            owed.insert(header.stream_id);
            Ok(())
        });
        checked.map_err(|why| self.forbidden(why))
    }

    /// The guest has sent these bytes, which come next.
    pub(crate) fn received(&mut self, bytes: &[u8]) -> io::Result<()> {
        let owed = &mut self.owed;
        let checked = self.answers.follow(bytes, |header| {
            let id = header.stream_id;
            if header.type_ != MESSAGE_TYPE_RESPONSE {
                return Err(format!("the guest sent a frame of type {}", header.type_));
            }
            if !owed.remove(&id) {
                return Err(format!(
                    "the guest answered a request {id} that it has not got"
                ));
            }
            match usize::try_from(header.length) {
                Ok(length) if length <= MAX_ANSWER => Ok(()),
                _ => Err(format!(
                    "the guest sent an answer of {} bytes",
                    header.length
                )),
            }
        });
        checked.map_err(|why| self.forbidden(why))
    }
}

/// How far one direction has come in its frames.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; MESSAGE_HEADER_LENGTH],
    /// How much of the header there is.
    known: usize,
    /// How much of the payload behind the last whole header is still to come.
    payload: usize,
}

impl Frames {
    /// Shows each header that is whole with these bytes, which come next in the stream.
    fn follow(
        &mut self,
        mut bytes: &[u8],
        mut check: impl FnMut(MessageHeader) -> Result<(), String>,
    ) -> Result<(), String> {
        while !bytes.is_empty() {
            if self.payload > 0 {
                let (_, rest) = bytes.split_at(self.payload.min(bytes.len()));
                self.payload -= bytes.len() - rest.len();
                bytes = rest;
                continue;
            }
            let missing = &mut self.header[self.known..];
            let (part, rest) = bytes.split_at(missing.len().min(bytes.len()));
            missing[..part.len()].copy_from_slice(part);
            self.known += part.len();
            bytes = rest;
            if self.known == MESSAGE_HEADER_LENGTH {
                let header = MessageHeader::from(self.header);
                check(header)?;
                (self.known, self.payload) = (0, header.length as usize);
            }
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gate<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.connection).poll_read(context, buffer))?;
        let read = buffer.filled().get(before..).unwrap_or_default();
        // Bytes that may not come are taken back: whoever reads gets the error alone.
        let checked = self.received(read);
        if checked.is_err() {
            buffer.set_filled(before);
        }
        Poll::Ready(checked)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gate<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.connection).poll_write(context, bytes))?;
        // The answer can't come before this: reader and writer share the gate's lock.
        self.sent(bytes.get(..written).unwrap_or_default())?;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }
}
