//! A vsock packet's header, copied once and checked once (virtio 1.2, 5.10.6).
//!
//! `muxer` parses what the guest sends and writes what it receives. There is no unchecked
//! [`Header`] of the guest: its CIDs are right, its operation is known, and its payload is no
//! longer than the limit and than the chain that carried it.

use crate::virtio::Chain;
use crate::virtio::chain::Malformed;

use std::io;
use std::os::fd::BorrowedFd;

/// The guest's CID. There is one guest, so any number above the host's would do.
pub const GUEST_CID: u64 = 3;

/// The host's CID (VMADDR_CID_HOST).
pub const HOST_CID: u64 = 2;

/// The longest payload of one packet, either way; Linux sends no more.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// The size of `struct virtio_vsock_hdr`.
pub const HEADER_SIZE: usize = 44;

/// VIRTIO_VSOCK_TYPE_STREAM, the only type that is offered.
const STREAM: u16 = 1;

/// What a packet does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one.
    Reset,
    /// Says that its sender will no longer send, or no longer receive.
    Shutdown,
    /// Carries data.
    Data,
    /// Tells how much buffer space its sender has.
    CreditUpdate,
    /// Asks for the receiver's buffer space.
    CreditRequest,
}

impl Operation {
    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    fn parse(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The directions that a side has shut down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shut {
    /// It will no longer receive (VIRTIO_VSOCK_SHUTDOWN_RCV).
    pub receive: bool,
    /// It will no longer send (VIRTIO_VSOCK_SHUTDOWN_SEND).
    pub send: bool,
}

impl Shut {
    fn from_flags(flags: u32) -> Self {
        Self {
            receive: flags & 1 != 0,
            send: flags & 2 != 0,
        }
    }

    fn flags(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// Nothing passes in either direction any more.
    pub fn both(self) -> bool {
        self.receive && self.send
    }

    pub fn with(self, other: Self) -> Self {
        Self {
            receive: self.receive || other.receive,
            send: self.send || other.send,
        }
    }
}

/// The connection that a packet belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// What each packet tells about its sender's receive buffer (5.10.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// The buffer's size in bytes.
    pub allocated: u32,
    /// Bytes that have left the buffer since the connection began, modulo 2^32.
    pub forwarded: u32,
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub ports: Ports,
    pub operation: Operation,
    /// What a shutdown shuts. No other operation has flags.
    pub shut: Shut,
    /// The sender's receive buffer.
    pub credit: Credit,
    /// Bytes of payload that follow; 0 except for [`Operation::Data`].
    pub payload: usize,
}

/// What a packet from the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A packet that keeps the rules.
    Packet(Header),
    /// A packet for the host that breaks the rules: its connection must be reset.
    Refused(Ports),
    /// Nothing that can be answered: a forged address, or a reset that is itself malformed.
    Ignored,
}

/// Takes a header from the guest's `bytes`. `held` is how many bytes follow it in the chain.
pub fn parse(bytes: &[u8; HEADER_SIZE], held: usize) -> Received {
    let mut fields = Fields(bytes);
    let (source, target) = (fields.u64(), fields.u64());
    let (guest, host) = (fields.u32(), fields.u32());
    let (length, kind, operation) = (fields.u32(), fields.u16(), fields.u16());
    let (flags, allocated, forwarded) = (fields.u32(), fields.u32(), fields.u32());
    if source != GUEST_CID || target != HOST_CID {
        return Received::Ignored;
    }
    let ports = Ports { host, guest };
    let operation = Operation::parse(operation);
    let payload = match (operation, usize::try_from(length)) {
        (Some(Operation::Data), Ok(length)) if length <= MAX_PAYLOAD && length <= held => length,
        (Some(Operation::Data), _) => return Received::Refused(ports),
        // No other operation has a payload; Linux ignores a length there, and so do we.
        _ => 0,
    };
    match operation {
        // Never answer a reset by a reset: two sides could go on for ever.
        Some(Operation::Reset) if kind != STREAM => Received::Ignored,
        Some(operation) if kind == STREAM => Received::Packet(Header {
            ports,
            operation,
            shut: match operation {
                Operation::Shutdown => Shut::from_flags(flags),
                _ => Shut::default(),
            },
            credit: Credit {
                allocated,
                forwarded,
            },
            payload,
        }),
        _ => Received::Refused(ports),
    }
}

impl Header {
    /// A packet from the host, without payload.
    pub fn new(ports: Ports, operation: Operation) -> Self {
        Self {
            ports,
            operation,
            shut: Shut::default(),
            credit: Credit::default(),
            payload: 0,
        }
    }

