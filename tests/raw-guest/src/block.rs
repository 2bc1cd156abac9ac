//! Requests that a disk must refuse, and resets with requests in flight (virtio 1.2, 5.2.6).

use crate::dice::Dice;
use crate::machine::{DATA, fill, load, rest, store};
use crate::say;
use crate::session::Session;
use crate::transport::{NEXT, WRITE};
use crate::victim::{BLOCK, READ_ONLY, lives};

/// Buffers of requests.
const AT: u64 = DATA + 0x10_0000;

/// In sectors; the test makes disks of 64 MiB.
const CAPACITY: u64 = (64 << 20) / 512;

const READ: u32 = 0;
const WRITES: u32 = 1;

const DONE: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Kind, sector, length, and the status that must come.
const ODD: [(u32, u64, u32, u8); 15] = [
    (READ, CAPACITY - 1, 512, DONE),
    (READ, CAPACITY - 1, 1024, FAILED),
    (READ, CAPACITY, 512, FAILED),
    (READ, u64::MAX, 512, FAILED),
    (READ, u64::MAX / 512, 512, FAILED),
    (READ, u64::MAX / 512 + 1, 512, FAILED),
    (READ, 1 << 63, 512, FAILED),
    (READ, 0, 511, FAILED),
    (READ, 0, 513, FAILED),
    (READ, 0, 1, FAILED),
    (READ, 0, 32 << 20, DONE),
    (WRITES, 0, 512, FAILED), // its bytes go the wrong way
    (8, 0, 19, FAILED),
    (8, 0, 20, DONE),
    (11, 0, 512, UNSUPPORTED),
];

/// All of it, after the attacks on the rings.
pub fn attack(count: u64) {
    odd(count);
    read_only();
    in_flight(count / 20);
}

fn odd(count: u64) {
    say!("attack 0 block: sectors behind the end, odd lengths and kinds");
    let mut session = BLOCK.open();
    for (kind, sector, length, wanted) in ODD {
        let status = session.request(kind, sector, length);
        if status != Some(wanted) {
            say!("wrong: {status:?} for kind {kind}, sector {sector}, {length} bytes");
        }
    }
    let mut dice = Dice::new(31);
    for _ in 0..count {
        let kind = dice.below(20) as u32;
        // A flush waits for the disk.
        if kind != 4 {
            session.request(kind, dice.number(), dice.below(1 << 17) as u32);
        }
    }
    lives(&BLOCK);
}

/// A write of one sector, with bytes that the host looks for.
fn write(session: &mut Session, sector: u64, request: u16) {
    let (header, status) = (
        DATA + 32 * u64::from(request),
        DATA + 32 * u64::from(request) + 24,
    );
    store(header, WRITES);
    store(header + 8, sector);
    store(status, 0xff_u8);
    let first = 3 * request;
    let ring = &mut session.rings[0];
    ring.describe(first, header, 16, NEXT, first + 1);
    ring.describe(first + 1, AT, 512, NEXT, first + 2);
    ring.describe(first + 2, status, 1, WRITE, 0);
}

fn read_only() {
    say!("attack 0 block: a write to a disk that is only read");
    let mut session = READ_ONLY.open();
    fill(AT, 512, 0xee);
    write(&mut session, 0, 0);
    session.exchange(0);
    let status: u8 = load(DATA + 24);
    if status != FAILED {
        say!("wrong: status {status}");
    }
    lives(&READ_ONLY);
}

/// Large reads that a reset ends. Nothing comes after it.
fn in_flight(count: u64) {
    say!("attack 0 block: resets with requests in flight");
    let mut dice = Dice::new(33);
    for round in 0..count {
        let mut session = BLOCK.open();
        let ring = &mut session.rings[0];
        store(DATA, READ);
        store(DATA + 8, dice.below(CAPACITY / 2));
        for request in 0..20 {
            ring.describe(3 * request, DATA, 16, NEXT, 3 * request + 1);
            ring.describe(3 * request + 1, AT, 8 << 20, NEXT | WRITE, 3 * request + 2);
            ring.describe(3 * request + 2, DATA + 64, 1, WRITE, 0);
            ring.offer(3 * request);
        }
        session.device.kick(0);
        for _ in 0..round % 3 {
            rest();
        }
        session.device.reset();
        let used = session.rings[0].used();
        fill(AT, 4096, 0xee);
        rest();
        let now: u64 = load(AT);
        if session.rings[0].used() != used || now != 0xeeee_eeee_eeee_eeee {
            say!("wrong: the disk writes after the reset");
        }
    }
    lives(&BLOCK);
}
