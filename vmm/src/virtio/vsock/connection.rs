//! One vsock stream: packets on the guest's side, a UNIX socket on the host's.
//!
//! `muxer` routes packets here, reports the socket's readiness and asks for the next packet to the
//! guest. This file moves bytes and counts credit (virtio 1.2, 5.10.6.3). Deliberately absent:
//! virtqueues (`super`), ports, epoll and limits on the number of connections (`muxer`).
//!
//! ```text
//!   LocalRequest ──RESPONSE──▶ Open ──told both ways shut──────────────▶ Gone
//!        │                      │ RST; SHUTDOWN of both ways; a broken rule
//!        └──RST, or given up──▶ Resetting (RST owed) ──▶ Draining (bytes for the host) ──▶ Gone
//! ```
//!
//! A half-closed stream is `Open` with one direction shut: by the guest (`guest_shut`: SHUTDOWN
//! came), or by the host (`host_shut`: end of file, or it no longer reads; the guest gets a
//! SHUTDOWN).
//!
//! Invariants:
//! - At most [`BUFFER`] bytes wait for the host. A guest that sends more was told not to: its
//!   stream is reset.
//! - At most [`MAX_PAYLOAD`] bytes wait for the guest, and no more are on their way than it
//!   granted.
//! - Nothing here blocks: the socket is non-blocking.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown};

use super::packet::{
    Credit, HEADER_SIZE, Header, MAX_PAYLOAD, Operation, Payload, Ports, Room, Shut,
};
use crate::virtio::{chain::Malformed, number};

/// How many bytes the guest may send ahead of the host's reader.
pub const BUFFER: u32 = 256 * 1024;

/// One read takes bytes for at most this many packets, if that is below [`MAX_PAYLOAD`].
const MOST_PACKETS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// REQUEST is sent or owed; no answer has come.
    LocalRequest,
    /// Bytes flow in each direction that is not shut.
    Open,
    /// The guest is owed a RST and not listened to.
    Resetting,
    /// Over for the guest; the host still gets the accepted bytes.
    Draining,
    /// Nothing is left to do.
    Gone,
}

/// What the socket is ready for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Readiness {
    /// Bytes or the end can be read.
    pub readable: bool,
    pub writable: bool,
    /// The other end is closed, or both directions are shut.
    pub hung_up: bool,
}

#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    socket: OwnedFd,
    state: State,
    guest_shut: Shut,
    host_shut: Shut,
    /// The part of `host_shut` that the guest knows.
    told: Shut,

    /// Bytes for the host that its socket has not taken yet.
    unsent: VecDeque<u8>,
    /// Bytes that have left `unsent` or never had to wait there, and how many of them the guest
    /// knows.
    forwarded: u32,
    announced: u32,

    /// Bytes from the host; the guest has got the first `taken`.
    read: Vec<u8>,
    taken: usize,
    /// For how many packets the next read takes bytes. Doubles while a burst lasts.
    packets: usize,
    readable: bool,
    /// Bytes sent to the guest, and the size of its buffer.
    sent: u32,
    peer: Credit,

    /// The REQUEST or RESPONSE that has not gone out.
    opening: Option<Operation>,
    owes_credit: bool,
    /// We have asked the guest for credit since it last granted some.
    asked: bool,
}

impl Connection {
    /// A connection from the host; the guest gets a REQUEST.
    pub fn to_guest(ports: Ports, socket: OwnedFd) -> Self {
        Self::new(ports, socket, State::LocalRequest, Operation::Request)
    }

    /// A connection from the guest, which is accepted.
    pub fn from_guest(ports: Ports, socket: OwnedFd, peer: Credit) -> Self {
        Self {
            peer,
            ..Self::new(ports, socket, State::Open, Operation::Response)
        }
    }

    fn new(ports: Ports, socket: OwnedFd, state: State, opening: Operation) -> Self {
        Self {
            ports,
            socket,
            state,
            guest_shut: Shut::default(),
            host_shut: Shut::default(),
            told: Shut::default(),
            unsent: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            read: Vec::new(),
            taken: 0,
            packets: 1,
            readable: false,
            sent: 0,
            peer: Credit::default(),
            opening: Some(opening),
            owes_credit: false,
            asked: false,
        }
    }

    /// Whether packets with `ports` belong to this connection.
    pub fn answers_to(&self, ports: Ports) -> bool {
        self.ports == ports && !matches!(self.state, State::Draining | State::Gone)
    }