    /// The header's bytes, from the host to the guest.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let length = u32::try_from(self.payload).unwrap_or(u32::MAX);
        let fields: [&[u8]; 10] = [
            &HOST_CID.to_le_bytes(),
            &GUEST_CID.to_le_bytes(),
            &self.ports.host.to_le_bytes(),
            &self.ports.guest.to_le_bytes(),
            &length.to_le_bytes(),
            &STREAM.to_le_bytes(),
            &self.operation.number().to_le_bytes(),
            &self.shut.flags().to_le_bytes(),
            &self.credit.allocated.to_le_bytes(),
            &self.credit.forwarded.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

/// Little-endian fields, one after the other. Past the end all are 0; `HEADER_SIZE` excludes that.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// The bytes behind a header from the guest.
pub trait Payload {
    /// Sends at most `limit` bytes to a stream socket without copying; returns how many went.
    fn send(&mut self, socket: BorrowedFd, limit: usize) -> io::Result<usize>;
    /// Copies the next bytes.
    fn copy(&mut self, into: &mut [u8]) -> Result<(), Malformed>;
}

impl Payload for Chain {
    fn send(&mut self, socket: BorrowedFd, limit: usize) -> io::Result<usize> {
        self.read_into(socket, limit)
    }

    fn copy(&mut self, into: &mut [u8]) -> Result<(), Malformed> {
        self.read_exact(into)
    }
}

/// A buffer of the guest that waits for a packet.
pub trait Room {
    /// How many bytes are left in it.
    fn room(&self) -> usize;
    /// Writes all of `bytes`. Fails if they don't fit.
    fn put(&mut self, bytes: &[u8]) -> Result<(), Malformed>;
}

impl Room for Chain {
    fn room(&self) -> usize {
        self.writable()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        self.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The header as the guest writes it: like the host's, with the addresses exchanged.
    pub(super) fn from_guest(header: Header) -> [u8; HEADER_SIZE] {
        let mut bytes = header.to_bytes();
        let (source, target) = (GUEST_CID.to_le_bytes(), HOST_CID.to_le_bytes());
        bytes[..8].copy_from_slice(&source);
        bytes[8..16].copy_from_slice(&target);
        bytes[16..20].copy_from_slice(&header.ports.guest.to_le_bytes());
        bytes[20..24].copy_from_slice(&header.ports.host.to_le_bytes());
        bytes
    }

    const PORTS: Ports = Ports {
        host: 0x1234_5678,
        guest: 0x9abc_def0,
    };

    #[test]
    fn the_layout_is_the_standard_s() {
        let header = Header {
            shut: Shut {
                receive: true,
                send: true,
            },
            credit: Credit {
                allocated: 0x0102_0304,
                forwarded: 0x0506_0708,
            },
            ..Header::new(PORTS, Operation::Shutdown)
        };
        let wanted = [
            2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, // cids
            0x78, 0x56, 0x34, 0x12, 0xf0, 0xde, 0xbc, 0x9a, // ports
            0, 0, 0, 0, 1, 0, 4, 0, 3, 0, 0, 0, // len, type, op, flags
            4, 3, 2, 1, 8, 7, 6, 5, // buf_alloc, fwd_cnt
        ];
        assert_eq!(header.to_bytes(), wanted);
    }

    #[test]
    fn forged_addresses_are_ignored() {
        let good = from_guest(Header::new(PORTS, Operation::Request));
        assert!(matches!(parse(&good, 0), Received::Packet(_)));
        for byte in 0..16 {
            let mut forged = good;
            forged[byte] ^= 1;
            assert_eq!(parse(&forged, 0), Received::Ignored);
        }
    }

    #[test]
    fn a_payload_fits_the_limit_and_the_chain() {
        let data = |length: usize| {
            from_guest(Header {
                payload: length,
                ..Header::new(PORTS, Operation::Data)
            })
        };
        let long = 10 * MAX_PAYLOAD;
        for (length, held, good) in [
            (0, 0, true),
            (1, 0, false),
            (100, 99, false),
            (100, 100, true),
            (MAX_PAYLOAD, long, true),
            (MAX_PAYLOAD + 1, long, false),
            (u32::MAX as usize, long, false),
        ] {
            let packet = matches!(parse(&data(length), held), Received::Packet(_));
            assert_eq!(packet, good, "{length} of {held}");
        }
    }

    #[test]
    fn other_types_and_operations_are_refused_but_a_reset_is_never_answered() {
        let change = |operation: Operation, at: usize, value: u8| {
            let mut bytes = from_guest(Header::new(PORTS, operation));
            bytes[at] = value;
            parse(&bytes, 0)
        };
        let (kind, operation) = (28, 30);
        assert_eq!(
            change(Operation::Request, kind, 2),
            Received::Refused(PORTS)
        );
        assert_eq!(change(Operation::Reset, kind, 2), Received::Ignored);
        for unknown in [0, 8, 255] {
            let answer = change(Operation::Request, operation, unknown);
            assert_eq!(answer, Received::Refused(PORTS));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic_or_lie(bytes: [u8; HEADER_SIZE], held in 0..200_000_usize) {
            if let Received::Packet(header) = parse(&bytes, held) {
                prop_assert!(header.payload <= held && header.payload <= MAX_PAYLOAD);
            }
        }

        #[test]
        fn what_is_written_is_read(
            host: u32, guest: u32, number in 1..8_u16, flags in 0..4_u32,
            allocated: u32, forwarded: u32, payload in 0..=MAX_PAYLOAD,
        ) {
            let operation = Operation::parse(number).unwrap();
            let header = Header {
                ports: Ports { host, guest },
                operation,
                shut: match operation {
                    Operation::Shutdown => Shut::from_flags(flags),
                    _ => Shut::default(),
                },
                credit: Credit { allocated, forwarded },
                payload: if operation == Operation::Data { payload } else { 0 },
            };
            let parsed = parse(&from_guest(header), MAX_PAYLOAD);
            prop_assert_eq!(parsed, Received::Packet(header));
        }
    }
}
