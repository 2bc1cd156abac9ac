//! Malformed rings and chains, for the queues of every device.

use crate::machine::{DATA, RAM_END};
use crate::say;
use crate::session::{Outcome, Session, Victim};
use crate::transport::{DRIVER_OK, MMIO, NEXT, QUEUE_READY, QUEUE_SELECT, STATUS, TABLE, WRITE};
use crate::transport::{VERSION_1, descriptor};
use crate::victim::{ask, kick, lives};

/// What must come of an attack.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// The device gives up its driver.
    Broken,
    /// Nothing in particular.
    Any,
}

use Expect::{Any, Broken};

/// A malformed thing.
#[derive(Clone, Copy)]
enum Act {
    /// One buffer.
    Buffer(u64, u32),
    /// One indirect table, with more flags.
    Table(u64, u32, u16),
    /// An indirect table of one entry: address, length, flags, next.
    Entry(u64, u32, u16, u16),
    /// A head.
    Head(u16),
    /// A chain whose first descriptor has this successor.
    Next(u16),
    /// The available index, that far ahead.
    Index(u16),
    /// More.
    Do(fn(&mut Session)),
}

use Act::{Buffer, Do, Entry, Head, Index, Next, Table};

/// Where an indirect table lies.
const TABLE_AT: u64 = DATA + 0x10_0000;

/// The most buffers of a chain that is too long; it holds 4 GiB and more.
const LONG: u16 = 60;

const CHAINS: [(&str, Act, Expect); 44] = [
    ("a descriptor that follows itself", Next(0), Broken),
    ("a loop over all descriptors", Do(all_in_a_loop), Broken),
    ("a head just behind the table", Do(head_behind), Broken),
    ("a head far behind the table", Head(u16::MAX), Broken),
    ("a successor just behind the table", Do(next_behind), Broken),
    ("a successor far behind the table", Next(u16::MAX), Broken),
    ("a buffer behind RAM", Buffer(RAM_END, 16), Broken),
    (
        "a buffer over the end of RAM",
        Buffer(RAM_END - 8, 16),
        Broken,
    ),
    ("a buffer in the hole", Buffer(0xc000_0000, 4096), Broken),
    ("a buffer in the registers", Buffer(MMIO, 256), Broken),
    (
        "a buffer in the local APIC",
        Buffer(0xfee0_0000, 256),
        Broken,
    ),
    ("a buffer above 4 GiB", Buffer(1 << 32, 16), Broken),
    ("a buffer at 1 TiB", Buffer(1 << 40, 16), Broken),
    ("a buffer at 2^63", Buffer(1 << 63, 16), Broken),
    ("a buffer that wraps", Buffer(u64::MAX - 7, 16), Broken),
    (
        "a buffer that wraps into RAM",
        Buffer(u64::MAX - 15, 4096),
        Broken,
    ),
    ("a buffer up to 2^64", Buffer(u64::MAX - 4095, 4096), Broken),
    (
        "a good buffer, and one that wraps",
        Do(second_wraps),
        Broken,
    ),
    ("the last byte", Buffer(u64::MAX, 1), Broken),
    ("a buffer of 4 GiB", Buffer(DATA, u32::MAX), Broken),
    ("a table of no byte", Table(TABLE_AT, 0, 0), Broken),
    (
        "a table of half a descriptor",
        Table(TABLE_AT, 8, 0),
        Broken,
    ),
    ("a table of an odd size", Table(TABLE_AT, 17, 0), Broken),
    ("a table longer than the queue", Do(long_table), Broken),
    (
        "a table of 4 GiB",
        Table(TABLE_AT, u32::MAX - 15, 0),
        Broken,
    ),
    ("a table behind RAM", Table(RAM_END, 16, 0), Broken),
    (
        "a table over the end of RAM",
        Table(RAM_END - 8, 16, 0),
        Broken,
    ),
    ("a table that wraps", Table(u64::MAX - 7, 32, 0), Broken),
    (
        "a table with a successor",
        Table(TABLE_AT, 16, NEXT),
        Broken,
    ),
    ("a table in a table", Entry(TABLE_AT, 16, TABLE, 0), Broken),
    ("a loop in a table", Entry(DATA, 16, NEXT, 0), Broken),
    (
        "a successor behind a table",
        Entry(DATA, 16, NEXT, 1),
        Broken,
    ),
    (
        "a buffer of a table that wraps",
        Entry(u64::MAX - 7, 16, 0, 0),
        Broken,
    ),
    ("a buffer to read after one to write", Do(order), Broken),
    ("a chain of 4 GiB", Do(long_chain), Broken),
    ("an index further than the queue", Do(index_behind), Broken),
    ("an index half round", Index(1 << 15), Broken),
    ("an index that goes back", Index(u16::MAX), Broken),
    ("a buffer of no byte", Buffer(DATA, 0), Any),
    ("a buffer of one byte", Buffer(DATA, 1), Any),
    ("a buffer of the wrong way", Do(wrong_way), Any),
    ("the same chain over and over", Do(same_chain), Any),
    ("an index that moves to and fro", Do(moving_index), Any),
    ("a descriptor that changes", Do(moving_buffer), Any),
];