    /// Whether nothing is left to do. Dropping it then closes the socket.
    pub fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    /// How many bytes wait for the host.
    #[cfg(test)]
    pub fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Whether it waits for room in the socket.
    pub fn wants_writable(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether there is a packet for the guest, as far as that is known without a read.
    pub fn owes_packet(&self) -> bool {
        match self.state {
            State::LocalRequest => self.opening.is_some(),
            State::Open => {
                self.opening.is_some()
                    || self.owes_credit
                    || self.untold() != self.told
                    || (self.has_data() && (self.window() > 0 || !self.asked))
            }
            State::Resetting => true,
            State::Draining | State::Gone => false,
        }
    }

    /// Takes a packet from the guest, with its payload.
    pub fn receive(&mut self, header: &Header, payload: &mut impl Payload) {
        if self.state == State::Resetting && header.operation != Operation::Reset {
            return;
        }
        self.peer = header.credit;
        if self.window() > 0 {
            self.asked = false;
        }
        match (header.operation, self.state) {
            (Operation::Reset, _) => self.guest_left(),
            (Operation::Response, State::LocalRequest) if self.opening.is_none() => {
                self.state = State::Open;
            }
            (Operation::Data, State::Open) if !self.guest_shut.send => {
                self.take(header.payload, payload);
            }
            (Operation::Shutdown, State::Open) => self.shut_by_guest(header.shut),
            (Operation::CreditUpdate, State::Open) => {}
            (Operation::CreditRequest, State::Open) => self.owes_credit = true,
            _ => self.abort(),
        }
    }

    /// Ends it at once: the guest gets a RST, the host the end of file. Waiting bytes are lost.
    pub fn abort(&mut self) {
        self.unsent = VecDeque::new();
        self.state = match (self.state, self.opening) {
            // The guest has never heard of this connection.
            (State::LocalRequest, Some(_)) | (State::Draining | State::Gone, _) => State::Gone,
            _ => State::Resetting,
        };
    }

    /// Reacts to the socket's readiness.
    pub fn host_ready(&mut self, ready: Readiness) {
        if ready.hung_up {
            self.hung_up();
        }
        self.readable |= ready.readable || ready.hung_up;
        if ready.writable {
            self.flush();
        }
    }

    /// Writes the next packet to the guest's buffer. False: there was none after all.
    pub fn send(&mut self, room: &mut impl Room) -> Result<bool, Malformed> {
        if self.state == State::Resetting {
            self.put(room, Operation::Reset, Shut::default())?;
            self.guest_left();
            return Ok(true);
        }
        if !matches!(self.state, State::LocalRequest | State::Open) {
            return Ok(false);
        }
        if let Some(operation) = self.opening {
            self.put(room, operation, Shut::default())?;
            self.opening = None;
            return Ok(true);
        }
        if self.state != State::Open {
            return Ok(false);
        }
        if self.has_data() && self.window() > 0 && self.send_data(room)? {
            return Ok(true);
        }
        let shut = self.untold();
        if shut != self.told {
            self.put(room, Operation::Shutdown, shut)?;
            self.told = shut;
            if shut.both() {
                self.state = State::Gone;
            }
            return Ok(true);
        }
        if self.owes_credit {
            self.put(room, Operation::CreditUpdate, Shut::default())?;
            return Ok(true);
        }
        if self.has_data() && self.window() == 0 && !self.asked {
            self.put(room, Operation::CreditRequest, Shut::default())?;
            self.asked = true;
            return Ok(true);
        }
        Ok(false)
    }

    /// What the guest must hear now of the host's side. It hears of the end only after the last
    /// byte.
    fn untold(&self) -> Shut {
        Shut {
            receive: self.host_shut.receive,
            send: self.host_shut.send && self.taken == self.read.len(),
        }
    }

    fn has_data(&self) -> bool {
        let waits = self.taken < self.read.len() || (self.readable && !self.host_shut.send);
        waits && !self.guest_shut.receive
    }

    /// How many bytes the guest has room for. A guest that lies about it stalls itself.
    fn window(&self) -> usize {
        let on_the_way = self.sent.wrapping_sub(self.peer.forwarded);
        number::index(self.peer.allocated.saturating_sub(on_the_way))
    }

    fn put(
        &mut self,
        room: &mut impl Room,
        operation: Operation,
        shut: Shut,
    ) -> Result<(), Malformed> {
        let header = Header {
            shut,
            ..Header::new(self.ports, operation)
        };
        self.put_header(room, header)
    }

    /// Every packet carries our credit, so each one pays what we owe of it.
    fn put_header(&mut self, room: &mut impl Room, header: Header) -> Result<(), Malformed> {
        let credit = Credit {
            allocated: BUFFER,
            forwarded: self.forwarded,
        };
        room.put(&Header { credit, ..header }.to_bytes())?;
        self.announced = self.forwarded;
        self.owes_credit = false;
        Ok(())
    }

    fn send_data(&mut self, room: &mut impl Room) -> Result<bool, Malformed> {
        let fits = room.room().saturating_sub(HEADER_SIZE);
        if self.taken == self.read.len() {
            self.read_socket(fits);
        }
        let waiting = self.read.get(self.taken..).unwrap_or_default();
        let count = waiting.len().min(self.window()).min(fits);
        if count == 0 {
            return Ok(false);
        }
        let header = Header {
            payload: count,
            ..Header::new(self.ports, Operation::Data)
        };
        self.put_header(room, header)?;
        let end = self.taken + count;
        room.put(self.read.get(self.taken..end).unwrap_or_default())?;
        self.taken = end;
        self.sent = self.sent.wrapping_add(number::small(count)); // at most MAX_PAYLOAD
        Ok(true)
    }

    /// Reads until the socket would block: only then does the next arrival signal the epoll set
    /// again. `fits` is what one packet takes, so a burst goes out in full packets.
    fn read_socket(&mut self, fits: usize) {
        let size = fits.saturating_mul(self.packets).clamp(1, MAX_PAYLOAD);
        self.read = Vec::with_capacity(size);
        self.taken = 0;
        loop {
            match rustix::io::read(&self.socket, spare_capacity(&mut self.read)) {
                Ok(0) => self.host_ended(),
                Ok(got) if got >= size => self.packets = (2 * self.packets).min(MOST_PACKETS),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    self.read = Vec::new();
                    self.packets = 1;
                }
                Err(_) => {
                    self.host_ended();
                    self.host_stopped_reading();
                }
            }
            return;
        }
    }

