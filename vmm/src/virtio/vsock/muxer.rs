//! All vsock streams: which packet and which socket belong together.
//!
//! `super` brings packets from the guest and buffers for packets to it, and calls when the muxer's
//! own epoll set is ready. This file decides who may connect, and keeps ports, fairness and limits.
//!
//! Who may connect: the guest once, ever, to `agent_port`; it is joined to the socket that the VMM
//! was started with. The host as often as it likes, through the listening socket, each time to
//! `stream_port` of the guest from a port not used before. Anything else gets a RST.
//!
//! Invariants:
//! - At most [`MAX_CONNECTIONS`] streams and [`MAX_RESETS`] answers wait, each with bounded
//!   buffers.
//! - A stream whose socket or whose guest is stuck is not in `ready`, so it delays nobody.
//! - Each stream sends one packet and goes to the end of the line.
//!
//! Sockets are watched edge-triggered: a stream reads until its socket would block, and only a
//! stream with unsent bytes is watched for room.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::connection::{Connection, Readiness};
use super::packet::{self, HEADER_SIZE, Header, Operation, Payload, Ports, Received, Room};
use crate::virtio::DeviceError;
use crate::virtio::chain::Malformed;

/// The most streams at a time. A container has three, an exec three more.
pub const MAX_CONNECTIONS: usize = 1024;

/// The most refusals that wait for a buffer of the guest. Further ones are dropped.
pub const MAX_RESETS: usize = 256;

/// How many connections are accepted, or events taken, before others have their turn.
const BATCH: usize = 64;

/// The first port of the host's own connections; far from any port with a meaning.
const FIRST_PORT: u32 = 1 << 30;

const LISTENER: u64 = u64::MAX;

/// Called when the guest's agent has connected.
pub type OnAgent = Box<dyn FnOnce() + Send>;

/// The ports with a meaning, and the sockets behind them.
pub struct Endpoints {
    /// The host's port to which the guest may connect once.
    pub agent_port: u32,
    /// The guest's port to which the host's connections go.
    pub stream_port: u32,
    /// The socket to which the guest's connection is joined.
    pub agent: OwnedFd,
    /// The listening socket to which the host connects.
    pub streams: OwnedFd,
    /// Called when the guest has connected.
    pub on_agent: OnAgent,
}

struct Stream {
    connection: Connection,
    /// It is in `ready`.
    queued: bool,
    /// Its socket is watched for room.
    watched: bool,
}

/// All streams of one device.
pub struct Muxer {
    agent_port: u32,
    stream_port: u32,
    agent: Option<(OwnedFd, OnAgent)>,
    listener: OwnedFd,
    listening: bool,
    epoll: OwnedFd,
    /// By the host's port, which no two share.
    streams: BTreeMap<u32, Stream>,
    next_port: u32,
    ready: VecDeque<u32>,
    resets: VecDeque<Ports>,
    /// The last packet was a reset, so now it is a stream's turn.
    reset_last: bool,
}

impl Muxer {
    /// Makes the sockets non-blocking. Accepts nothing before [`Muxer::start`].
    pub fn new(endpoints: Endpoints) -> Result<Self, DeviceError> {
        for socket in [&endpoints.agent, &endpoints.streams] {
            rustix::fs::fcntl_getfl(socket)
                .and_then(|flags| rustix::fs::fcntl_setfl(socket, flags | OFlags::NONBLOCK))
                .map_err(|errno| failed("make a vsock socket non-blocking", errno))?;
        }
        let epoll = epoll::create(CreateFlags::CLOEXEC)
            .map_err(|errno| failed("make an epoll set for vsock", errno))?;
        Ok(Self {
            agent_port: endpoints.agent_port,
            stream_port: endpoints.stream_port,
            agent: Some((endpoints.agent, endpoints.on_agent)),
            listener: endpoints.streams,
            listening: false,
            epoll,
            streams: BTreeMap::new(),
            next_port: FIRST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            reset_last: false,
        })
    }

