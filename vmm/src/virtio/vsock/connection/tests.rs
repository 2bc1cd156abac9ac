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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_guest_hears_what_the_standard_allows(
        by_guest: bool,
        answered in proptest::bool::weighted(0.8),
        acts in proptest::collection::vec(act(), 1..80),
    ) {
        let (ours, host) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        let mut host = Some(host);
        let mut model = Model::default();
        let mut connection = match by_guest {
            true => Connection::from_guest(PORTS, ours.into(), Credit::default()),
            false => Connection::to_guest(PORTS, ours.into()),
        };
        model.accepted = by_guest;
        if answered && !by_guest {
            let mut buffer = Buffer { bytes: Vec::new(), size: 4096 };
            prop_assert!(connection.send(&mut buffer).unwrap());
            model.hear(&buffer.bytes)?;
            connection.receive(&Header::new(PORTS, Operation::Response), &mut &[][..]);
            model.accepted = true;
        }
        let (mut written, mut read) = (Vec::new(), Vec::new());
        let mut said = Vec::new();
        for act in acts {
            match act {
                Act::Say(operation, length, shut) if connection.answers_to(PORTS) => {
                    let payload = if operation == Operation::Data { length } else { 0 };
                    let mut body = pattern(said.len(), payload);
                    let header = Header {
                        payload,
                        shut,
                        credit: model.granted,
                        ..Header::new(PORTS, operation)
                    };
                    model.accepted |= operation == Operation::Response && model.requests == 1;
                    model.said += payload as u32;
                    said.extend_from_slice(body);
                    connection.receive(&header, &mut body);
                }
                Act::Grant(more) => {
                    model.granted = Credit {
                        allocated: model.granted.allocated.max(more),
                        forwarded: model.heard.len() as u32,
                    };
                    if connection.answers_to(PORTS) && model.accepted {
                        let update = Header {
                            credit: model.granted,
                            ..Header::new(PORTS, Operation::CreditUpdate)
                        };
                        connection.receive(&update, &mut &[][..]);
                    }
                }
                Act::Hear(size) => {
                    let owed = connection.owes_packet();
                    let mut buffer = Buffer { bytes: Vec::new(), size };
                    let sent = connection.send(&mut buffer).unwrap();
                    prop_assert_eq!(sent, !buffer.bytes.is_empty());
                    prop_assert!(owed || !sent, "a packet that nobody waits for");
                    if sent {
                        model.hear(&buffer.bytes)?;
                    }
                }
                Act::Ready(readable, writable) => connection.host_ready(Readiness {
                    readable,
                    writable,
                    hung_up: host.is_none(),
                }),
                Act::Write(size) => {
                    let bytes = pattern(written.len(), size);
                    if let Some(count) = host.as_mut().and_then(|host| host.write(bytes).ok()) {
                        written.extend_from_slice(&bytes[..count]);
                    }
                }
                Act::Read(size) => {
                    let mut bytes = vec![0; size];
                    if let Some(count) = host.as_mut().and_then(|host| host.read(&mut bytes).ok()) {
                        read.extend_from_slice(&bytes[..count]);
                    }
                }
                Act::Half(sending) => {
                    if let Some(host) = &host {
                        let _ = host.shutdown(if sending { Half::Write } else { Half::Read });
                    }
                }
                Act::Close => host = None,
                Act::Say(..) => {}
            }
            prop_assert!(connection.unsent() <= BUFFER as usize);
            // The bytes come in order, without a gap or an invention.
            prop_assert!(written.starts_with(&model.heard));
            prop_assert!(said.starts_with(&read));
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