    fn host_ended(&mut self) {
        self.host_shut.send = true;
        self.readable = false;
        self.read = Vec::new();
    }

    /// Drops what waits for the host, and what still comes.
    fn host_stopped_reading(&mut self) {
        self.host_shut.receive = true;
        self.forwarded = self
            .forwarded
            .wrapping_add(number::small(self.unsent.len()));
        self.unsent = VecDeque::new();
        if self.state == State::Draining {
            self.state = State::Gone;
        }
    }

    fn hung_up(&mut self) {
        self.host_stopped_reading();
        if self.guest_shut.receive {
            self.host_ended(); // it is not read any more, so nobody would see its end
        }
        if self.state == State::LocalRequest {
            // A writer may finish before the guest has answered: its bytes are not lost.
            let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            if !matches!(recv(&self.socket, &mut [0_u8; 1][..], peek), Ok((1.., _))) {
                self.abort();
            }
        }
    }

    fn guest_left(&mut self) {
        self.read = Vec::new();
        self.taken = 0;
        self.state = match self.unsent.is_empty() {
            true => State::Gone,
            false => State::Draining,
        };
    }

    fn shut_by_guest(&mut self, shut: Shut) {
        self.guest_shut = self.guest_shut.with(shut);
        if self.guest_shut.both() {
            // The guest has closed its socket and waits for this answer (5.10.6.5).
            self.state = State::Resetting;
            return;
        }
        if self.guest_shut.receive {
            self.read = Vec::new();
            self.taken = 0;
            self.shut_socket(Shutdown::Read);
        }
        if self.guest_shut.send && self.unsent.is_empty() {
            self.shut_socket(Shutdown::Write);
        }
    }

    /// Fails only if the other end is gone; that has an event of its own.
    fn shut_socket(&self, how: Shutdown) {
        let _ = shutdown(&self.socket, how);
    }

    /// Sends payload from the guest straight to the socket. What the socket does not take waits
    /// here.
    fn take(&mut self, length: usize, payload: &mut impl Payload) {
        if self.host_shut.receive {
            self.count_forwarded(length);
            return;
        }
        if self.unsent.len() + length > number::index(BUFFER) {
            return self.abort(); // we told it to send no more than that
        }
        let mut left = length;
        while left > 0 && self.unsent.is_empty() {
            match payload.send(self.socket.as_fd(), left) {
                Ok(0) => break,
                Ok(sent) => {
                    left = left.saturating_sub(sent);
                    self.count_forwarded(sent);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.count_forwarded(left);
                    return self.host_stopped_reading();
                }
            }
        }
        if left > 0 {
            let mut rest = vec![0; left];
            match payload.copy(&mut rest) {
                Ok(()) => self.unsent.extend(rest),
                Err(_) => self.abort(), // shorter than its header says; `packet` has checked that
            }
        }
    }

    /// Sends the bytes that wait for the host.
    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match write_socket(self.socket.as_fd(), &self.unsent) {
                Ok(sent) => {
                    self.unsent.drain(..sent.min(self.unsent.len()));
                    self.count_forwarded(sent);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => return self.host_stopped_reading(),
            }
        }
        self.unsent = VecDeque::new(); // gives the memory back
        match self.state {
            State::Draining => self.state = State::Gone,
            State::Open if self.guest_shut.send => self.shut_socket(Shutdown::Write),
            _ => {}
        }
    }

    /// The guest hears of room unasked when half of the buffer is free: it may be waiting for some.
    fn count_forwarded(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(number::small(count)); // at most BUFFER
        if self.forwarded.wrapping_sub(self.announced) >= BUFFER / 2 {
            self.owes_credit = true;
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn write_socket(socket: BorrowedFd, bytes: &VecDeque<u8>) -> Result<usize, Errno> {
    let (first, second) = bytes.as_slices();
    let parts = [IoSlice::new(first), IoSlice::new(second)];
    sendmsg(
        socket,
        &parts,
        &mut SendAncillaryBuffer::default(),
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )
}

#[cfg(test)]
mod tests;