fn all_in_a_loop(session: &mut Session) {
    let way = session.way();
    let ring = session.ring();
    for index in 0..ring.size {
        ring.describe(index, DATA, 1, NEXT | way, (index + 1) % ring.size);
    }
    ring.offer(0);
}

fn head_behind(session: &mut Session) {
    let ring = session.ring();
    ring.offer(ring.size);
}

fn next_behind(session: &mut Session) {
    let way = session.way();
    let ring = session.ring();
    ring.describe(0, DATA, 16, NEXT | way, ring.size);
    ring.offer(0);
}

fn long_table(session: &mut Session) {
    let way = session.way();
    let ring = session.ring();
    for index in 0..=ring.size {
        let next = if index < ring.size { NEXT } else { 0 };
        descriptor(TABLE_AT, index, DATA, 16, next | way, index + 1);
    }
    let length = 16 * (u32::from(ring.size) + 1);
    ring.describe(0, TABLE_AT, length, TABLE, 0);
    ring.offer(0);
}

fn order(session: &mut Session) {
    let ring = session.ring();
    ring.describe(0, DATA, 64, NEXT | WRITE, 1);
    ring.describe(1, DATA, 64, 0, 0);
    ring.offer(0);
}

/// Each buffer is all of RAM. Together they hold more than 32 bits can say.
fn long_chain(session: &mut Session) {
    let way = session.way();
    let ring = session.ring();
    let most = 1 + (1_u64 << 32).div_ceil(RAM_END) as u16;
    for index in 0..most.min(ring.size) {
        let next = if index + 1 < most.min(ring.size) {
            NEXT
        } else {
            0
        };
        ring.describe(index, 0, RAM_END as u32, next | way, index + 1);
    }
    ring.offer(0);
}

/// A device that reads only the first one still may not take this.
fn second_wraps(session: &mut Session) {
    let way = session.way();
    let ring = session.ring();
    ring.describe(0, DATA, 2048, NEXT | way, 1);
    ring.describe(1, u64::MAX - 7, 64, way, 0);
    ring.offer(0);
}

fn index_behind(session: &mut Session) {
    let ring = session.ring();
    ring.tell(ring.size + 1);
}

fn wrong_way(session: &mut Session) {
    let way = session.way() ^ WRITE;
    let ring = session.ring();
    ring.describe(0, DATA, 64, way, 0);
    ring.offer(0);
}

fn same_chain(session: &mut Session) {
    let way = session.way();
    let ring = session.ring();
    ring.describe(0, DATA, 4096, way, 0);
    for _ in 0..ring.size {
        ring.offer(0);
    }
}

/// A device that looks finds a chain, or none, or a broken ring.
fn moving_index(session: &mut Session) {
    let (way, queue) = (session.way(), session.victim.queue);
    session.ring().describe(0, DATA, 4096, way, 0);
    for round in 0_u16..2000 {
        let ahead = [1, 0, u16::MAX, 1][usize::from(round % 4)];
        session.ring().tell(ahead);
        if round % 64 == 0 {
            session.device.kick(queue);
        }
    }
    session.ring().tell(1);
}

/// A device that reads a descriptor twice finds another one.
fn moving_buffer(session: &mut Session) {
    let (way, queue) = (session.way(), session.victim.queue);
    session.ring().describe(0, DATA, 4096, way, 0);
    for round in 0..2000 {
        let good = round % 2 == 0;
        let address = if good { DATA } else { u64::MAX - 7 };
        let length = if good { 64 } else { u32::MAX };
        session.ring().describe(0, address, length, way, 0);
        if round % 64 == 0 {
            session.ring().offer(0);
            session.device.kick(queue);
        }
    }
}

fn act(act: Act, session: &mut Session) {
    let way = session.way();
    let ring = session.ring();
    match act {
        Buffer(address, length) => ring.describe(0, address, length, way, 0),
        Table(address, length, flags) => ring.describe(0, address, length, TABLE | flags, 1),
        Entry(address, length, flags, next) => {
            descriptor(TABLE_AT, 0, address, length, flags | way, next);
            ring.describe(0, TABLE_AT, 16, TABLE, 0);
        }
        Next(next) => ring.describe(0, DATA, 16, NEXT | way, next),
        Head(head) => return ring.offer(head),
        Index(ahead) => return ring.tell(ahead),
        Do(more) => return more(session),
    }
    ring.offer(0);
}

/// Attacks the victim's queue, from attack number `from` on.
pub fn chains(victim: &'static Victim, from: u64) {
    for (number, (name, what, expect)) in (0..).zip(CHAINS).skip(from as usize) {
        say!("attack {number} {}: {name}", victim.name);
        let mut session = victim.open();
        act(what, &mut session);
        kick(&mut session);
        let must = expect == Broken && !victim.is_served_elsewhere();
        let outcome = session.outcome(must);
        if must && outcome != Some(Outcome::Broken) {
            say!("wrong: {outcome:?}, and the device must ask for a reset");
        }
        lives(victim);
    }
}