    /// The guest has switched the device on: accepts the host's connections.
    pub fn start(&mut self) -> Result<(), DeviceError> {
        self.listen()
    }

    /// The guest has reset the device: ends every stream. The agent's stream can't be had again.
    pub fn stop(&mut self) {
        self.streams.clear();
        self.ready.clear();
        self.resets.clear();
        self.stop_listening();
    }

    /// Whether there may be a packet for the guest.
    pub fn owes_packet(&self) -> bool {
        !self.ready.is_empty() || !self.resets.is_empty()
    }

    /// Takes a packet from the guest: its header, and at most `held` bytes of payload.
    pub fn receive(
        &mut self,
        header: &[u8; HEADER_SIZE],
        payload: &mut impl Payload,
        held: usize,
    ) -> Result<(), DeviceError> {
        let (ports, header) = match packet::parse(header, held) {
            Received::Ignored => return Ok(()),
            Received::Refused(ports) => (ports, None),
            Received::Packet(header) => (header.ports, Some(header)),
        };
        let known = self
            .streams
            .get_mut(&ports.host)
            .filter(|stream| stream.connection.answers_to(ports));
        match (known, header) {
            (Some(stream), Some(header)) => stream.connection.receive(&header, payload),
            (Some(stream), None) => stream.connection.abort(),
            (None, Some(header)) => return self.receive_unknown(&header),
            (None, None) => {
                self.refuse(ports);
                return Ok(());
            }
        }
        self.settle(ports.host);
        Ok(())
    }

