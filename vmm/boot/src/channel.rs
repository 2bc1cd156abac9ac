//! The socket between shim and child: each message is one JSON document and some file descriptors.
//!
//! `SOCK_SEQPACKET` keeps messages apart (unix(7)), so there is no framing to get wrong. A message
//! that is truncated, is not JSON or brings too many descriptors is an error, never a guess.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// In bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// The most file descriptors beside one message (the kernel's own limit is 253).
pub const MAX_FDS: usize = 32;

/// Why a message did not pass. The caller's own error has the step and its object.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("{step} on the control socket")]
    Io {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The other side closed its end.
    #[error("the control socket was closed by the other side")]
    Closed,
    /// Nothing came within this time.
    #[error("no message on the control socket within {0:?}")]
    TimedOut(Duration),
    /// More than [`MAX_MESSAGE`] bytes or [`MAX_FDS`] descriptors.
    #[error(
        "a message on the control socket is larger than {MAX_MESSAGE} bytes or brings more than {MAX_FDS} descriptors"
    )]
    TooLarge,
    /// The bytes are not the JSON document that was expected.
    #[error("a message on the control socket is not what was expected")]
    Json(#[source] serde_json::Error),
    /// The number of descriptors is not the one that the message calls for.
    #[error("a message on the control socket brings {got} descriptors instead of {wanted}")]
    Descriptors {
        /// How many came.
        got: usize,
        /// How many the message calls for.
        wanted: usize,
    },
    /// The sender was built from another version of this crate.
    #[error(
        "the control socket speaks version {theirs}, this program version {ours}: they are from different installations"
    )]
    Version {
        /// The sender's version.
        theirs: u32,
        /// This crate's version.
        ours: u32,
    },
}

/// One end of the control socket.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Two connected ends, both close-on-exec.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| io("make a socket pair", errno))?;
        Ok((Self(one), Self(other)))
    }

    /// Wraps a connected `SOCK_SEQPACKET` socket.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// The socket itself, for a child or an event loop.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// From now on a full socket (its reader is stuck) is an error at once, and not an endless
    /// wait.
    pub fn set_nonblocking(&self) -> Result<(), ChannelError> {
        rustix::io::ioctl_fionbio(&self.0, true)
            .map_err(|errno| io("make sending non-blocking", errno))
    }

    /// Sends one message. Waits for a stuck reader, unless [`Channel::set_nonblocking`] was called.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Json)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::TooLarge);
        }
        loop {
            match sendmsg(
                &self.0,
                &[IoSlice::new(&bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            ) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ChannelError::Closed);
                }
                Err(errno) => return Err(io("send a message", errno)),
            }
        }
    }

    /// Receives one message and the descriptors beside it (close-on-exec).
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = loop {
            match recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(message) => break message,
                // The kernel reports once that the other side closed with our messages unread. What
                // that side had sent before, the reason of its end, still comes, and then
                // end-of-file.
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNRESET) => continue,
                Err(errno) => return Err(io("receive a message", errno)),
            }
        };
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|part| match part {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if message.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        if message
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(ChannelError::TooLarge);
        }
        let document = bytes.get(..message.bytes).unwrap_or_default();
        let parsed = serde_json::from_slice(document).map_err(ChannelError::Json)?;
        Ok((parsed, fds))
    }

    /// Like [`Channel::receive`], but gives up after `deadline`.
    pub fn receive_within<T: DeserializeOwned>(
        &self,
        deadline: Duration,
    ) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let end = std::time::Instant::now() + deadline;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| ChannelError::TimedOut(deadline))?;
            let mut waiting = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut waiting, Some(&timeout)) {
                Ok(0) => return Err(ChannelError::TimedOut(deadline)),
                Ok(_) => return self.receive(),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(io("wait for a message", errno)),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn io(step: &'static str, errno: rustix::io::Errno) -> ChannelError {
    ChannelError::Io {
        step,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (one, other) = Channel::pair().unwrap();
        let (carried, _keep) = Channel::pair().unwrap();
        one.send(&"hello", &[carried.as_fd(), carried.as_fd()])
            .unwrap();
        let (text, fds): (String, _) = other.receive_within(Duration::from_secs(1)).unwrap();
        assert_eq!((text.as_str(), fds.len()), ("hello", 2));
    }

    #[test]
    fn a_closed_end_and_silence_are_told_apart() {
        let (one, other) = Channel::pair().unwrap();
        let silent = other.receive_within::<String>(Duration::from_millis(20));
        assert!(matches!(silent, Err(ChannelError::TimedOut(_))));
        drop(one);
        let closed = other.receive_within::<String>(Duration::from_secs(1));
        assert!(matches!(closed, Err(ChannelError::Closed)));
    }

    #[test]
    fn last_words_arrive_although_the_other_side_left_messages_unread() {
        let (one, other) = Channel::pair().unwrap();
        one.send(&"unread", &[]).unwrap();
        other.send(&"last words", &[]).unwrap();
        drop(other);
        let (text, _): (String, _) = one.receive_within(Duration::from_secs(1)).unwrap();
        assert_eq!(text, "last words");
        let closed = one.receive_within::<String>(Duration::from_secs(1));
        assert!(matches!(closed, Err(ChannelError::Closed)));
    }

    #[test]
    fn a_reader_that_is_stuck_holds_up_no_sender() {
        let (one, _stuck) = Channel::pair().unwrap();
        one.set_nonblocking().unwrap();
        let full = (0..100_000).find_map(|_| one.send(&"x", &[]).err());
        assert!(matches!(full, Some(ChannelError::Io { .. })), "{full:?}");
    }

    #[test]
    fn a_message_over_the_limit_is_refused() {
        let (one, _other) = Channel::pair().unwrap();
        let long = "x".repeat(MAX_MESSAGE);
        assert!(matches!(one.send(&long, &[]), Err(ChannelError::TooLarge)));
    }

    proptest! {
        /// Whatever bytes come, the parser returns a message or an error.
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 1..600)) {
            let (one, other) = Channel::pair().unwrap();
            rustix::io::write(&one, &bytes).unwrap();
            let _ = other.receive::<crate::VmBoot>();
        }
    }
}
