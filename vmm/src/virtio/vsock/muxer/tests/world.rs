//! A guest that speaks packets, a host of real sockets, and the muxer between them.

use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::super::packet::{
    self, Credit, GUEST_CID, HEADER_SIZE, HOST_CID, Header, Operation, Payload, Ports, Received,
    Room, Shut,
};
use super::super::{Endpoints, Muxer};
use crate::virtio::chain::Malformed;

pub const AGENT: u32 = 1024;
pub const STREAM: u32 = 2048;
/// One page: the buffer that Linux 6.12 gives for a packet.
pub const PAGE: usize = 4096;

impl Payload for &[u8] {
    fn send(&mut self, socket: BorrowedFd, limit: usize) -> io::Result<usize> {
        let part = &self[..limit.min(self.len())];
        let flags = rustix::net::SendFlags::NOSIGNAL;
        let sent = rustix::net::send(socket, part, flags)?;
        *self = &self[sent..];
        Ok(sent)
    }

    fn copy(&mut self, into: &mut [u8]) -> Result<(), Malformed> {
        let (now, rest) = self.split_at(into.len());
        into.copy_from_slice(now);
        *self = rest;
        Ok(())
    }
}

pub struct Buffer(Vec<u8>);

impl Room for Buffer {
    fn room(&self) -> usize {
        PAGE - self.0.len()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        assert!(bytes.len() <= self.room(), "more than the buffer holds");
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// A header as the guest writes it.
pub fn header(ports: Ports, operation: Operation) -> Header {
    Header {
        credit: Credit {
            allocated: 1 << 20,
            forwarded: 0,
        },
        ..Header::new(ports, operation)
    }
}

pub fn to_bytes(header: &Header) -> [u8; HEADER_SIZE] {
    let turned = Header {
        ports: Ports {
            host: header.ports.guest,
            guest: header.ports.host,
        },
        ..*header
    };
    let mut bytes = turned.to_bytes();
    bytes[..8].copy_from_slice(&GUEST_CID.to_le_bytes());
    bytes[8..16].copy_from_slice(&HOST_CID.to_le_bytes());
    bytes
}

pub fn parse(bytes: &[u8]) -> (Header, Vec<u8>) {
    let head: [u8; HEADER_SIZE] = bytes[..HEADER_SIZE].try_into().unwrap();
    let body = bytes[HEADER_SIZE..].to_vec();
    // Turn it round, so that the parser of the guest's packets reads it.
    let mut turned = head;
    turned[..8].copy_from_slice(&head[8..16]);
    turned[8..16].copy_from_slice(&head[..8]);
    let Received::Packet(header) = packet::parse(&turned, body.len()) else {
        panic!("the muxer sent {head:?}");
    };
    assert_eq!(header.payload, body.len());
    let ports = Ports {
        host: header.ports.guest,
        guest: header.ports.host,
    };
    (Header { ports, ..header }, body)
}

pub struct World {
    pub muxer: Muxer,
    /// The other end of the agent's connection.
    pub agent: UnixStream,
    address: SocketAddr,
    pub dialled: Arc<AtomicUsize>,
}

impl World {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vsock-test-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let (ours, agent) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        let dialled = Arc::new(AtomicUsize::new(0));
        let count = dialled.clone();
        let mut muxer = Muxer::new(Endpoints {
            agent_port: AGENT,
            stream_port: STREAM,
            agent: OwnedFd::from(ours),
            streams: OwnedFd::from(listener),
            on_agent: Box::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        })
        .unwrap();
        muxer.start().unwrap();
        Self {
            muxer,
            agent,
            address,
            dialled,
        }
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect_addr(&self.address).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    pub fn say(&mut self, header: Header, body: &[u8]) {
        let header = Header {
            payload: body.len(),
            ..header
        };
        let mut payload = body;
        self.muxer
            .receive(&to_bytes(&header), &mut payload, body.len())
            .unwrap();
    }

    /// All packets that a guest with enough buffers gets.
    pub fn hear(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut heard = Vec::new();
        loop {
            self.muxer.host_ready().unwrap();
            match self.hear_one() {
                Some(packet) => heard.push(packet),
                None => return heard,
            }
        }
    }

    pub fn hear_one(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut buffer = Buffer(Vec::new());
        match self.muxer.send(&mut buffer).unwrap() {
            true => Some(parse(&buffer.0)),
            false => {
                assert!(buffer.0.is_empty());
                None
            }
        }
    }

    pub fn operations(&mut self) -> Vec<Operation> {
        let heard = self.hear();
        heard.iter().map(|(header, _)| header.operation).collect()
    }

    /// A stream that the host has made and the guest has accepted, with the guest's credit.
    pub fn open(&mut self, credit: Credit) -> (UnixStream, Ports) {
        let stream = self.connect();
        let heard = self.hear();
        let mut requests = heard.iter().map(|(header, _)| header);
        let request = requests.find(|header| header.operation == Operation::Request);
        let request = request.expect("a request");
        assert_eq!(request.ports.guest, STREAM);
        let ports = request.ports;
        let response = Header {
            credit,
            ..header(ports, Operation::Response)
        };
        self.say(response, &[]);
        (stream, ports)
    }
}

pub const ROOMY: Credit = Credit {
    allocated: 1 << 30,
    forwarded: 0,
};

pub fn shutdown(ports: Ports, receive: bool, send: bool) -> Header {
    Header {
        shut: Shut { receive, send },
        ..header(ports, Operation::Shutdown)
    }
}

pub fn at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}
