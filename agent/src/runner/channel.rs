//! The socket between agent and runner: one packet is one message, with file descriptors beside it.
//!
//! The agent (`client`) holds one end. The runner holds the other, and the container's process
//! inherits that. It is close-on-exec, so its end tells the agent that the command runs. Requests
//! come from the agent and are trusted. What the agent reads from here is bounded all the same.

use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kata_like_failure::{Failure, Step};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::error::Result;
use super::request::{Message, Request};

/// The longest message that can be sent.
const LONGEST: usize = 32 << 10;
/// The most file descriptors beside one message: a request with every namespace and three streams.
const MOST_FDS: usize = 16;

/// One end of the socket.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// Makes both ends: the agent's, which doesn't block, and the runner's, which does.
    pub(super) fn pair() -> Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .step(|| "make a socket pair for the runner")?;
        rustix::fs::fcntl_setfl(&ours, rustix::fs::OFlags::NONBLOCK)
            .step(|| "set the runner's socket non-blocking")?;
        Ok((Self(ours), theirs))
    }

    /// Takes the runner's end, the file descriptor that it was started with.
    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends the request. Its JSON is in a memory file, the first of the descriptors.
    pub(super) fn send_request(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let json = serde_json::to_vec(request).step(|| "write the runner's request")?;
        let memory = rustix::fs::memfd_create("request", MemfdFlags::CLOEXEC)
            .step(|| "make a memory file for the runner's request")?;
        let mut memory = std::fs::File::from(memory);
        memory
            .write_all(&json)
            .step(|| "write the runner's request")?;
        memory.rewind().step(|| "write the runner's request")?;
        let mut all = vec![memory.as_fd()];
        all.extend_from_slice(fds);
        self.send_packet(b"request", &all)
            .step(|| "send the runner its request")
    }

    /// The other side of `send_request`.
    pub(super) fn receive_request(&self) -> Result<(Request, Vec<OwnedFd>)> {
        let (_, mut fds) = self
            .receive_packet()
            .step(|| "receive the runner's request")?;
        if fds.is_empty() {
            return Err(Failure::failed(
                "receive the runner's request",
                "it came without a file",
            ));
        }
        let mut json = Vec::new();
        std::fs::File::from(fds.remove(0))
            .read_to_end(&mut json)
            .step(|| "read the runner's request")?;
        let request = serde_json::from_slice(&json).step(|| "read the runner's request")?;
        Ok((request, fds))
    }

    /// Sends one message. Without descriptors it is one write(2), which a container's seccomp
    /// profile allows where anything at all can run.
    pub(super) fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let json = serde_json::to_vec(message).step(|| "write a message to the agent")?;
        if fds.is_empty() {
            rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &json)).map(drop)
        } else {
            self.send_packet(&json, fds)
        }
        .step(|| "send a message to the agent")
    }

    /// Receives one message without waiting. `None`: the other end is closed.
    pub(super) fn try_receive(&self) -> std::io::Result<Option<(Message, Vec<OwnedFd>)>> {
        let (packet, fds) = self.receive_packet()?;
        if packet.is_empty() {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&packet)?, fds)))
    }

    /// Lets the container's process go on.
    pub(super) fn send_byte(&self, byte: u8) -> rustix::io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &[byte])).map(drop)
    }

    /// Waits for one byte. `None`: the agent has closed its end.
    pub(super) fn receive_byte(&self) -> rustix::io::Result<Option<u8>> {
        let mut byte = [0];
        let got = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut byte))?;
        Ok((got == 1).then_some(byte[0]))
    }

    fn send_packet(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG);
        }
        rustix::io::retry_on_intr(|| {
            sendmsg(
                &self.0,
                &[IoSlice::new(packet)],
                &mut control,
                SendFlags::NOSIGNAL,
            )
        })
        .map(drop)
    }

    fn receive_packet(&self) -> rustix::io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut packet = vec![0; LONGEST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut packet)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        packet.truncate(received.bytes);
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        Ok((packet, fds))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
