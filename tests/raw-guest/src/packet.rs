//! Packets of vsock (virtio 1.2, 5.10.6), of any content, both ways.

use crate::dice::Dice;
use crate::machine::{DATA, load, store, until};
use crate::say;
use crate::session::Session;
use crate::transport::{NEXT, WRITE};

/// Headers of packets to the host; the payload of all of them.
const OUT: u64 = DATA + 0x20_0000;
const PAYLOAD: u64 = DATA + 0x30_0000;
/// Buffers for packets to the guest.
const IN: u64 = DATA + 0x40_0000;

const HEADER: u32 = 44;
/// How many packets are under way each way.
const MOST: u16 = 64;
const ROOM: u32 = 4096;

pub const MAX_PAYLOAD: u32 = 64 << 10;

/// The port at which the host takes one connection, and one at which nobody is.
pub const AGENT: u32 = 1024;
pub const NOBODY: u32 = 9;
/// The guest's own port in these tests.
const OWN: u32 = 77;

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RESET: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const BYTES: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy)]
pub struct Packet {
    pub source: u64,
    pub target: u64,
    pub own: u32,
    pub peer: u32,
    pub length: u32,
    pub kind: u16,
    pub operation: u16,
    pub flags: u32,
    pub allocated: u32,
    pub forwarded: u32,
}

impl Packet {
    /// By the book, to this port of the host.
    pub fn new(operation: u16, peer: u32) -> Self {
        Self {
            source: 3,
            target: 2,
            own: OWN,
            peer,
            length: 0,
            kind: 1,
            operation,
            flags: 0,
            allocated: 1 << 18,
            forwarded: 0,
        }
    }

    fn write(&self, at: u64) {
        store(at, self.source);
        store(at + 8, self.target);
        store(at + 16, self.own);
        store(at + 20, self.peer);
        store(at + 24, self.length);
        store(at + 28, self.kind);
        store(at + 30, self.operation);
        store(at + 32, self.flags);
        store(at + 36, self.allocated);
        store(at + 40, self.forwarded);
    }

    /// From the host: its own port is the peer's.
    fn read(at: u64) -> Self {
        Self {
            own: load(at + 20),
            peer: load(at + 16),
            length: load(at + 24),
            ..Self::new(load(at + 30), 0)
        }
    }

    pub fn dice(dice: &mut Dice) -> Self {
        let lie = dice.below(4) == 0;
        let any = dice.number();
        Self {
            source: if lie {
                dice.one_of(&[0, 1, 2, 3, 1 << 32 | 3, any])
            } else {
                3
            },
            target: if lie {
                dice.one_of(&[0, 1, 2, 3, 1 << 63 | 2, any])
            } else {
                2
            },
            own: dice.one_of(&[OWN, 1025, 0, u32::MAX, any as u32]),
            peer: dice.one_of(&[AGENT, 1025, 1 << 30, (1 << 30) + 5, u32::MAX, any as u32]),
            length: dice.one_of(&[0, 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, u32::MAX, any as u32]),
            kind: if lie { any as u16 } else { 1 },
            operation: dice.below(9) as u16,
            flags: dice.one_of(&[0, 1, 2, 3, u32::MAX]),
            allocated: dice.one_of(&[0, 1, 1 << 18, u32::MAX]),
            forwarded: dice.one_of(&[0, 1, 1 << 31, u32::MAX, any as u32]),
        }
    }
}

/// Gives the host buffers for its packets.
pub fn listen(session: &mut Session) {
    let ring = &mut session.rings[0];
    for index in 0..MOST {
        ring.describe(
            index,
            IN + u64::from(index) * u64::from(ROOM),
            ROOM,
            WRITE,
            0,
        );
        ring.offer(index);
    }
    session.device.kick(0);
}

/// Sends a packet with that many bytes behind its header. Waits if too many are under way.
pub fn send(session: &mut Session, packet: &Packet, bytes: u32) {
    let ring = &mut session.rings[1];
    if ring.available.wrapping_sub(ring.used()) >= MOST {
        finish(session);
    }
    let ring = &mut session.rings[1];
    let slot = ring.available % MOST;
    let at = OUT + u64::from(slot) * 64;
    packet.write(at);
    let flags = if bytes > 0 { NEXT } else { 0 };
    ring.describe(2 * slot, at, HEADER, flags, 2 * slot + 1);
    ring.describe(2 * slot + 1, PAYLOAD, bytes, 0, 0);
    ring.offer(2 * slot);
}

/// Waits until the host has taken all packets.
pub fn finish(session: &mut Session) -> bool {
    session.device.kick(1);
    let ring = session.rings[1];
    let taken = until(|| ring.used() == ring.available);
    if !taken {
        say!("wrong: the host takes no packets");
    }
    taken
}

/// The next packet from the host, if there is one; its buffer goes back if `back`.
pub fn next(session: &mut Session, back: bool) -> Option<Packet> {
    let (head, _) = session.rings[0].take()?;
    let packet = Packet::read(IN + u64::from(head) * u64::from(ROOM));
    if back {
        session.rings[0].offer(head as u16);
        session.device.kick(0);
    }
    Some(packet)
}

/// Waits for a packet of this kind.
pub fn comes(session: &mut Session, wanted: impl Fn(&Packet) -> bool) -> bool {
    until(|| next(session, true).is_some_and(|packet| wanted(&packet)))
}

/// By the book: nobody is at that port, and the host says so.
pub fn is_refused(session: &mut Session) -> bool {
    listen(session);
    send(session, &Packet::new(REQUEST, NOBODY), 0);
    finish(session);
    comes(session, |packet| {
        (packet.operation, packet.own, packet.peer) == (RESET, OWN, NOBODY)
    })
}

/// Makes the host owe an answer, whatever the queue of its packets holds.
pub fn dial_nobody(session: &mut Session) {
    send(session, &Packet::new(REQUEST, NOBODY), 0);
    session.device.kick(1);
}
