//! One stream against a model: what the guest may hear, in which order, and how much.

use std::io::{Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;

const PORTS: Ports = Ports {
    host: 1 << 30,
    guest: 1025,
};

/// What the guest sends or the host writes. Each byte tells its place, as far as one byte can.
static PATTERN: [u8; 400_000] = {
    let mut bytes = [0; 400_000];
    let mut at = 0;
    while at < bytes.len() {
        bytes[at] = (at % 251) as u8;
        at += 1;
    }
    bytes
};

/// `length` bytes of the pattern from place `first` on.
fn pattern(first: usize, length: usize) -> &'static [u8] {
    &PATTERN[first % 251..][..length]
}

/// A receive buffer of the guest, of any size.
struct Buffer {
    bytes: Vec<u8>,
    size: usize,
}

impl Room for Buffer {
    fn room(&self) -> usize {
        self.size - self.bytes.len()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        assert!(bytes.len() <= self.room(), "more than the buffer holds");
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

/// What the guest has heard so far, and what it may hear next.
#[derive(Default)]
struct Model {
    requests: u32,
    responses: u32,
    accepted: bool,
    told: Shut,
    over: bool,
    heard: Vec<u8>,
    granted: Credit,
    forwarded: u32,
    said: u32,
}

impl Model {
    fn hear(&mut self, bytes: &[u8]) -> Result<(), TestCaseError> {
        let (head, body) = bytes.split_at(HEADER_SIZE);
        let field = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let operation = u16::from_le_bytes(head[30..32].try_into().unwrap());
        prop_assert!(!self.over, "operation {operation} after the end");
        prop_assert_eq!((field(16), field(20)), (PORTS.host, PORTS.guest));
        prop_assert_eq!(field(24) as usize, body.len());
        prop_assert_eq!(field(36), BUFFER);
        // No more leaves our buffer than came, and the number never goes back.
        let forwarded = field(40);
        prop_assert!(forwarded >= self.forwarded && forwarded <= self.said);
        self.forwarded = forwarded;
        if operation != 1 && operation != 3 {
            prop_assert!(self.accepted, "operation {operation} before the answer");
        }
        match operation {
            1 => self.requests += 1,
            2 => self.responses += 1,
            3 => self.over = true,
            4 => {
                let shut = Shut {
                    receive: field(32) & 1 != 0,
                    send: field(32) & 2 != 0,
                };
                prop_assert_ne!(shut, self.told);
                prop_assert_eq!(shut.with(self.told), shut, "a direction was opened again");
                self.told = shut;
                self.over = shut.both();
            }
            5 => {
                prop_assert!(!self.told.send && !body.is_empty());
                self.heard.extend_from_slice(body);
                let ahead = (self.heard.len() as u32).wrapping_sub(self.granted.forwarded);
                prop_assert!(ahead <= self.granted.allocated, "more than was granted");
            }
            6 | 7 => prop_assert!(body.is_empty()),
            other => prop_assert!(false, "operation {other}"),
        }
        prop_assert!(self.requests <= 1 && self.responses <= 1);
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Act {
    /// The guest sends, with its credit as given. It is honest: its credit never shrinks.
    Say(Operation, usize, Shut),
    Grant(u32),
    Hear(usize),
    Ready(bool, bool),
    Write(usize),
    Read(usize),
    Half(bool),
    Close,
}

fn act() -> impl Strategy<Value = Act> {
    let operation = prop_oneof![
        4 => Just(Operation::Data),
        2 => Just(Operation::Response),
        1 => Just(Operation::Shutdown),
        1 => Just(Operation::CreditUpdate),
        1 => Just(Operation::CreditRequest),
        1 => prop_oneof![Just(Operation::Reset), Just(Operation::Request)],
    ];
    let shut = (any::<bool>(), any::<bool>()).prop_map(|(receive, send)| Shut { receive, send });
    let length = prop_oneof![0..300_usize, Just(MAX_PAYLOAD)];
    prop_oneof![
        6 => (operation, length, shut).prop_map(|(operation, length, shut)| Act::Say(operation, length, shut)),
        2 => (0..100_000_u32).prop_map(Act::Grant),
        6 => (HEADER_SIZE + 1..70_000_usize).prop_map(Act::Hear),
        5 => (any::<bool>(), any::<bool>()).prop_map(|(read, write)| Act::Ready(read, write)),
        4 => (1..300_000_usize).prop_map(Act::Write),
        3 => (1..300_000_usize).prop_map(Act::Read),
        1 => any::<bool>().prop_map(Act::Half),
        1 => Just(Act::Close),
    ]
}

/// A connection between a host's process and a guest, with what passed between them.
struct World {
    connection: Connection,
    /// Until it closes its end.
    host: Option<UnixStream>,
    model: Model,
    /// What the host's process has written and read.
    written: Vec<u8>,
    read: Vec<u8>,
    /// What the guest has sent.
    said: Vec<u8>,
}

impl World {
    fn new(by_guest: bool) -> Self {
        let (ours, host) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        let connection = match by_guest {
            true => Connection::from_guest(PORTS, ours.into(), Credit::default()),
            false => Connection::to_guest(PORTS, ours.into()),
        };
        let model = Model {
            accepted: by_guest,
            ..Model::default()
        };
        Self {
            connection,
            host: Some(host),
            model,
            written: Vec::new(),
            read: Vec::new(),
            said: Vec::new(),
        }
    }

    /// The guest takes the connection that the host asks for.
    fn accept(&mut self) -> Result<(), TestCaseError> {
        let mut buffer = Buffer {
            bytes: Vec::new(),
            size: 4096,
        };
        prop_assert!(self.connection.send(&mut buffer).unwrap());
        self.model.hear(&buffer.bytes)?;
        let response = Header::new(PORTS, Operation::Response);
        self.connection.receive(&response, &mut &[][..]);
        self.model.accepted = true;
        Ok(())
    }

    fn act(&mut self, act: &Act) -> Result<(), TestCaseError> {
        match *act {
            Act::Say(operation, length, shut) => self.say(operation, length, shut),
            Act::Grant(more) => self.grant(more),
            Act::Hear(size) => self.hear(size)?,
            Act::Ready(readable, writable) => self.connection.host_ready(Readiness {
                readable,
                writable,
                hung_up: self.host.is_none(),
            }),
            Act::Write(size) => {
                let bytes = pattern(self.written.len(), size);
                let written = self.host.as_mut().map(|host| host.write(bytes));
                if let Some(Ok(count)) = written {
                    self.written.extend_from_slice(&bytes[..count]);
                }
            }
            Act::Read(size) => {
                let mut bytes = vec![0; size];
                let read = self.host.as_mut().map(|host| host.read(&mut bytes));
                if let Some(Ok(count)) = read {
                    self.read.extend_from_slice(&bytes[..count]);
                }
            }
            Act::Half(sending) => {
                if let Some(host) = &self.host {
                    let _ = host.shutdown(if sending { Half::Write } else { Half::Read });
                }
            }
            Act::Close => self.host = None,
        }
        Ok(())
    }

    fn say(&mut self, operation: Operation, length: usize, shut: Shut) {
        if !self.connection.answers_to(PORTS) {
            return;
        }
        let payload = match operation {
            Operation::Data => length,
            _ => 0,
        };
        let mut body = pattern(self.said.len(), payload);
        let header = Header {
            payload,
            shut,
            credit: self.model.granted,
            ..Header::new(PORTS, operation)
        };
        self.model.accepted |= operation == Operation::Response && self.model.requests == 1;
        self.model.said += payload as u32;
        self.said.extend_from_slice(body);
        self.connection.receive(&header, &mut body);
    }

    fn grant(&mut self, more: u32) {
        self.model.granted = Credit {
            allocated: self.model.granted.allocated.max(more),
            forwarded: self.model.heard.len() as u32,
        };
        if self.connection.answers_to(PORTS) && self.model.accepted {
            let update = Header {
                credit: self.model.granted,
                ..Header::new(PORTS, Operation::CreditUpdate)
            };
            self.connection.receive(&update, &mut &[][..]);
        }
    }

    fn hear(&mut self, size: usize) -> Result<(), TestCaseError> {
        let owed = self.connection.owes_packet();
        let mut buffer = Buffer {
            bytes: Vec::new(),
            size,
        };
        let sent = self.connection.send(&mut buffer).unwrap();
        prop_assert_eq!(sent, !buffer.bytes.is_empty());
        prop_assert!(owed || !sent, "a packet that nobody waits for");
        match sent {
            true => self.model.hear(&buffer.bytes),
            false => Ok(()),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_guest_hears_what_the_standard_allows(
        by_guest: bool,
        answered in proptest::bool::weighted(0.8),
        acts in proptest::collection::vec(act(), 1..80),
    ) {
        let mut world = World::new(by_guest);
        if answered && !by_guest {
            world.accept()?;
        }
        for act in &acts {
            world.act(act)?;
            prop_assert!(world.connection.unsent() <= BUFFER as usize);
            // The bytes come in order, without a gap or an invention.
            prop_assert!(world.written.starts_with(&world.model.heard));
            prop_assert!(world.said.starts_with(&world.read));
        }
    }
}

#[test]
fn credit_counts_go_round() {
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let near_the_end = Credit {
        allocated: 100,
        forwarded: u32::MAX - 9,
    };
    let mut connection = Connection::from_guest(PORTS, ours.into(), near_the_end);
    connection.sent = u32::MAX - 9;
    host.write_all(&[1; 150]).unwrap();
    let ready = Readiness {
        readable: true,
        ..Readiness::default()
    };
    connection.host_ready(ready);
    let mut sizes = Vec::new();
    let mut hear = |connection: &mut Connection| {
        let mut buffer = Buffer {
            bytes: Vec::new(),
            size: 4096,
        };
        while connection.send(&mut buffer).unwrap() {
            sizes.push(buffer.bytes.len() - HEADER_SIZE);
            buffer.bytes.clear();
        }
    };
    hear(&mut connection);
    let update = Header {
        credit: Credit {
            allocated: 100,
            forwarded: 90,
        },
        ..Header::new(PORTS, Operation::CreditUpdate)
    };
    connection.receive(&update, &mut &[][..]);
    hear(&mut connection);
    // The response, 100 bytes, a request for credit, the other 50 (wrapped from 90 to 140).
    assert_eq!(sizes, [0, 100, 0, 50]);
    assert_eq!(connection.sent, 140);
}

/// Counts at every edge of 32 bits: the window is what is allocated less what is on the way, in
/// numbers that don't wrap.
#[test]
fn the_window_is_right_at_every_edge() {
    let (ours, _host) = UnixStream::pair().unwrap();
    let mut connection = Connection::from_guest(PORTS, ours.into(), Credit::default());
    let ends = [0u32, 1 << 16, 1 << 18, 1 << 31].into_iter();
    let edges: Vec<u32> = ends
        .flat_map(|end| (0..5u32).map(move |step| end.wrapping_add(step).wrapping_sub(2)))
        .collect();
    for sent in &edges {
        for forwarded in &edges {
            for allocated in &edges {
                connection.sent = *sent;
                (connection.peer.forwarded, connection.peer.allocated) = (*forwarded, *allocated);
                let on_the_way = (u64::from(*sent) + (1 << 32) - u64::from(*forwarded)) % (1 << 32);
                let room = u64::from(*allocated).saturating_sub(on_the_way);
                let window = connection.window() as u64;
                assert_eq!(window, room, "{sent} {forwarded} {allocated}");
            }
        }
    }
}

#[test]
fn a_guest_that_lies_about_its_buffer_stalls_itself() {
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let lie = Credit {
        allocated: u32::MAX,
        forwarded: 1000, // nothing was sent yet
    };
    let mut connection = Connection::from_guest(PORTS, ours.into(), lie);
    assert!(connection.window() < u32::MAX as usize);
    host.write_all(b"x").unwrap();
    let none = Credit {
        allocated: 10,
        forwarded: 1000,
    };
    let header = Header {
        credit: none,
        ..Header::new(PORTS, Operation::CreditUpdate)
    };
    connection.receive(&header, &mut &[][..]);
    assert_eq!(connection.window(), 0);
}