/// A queue that no device may take: its size, and where its parts lie, from the good places on.
const BAD: [(&str, u32, [u64; 3]); 15] = [
    ("no descriptors", 0, [0; 3]),
    ("3 descriptors", 3, [0; 3]),
    ("2048 descriptors", 2048, [0; 3]),
    ("32,768 descriptors", 1 << 15, [0; 3]),
    ("65,552 descriptors", (1 << 16) + 16, [0; 3]),
    ("2^31 descriptors", 1 << 31, [0; 3]),
    ("descriptors that are not aligned", 16, [8, 0, 0]),
    ("an available ring that is not aligned", 16, [0, 1, 0]),
    ("a used ring that is not aligned", 16, [0, 0, 2]),
    ("descriptors behind RAM", 16, [RAM_END, 0, 0]),
    ("an available ring behind RAM", 16, [0, RAM_END, 0]),
    ("a used ring behind RAM", 16, [0, 0, RAM_END]),
    ("descriptors that wrap", 16, [u64::MAX - 15, 0, 0]),
    ("an available ring at 2^63", 16, [0, 1 << 63, 0]),
    ("a used ring at 2^63", 16, [0, 0, 1 << 63]),
];

/// Sets the device up in ways that it must refuse.
pub fn setups(victim: &'static Victim) {
    for (name, size, moved) in BAD {
        say!("attack 0 {}: {name}", victim.name);
        let session = victim.prepare();
        session.device.set(QUEUE_SELECT, victim.queue);
        session.device.set(QUEUE_READY, 0);
        let places = session.rings[victim.queue as usize].addresses();
        let mut moved = moved.into_iter().zip(places);
        let places = [(); 3].map(|()| match moved.next() {
            Some((by, _)) if by > 1 << 63 => by,
            Some((by, at)) => at + by,
            None => 0,
        });
        session.device.place(victim.queue, size, places);
        refused(victim, &session);
    }
    say!("attack 0 {}: a queue that is not ready", victim.name);
    let session = victim.prepare();
    session.device.set(QUEUE_SELECT, victim.queue);
    session.device.set(QUEUE_READY, 0);
    refused(victim, &session);
    features(victim);
    frozen(victim);
}

fn refused(victim: &'static Victim, session: &Session) {
    session.device.switch_on();
    if !session.device.needs_reset() {
        say!("wrong: the device must ask for a reset");
    }
    lives(victim);
}

/// Features that are not offered, and a status out of order.
fn features(victim: &'static Victim) {
    say!("attack 0 {}: features that are not offered", victim.name);
    let device = victim.device();
    for features in [0, 1 << 31, u64::MAX, VERSION_1 | 1 << 40] {
        if device.negotiate(features) {
            say!("wrong: {features:#x} are accepted");
        }
        device.switch_on();
        if device.get(STATUS) & DRIVER_OK != 0 {
            say!("wrong: the device is on with features {features:#x}");
        }
    }
    lives(victim);
}

/// What is set stays set after DRIVER_OK, and a request is still answered from the same queue.
fn frozen(victim: &'static Victim) {
    say!("attack 0 {}: another queue after DRIVER_OK", victim.name);
    let mut session = victim.open();
    for (queue, _) in (0..).zip(victim.sizes) {
        session.device.place(queue, 4, [u64::MAX << 12; 3]);
        session.device.set(QUEUE_READY, 0);
        if session.device.get(QUEUE_READY) != 1 {
            say!("wrong: queue {queue} is no longer ready");
        }
    }
    session.device.set(STATUS, 1);
    session.device.set(STATUS, 1 << 31);
    if !ask(&mut session) {
        say!("wrong: no answer from the queue that was set up");
    }
}

/// Kicks of all queues and of none, and resets with requests in flight.
pub fn storms(victim: &'static Victim, rounds: u64) {
    say!("attack 0 {}: a storm of kicks", victim.name);
    let session = victim.open();
    for round in 0..20 * rounds {
        let queue = [0, 1, 2, 3, u32::MAX, 1 << 31][(round % 6) as usize];
        session.device.kick(queue);
    }
    lives(victim);
    say!("attack 0 {}: a storm of resets", victim.name);
    for round in 0..rounds {
        let mut session = victim.open();
        let way = session.way();
        let ring = session.ring();
        for index in 0..ring.size.min(LONG) {
            ring.describe(index, DATA, 4096, way, 0);
            ring.offer(index);
        }
        // What a file server can't decode is its end: it gets nothing but resets.
        if !victim.is_served_elsewhere() {
            session.device.kick(victim.queue);
        }
        if round % 3 == 0 {
            session.device.switch_on();
        }
        session.device.reset();
    }
    lives(victim);
}
