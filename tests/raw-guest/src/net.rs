//! Frames with headers that lie, and floods, both ways (virtio 1.2, 5.1.6).

use crate::dice::Dice;
use crate::machine::{DATA, put, rest, store, until};
use crate::say;
use crate::session::Session;
use crate::transport::{EVENT_INDEX, NEXT, WRITE};
use crate::victim::{NET, lives};

/// Headers of frames to the host, and the bytes of all of them.
const OUT: u64 = DATA + 0x20_0000;
const BYTES: u64 = DATA + 0x30_0000;
/// Buffers for frames to the guest.
const IN: u64 = DATA + 0x40_0000;

const HEADER: u32 = 12;
/// How many frames are under way each way.
const MOST: u16 = 64;

/// All features: checksums, long segments both ways, mergeable buffers, MAC, MTU.
const ALL: u64 = 1 | 2 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15;

/// An IPv4 packet with TCP in it, to the host's end of the tap.
const TCP: [u8; 54] = [
    2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, // Ethernet
    0x45, 0, 0xff, 0xff, 0, 1, 0, 0, 64, 6, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1, // IPv4
    0, 9, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0, // TCP
];

/// All of it, after the attacks on the rings. The host sends frames all the while.
pub fn attack(count: u64) {
    for features in [0, ALL, ALL | EVENT_INDEX] {
        lies(features, count);
    }
    flood(count);
    buffers();
    resets(count / 40);
}

fn open(features: u64) -> Session {
    let session = NET.prepare_with(features);
    session.device.switch_on();
    session
}

/// Sends a frame whose header is in place.
fn send(session: &mut Session, length: u32, pieces: u16) {
    let device = session.device;
    let ring = &mut session.rings[1];
    if ring.available.wrapping_sub(ring.used()) >= MOST {
        device.kick(1);
        if !until(|| ring.used() == ring.available) {
            say!("wrong: the host takes no frames");
        }
    }
    let slot = ring.available % MOST;
    let first = 3 * slot;
    ring.describe(first, OUT + u64::from(slot) * 16, HEADER, NEXT, first + 1);
    let part = length / u32::from(pieces);
    let more = if pieces > 1 { NEXT } else { 0 };
    ring.describe(first + 1, BYTES, part, more, first + 2);
    ring.describe(first + 2, BYTES + u64::from(part), length - part, 0, 0);
    ring.offer(first);
}

fn finish(session: &mut Session) {
    let ring = session.rings[1];
    session.device.kick(1);
    if !until(|| ring.used() == ring.available) {
        say!("wrong: the host takes no frames");
    }
}

fn lies(features: u64, count: u64) {
    say!("attack 0 net: headers that lie, features {features:#x}");
    let mut dice = Dice::new(21);
    let mut session = open(features);
    put(BYTES, &TCP);
    for _ in 0..count {
        let slot = u64::from(session.rings[1].available % MOST);
        let at = OUT + 16 * slot;
        store(at, dice.one_of(&[0_u8, 1, 2, 4, 255]));
        store(at + 1, dice.one_of(&[0_u8, 1, 3, 4, 5, 0x80, 0x81, 255]));
        for field in 1..6 {
            let number = dice.number();
            let number = dice.one_of(&[0, 14, 34, 54, 1448, 65_535, number as u16]);
            store(at + 2 * field, number);
        }
        let length = dice.one_of(&[0, 1, 13, 14, 54, 60, 1514, 9000, 65_553, 65_554, 1 << 20]);
        send(&mut session, length, 1 + dice.below(2) as u16);
    }
    finish(&mut session);
    lives(&NET);
}

fn flood(count: u64) {
    say!("attack 0 net: a flood of segments to be cut");
    let mut session = open(ALL);
    put(BYTES, &TCP);
    for slot in 0..u64::from(MOST) {
        put(OUT + 16 * slot, &[1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0]);
    }
    for _ in 0..count {
        send(&mut session, 65_549, 2);
    }
    finish(&mut session);
    lives(&NET);
}

/// Receive buffers of odd sizes.
fn buffers() {
    for (features, length) in [
        (ALL, 12),
        (ALL, 13),
        (ALL, 1500),
        (0, 1526),
        (0, 70_000),
        (ALL, 4096),
    ] {
        say!("attack 0 net: receive buffers of {length} bytes, features {features:#x}");
        let mut session = open(features);
        let ring = &mut session.rings[0];
        for index in 0..256 {
            ring.describe(index, IN + u64::from(index) * 8192, length, WRITE, 0);
            ring.offer(index);
        }
        session.device.kick(0);
        session.device.kick(1);
        for _ in 0..20 {
            rest();
            // A driver that never looks at what a frame says of itself, and gives all back.
            while let Some((head, _)) = session.rings[0].take() {
                session.rings[0].offer(head as u16);
            }
            session.device.kick(0);
        }
        lives(&NET);
    }
}

/// Resets while frames go both ways.
fn resets(count: u64) {
    say!("attack 0 net: resets under load");
    for _ in 0..count {
        let mut session = open(ALL);
        put(BYTES, &TCP);
        for index in 0..64 {
            let ring = &mut session.rings[0];
            ring.describe(index, IN + u64::from(index) * 4096, 4096, WRITE, 0);
            ring.offer(index);
            send(&mut session, 1514, 1);
        }
        session.device.kick(0);
        session.device.kick(1);
        session.device.reset();
        is_quiet(&session);
    }
    lives(&NET);
}

/// After a reset nobody writes to the rings any more.
fn is_quiet(session: &Session) {
    let used = [session.rings[0].used(), session.rings[1].used()];
    rest();
    if used != [session.rings[0].used(), session.rings[1].used()] {
        say!("wrong: a ring moves after the reset");
    }
}