    /// Takes the events of the epoll set.
    pub fn host_ready(&mut self) -> Result<(), DeviceError> {
        let mut events = Vec::with_capacity(BATCH);
        match epoll::wait(
            &self.epoll,
            spare_capacity(&mut events),
            Some(&Timespec::default()),
        ) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()), // it is still ready
            Err(errno) => return Err(failed("wait for vsock's sockets", errno)),
        }
        for event in events {
            let (data, flags) = (event.data.u64(), event.flags);
            if data == LISTENER {
                self.accept()?;
                continue;
            }
            // An event of a stream that has ended meanwhile finds none: its port is not reused.
            let Ok(port) = u32::try_from(data) else {
                continue;
            };
            if let Some(stream) = self.streams.get_mut(&port) {
                stream.connection.host_ready(Readiness {
                    readable: flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                    writable: flags.contains(EventFlags::OUT),
                    hung_up: flags.intersects(EventFlags::HUP | EventFlags::ERR),
                });
                self.settle(port);
            }
        }
        Ok(())
    }

    /// Writes the next packet to a buffer of the guest. False: there is none.
    pub fn send(&mut self, room: &mut impl Room) -> Result<bool, Malformed> {
        if !self.reset_last && self.send_reset(room)? {
            self.reset_last = true;
            return Ok(true);
        }
        self.reset_last = false;
        for _ in 0..self.ready.len() {
            let Some(port) = self.ready.pop_front() else {
                break;
            };
            let Some(stream) = self.streams.get_mut(&port) else {
                continue;
            };
            stream.queued = false;
            let sent = stream.connection.send(room);
            self.settle(port);
            if sent? {
                return Ok(true);
            }
        }
        self.send_reset(room)
    }

    fn send_reset(&mut self, room: &mut impl Room) -> Result<bool, Malformed> {
        let Some(ports) = self.resets.pop_front() else {
            return Ok(false);
        };
        room.put(&Header::new(ports, Operation::Reset).to_bytes())?;
        Ok(true)
    }

    fn receive_unknown(&mut self, header: &Header) -> Result<(), DeviceError> {
        let ports = header.ports;
        match header.operation {
            Operation::Reset => {}
            Operation::Request if ports.host == self.agent_port => match self.agent.take() {
                Some((socket, on_agent)) => {
                    self.add(ports, Connection::from_guest(ports, socket, header.credit))?;
                    on_agent();
                }
                None => self.refuse(ports),
            },
            _ => self.refuse(ports),
        }
        Ok(())
    }

    fn refuse(&mut self, ports: Ports) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(ports);
        }
    }

    fn accept(&mut self) -> Result<(), DeviceError> {
        for _ in 0..BATCH {
            match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                // At the limit the caller's connection is closed at once.
                Ok(_) if self.streams.len() >= MAX_CONNECTIONS => {}
                Ok(socket) => {
                    let ports = self.fresh_ports();
                    self.add(ports, Connection::to_guest(ports, socket))?;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    // Callers wait in the socket's queue until a stream has ended.
                    self.stop_listening();
                    break;
                }
                Err(errno) => return Err(failed("accept a vsock stream", errno)),
            }
        }
        Ok(())
    }

    fn fresh_ports(&mut self) -> Ports {
        while self.next_port == self.agent_port || self.streams.contains_key(&self.next_port) {
            self.advance_port();
        }
        let host = self.next_port;
        self.advance_port();
        Ports {
            host,
            guest: self.stream_port,
        }
    }

    /// VMADDR_PORT_ANY, the highest number, is no port.
    fn advance_port(&mut self) {
        self.next_port = match self.next_port {
            FIRST_PORT..=0xffff_fffd => self.next_port + 1,
            _ => FIRST_PORT,
        };
    }

    fn add(&mut self, ports: Ports, connection: Connection) -> Result<(), DeviceError> {
        let data = EventData::new_u64(u64::from(ports.host));
        epoll::add(&self.epoll, &connection, data, interest(false))
            .map_err(|errno| failed("watch a vsock stream", errno))?;
        let stream = Stream {
            connection,
            queued: false,
            watched: false,
        };
        self.streams.insert(ports.host, stream);
        self.settle(ports.host);
        Ok(())
    }

    /// Call it after anything has happened to a stream. It sets its place in the line, its watch,
    /// its end.
    fn settle(&mut self, port: u32) {
        let Some(stream) = self.streams.get_mut(&port) else {
            return;
        };
        let wanted = stream.connection.wants_writable();
        if wanted != stream.watched {
            let data = EventData::new_u64(u64::from(port));
            match epoll::modify(&self.epoll, &stream.connection, data, interest(wanted)) {
                Ok(()) => stream.watched = wanted,
                Err(_) => stream.connection.abort(), // its bytes would never move again
            }
        }
        if stream.connection.is_gone() {
            self.streams.remove(&port); // closes the socket, which ends the watch
            self.ready.retain(|queued| *queued != port);
            if !self.listening {
                // If it fails, the next stream that ends tries again.
                let _ = self.listen();
            }
        } else if stream.connection.owes_packet() && !stream.queued {
            stream.queued = true;
            self.ready.push_back(port);
        }
    }

    fn listen(&mut self) -> Result<(), DeviceError> {
        if !self.listening {
            let data = EventData::new_u64(LISTENER);
            epoll::add(&self.epoll, &self.listener, data, EventFlags::IN)
                .map_err(|errno| failed("watch for vsock streams", errno))?;
            self.listening = true;
        }
        Ok(())
    }

    fn stop_listening(&mut self) {
        if self.listening {
            // Fails only for a descriptor that is not watched.
            let _ = epoll::delete(&self.epoll, &self.listener);
            self.listening = false;
        }
    }
}

/// The epoll set. It is readable when [`Muxer::host_ready`] has work.
impl AsFd for Muxer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn interest(writable: bool) -> EventFlags {
    let always = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
    match writable {
        true => always | EventFlags::OUT,
        false => always,
    }
}

fn failed(step: &'static str, errno: Errno) -> DeviceError {
    DeviceError::host(step, io::Error::from(errno))
}

#[cfg(test)]
mod tests;
