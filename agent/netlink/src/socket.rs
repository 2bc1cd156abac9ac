//! The socket: a request goes out and its answer comes back, with the kernel's words if it refuses.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use kata_like_linux::socket::SocketOption;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

use crate::message::{Attributes, HEADER, Message, number, text};

/// How long the kernel may take for an answer. It answers at once, unless another thread holds a
/// lock.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest part of an answer that the kernel sends, in bytes.
const PART: usize = 64 << 10;
/// How often we ask again for a list that changed while we read it.
const TRIES: usize = 8;

const NLMSGERR_ATTR_MSG: u16 = 1;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLM_F_DUMP_INTR: u16 = 0x10;

/// A socket of one network namespace: that of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        // No protocol is that of NETLINK_ROUTE.
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        for option in [SocketOption::NetlinkShortErrors, SocketOption::NetlinkWords] {
            // Without it an error has no words: no failure here.
            let _ = kata_like_linux::socket::set(&fd, option);
        }
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(DEADLINE))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends a request that changes something, and waits for the answer.
    pub fn change(&mut self, message: Message) -> io::Result<()> {
        self.send(message, libc::NLM_F_ACK)?;
        self.answers(|_, _| ()).map(drop)
    }

    /// Requests a list. `each` gets every entry's bytes, from the fixed header on.
    pub fn list<T>(
        &mut self,
        message: &Message,
        kind: u16,
        mut each: impl FnMut(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..TRIES {
            let mut list = Vec::new();
            self.send(message.clone(), libc::NLM_F_DUMP)?;
            let whole = self.answers(|found, bytes| {
                if found == kind {
                    list.extend(each(bytes));
                }
            })?;
            if whole {
                return Ok(list);
            }
        }
        Err(io::Error::other("the list changes faster than it is read"))
    }

    fn send(&mut self, message: Message, flags: libc::c_int) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(flags | libc::NLM_F_REQUEST, self.sequence);
        rustix::net::send(&self.fd, &bytes, rustix::net::SendFlags::empty())?;
        Ok(())
    }

    /// Takes all messages of the answer. `false`: the list has changed meanwhile.
    fn answers(&mut self, mut each: impl FnMut(u16, &[u8])) -> io::Result<bool> {
        let mut part = vec![0; PART];
        let mut whole = true;
        loop {
            let flags = rustix::net::RecvFlags::TRUNC;
            let (_, length) = match rustix::net::recv(&self.fd, part.as_mut_slice(), flags) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                got => got?,
            };
            let mut rest = part
                .get(..length)
                .ok_or_else(|| io::Error::other("an answer of the kernel's is too long"))?;
            while rest.len() >= HEADER {
                let length = number(rest, 0) as usize;
                let message = rest
                    .get(HEADER..length)
                    .ok_or_else(|| io::Error::other("an answer of the kernel's is cut off"))?;
                let (kind, flags) = halves(number(rest, 4));
                let ours = number(rest, 8) == self.sequence;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if !ours {
                    continue; // the answer to a request that was given up
                }
                whole &= flags & NLM_F_DUMP_INTR == 0;
                match libc::c_int::from(kind) {
                    libc::NLMSG_DONE if (number(message, 0) as i32) < 0 => {
                        return Err(refusal(message, flags));
                    }
                    libc::NLMSG_DONE => return Ok(whole),
                    libc::NLMSG_ERROR if number(message, 0) == 0 => return Ok(whole),
                    libc::NLMSG_ERROR => return Err(refusal(message, flags)),
                    _ => each(kind, message),
                }
            }
        }
    }
}

/// Type and flags of a header, which are neighbours there.
fn halves(word: u32) -> (u16, u16) {
    let [a, b, c, d] = word.to_ne_bytes();
    (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]))
}

/// An errno, with the kernel's own words if there are any.
fn refusal(message: &[u8], flags: u16) -> io::Error {
    let errno = io::Error::from_raw_os_error((number(message, 0) as i32).saturating_neg());
    if flags & NLM_F_ACK_TLVS == 0 {
        return errno;
    }
    // Behind the errno comes the request's header, and the rest of the request unless it was
    // capped.
    let request = match flags & NLM_F_CAPPED {
        0 => number(message, 4) as usize,
        _ => HEADER,
    };
    let words = message.get(4 + request.next_multiple_of(4)..);
    let words = words.and_then(|bytes| Attributes(bytes).get(NLMSGERR_ATTR_MSG));
    match words {
        Some(words) => Refusal {
            words: text(words),
            errno,
        }
        .into(),
        None => errno,
    }
}

/// A refusal in the kernel's own words.
#[derive(Debug)]
struct Refusal {
    words: String,
    errno: io::Error,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(to, "{}: {}", self.words, self.errno)
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.errno.kind(), refusal)
    }
}
