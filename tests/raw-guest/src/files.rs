//! Requests that the fs server understands, and must survive: names, look-ups, FORGETs, handles,
//! locks.

use crate::dice::Dice;
use crate::fuse::{
    BATCH_FORGET, CREATE, DESTROY, FORGET, LOOKUP, MKDIR, MKNOD, Mount, OPEN, SETLK,
};
use crate::fuse::{NOTHING, SETLKW, SYMLINK, TOP, UNLINK, words};
use crate::say;
use crate::victim::{FS, VOLUMES, lives};

/// The longest name that a host's file may have.
const LONGEST: usize = 255;

/// How many files the test has made in the container's root: `f0` and so on.
const FILES: u64 = 1000;

/// All of it; `count` look-ups among them.
pub fn attack(count: u64) {
    names();
    links();
    look_ups(count);
    forgets();
    handles();
    zeros();
    begins();
    locks();
}

fn root(mount: &mut Mount) -> u64 {
    mount.look_up(TOP, b"c1").unwrap_or_else(|error| {
        say!("wrong: error {error} for the container's root");
        0
    })
}

fn names() {
    say!("attack 0 fs: names");
    let mut mount = Mount::new(&FS);
    let root = root(&mut mount);
    let long = [b'x'; 3000];
    let names: [&[u8]; 14] = [
        b"",
        b".",
        b"..",
        b"/",
        b"a/b",
        b"../canary",
        b"../../etc/passwd",
        b"/etc/passwd",
        b"f0/",
        b"f0/..",
        b"./f0",
        b"\xff\xfe/",
        &long[..=LONGEST],
        &long,
    ];
    // LOOKUP, MKDIR, UNLINK, CREATE, MKNOD: each with its fixed part before the name.
    let requests = [
        (LOOKUP, 0),
        (MKDIR, 8),
        (UNLINK, 0),
        (CREATE, 16),
        (MKNOD, 16),
    ];
    for name in names {
        for (opcode, fixed) in requests {
            for node in [TOP, root] {
                let fixed = &words(&[0o100_600; 16])[..fixed];
                let answer = mount.call(opcode, node, &[fixed, name, &[0]]);
                if answer.is_ok() {
                    say!(
                        "wrong: opcode {opcode} takes a name of {} bytes",
                        name.len()
                    );
                }
            }
        }
    }
    // The longest one is just a name.
    let longest = mount.look_up(root, &long[..LONGEST]);
    if longest != Err(NOTHING) {
        say!("wrong: {longest:?} for a name of {LONGEST} bytes");
    }
    // The top of the share is only read, and devices are not made anywhere.
    let device = words(&[0o020_666, 0x103, 0, 0]);
    for (node, opcode, body) in [
        (TOP, MKDIR, &words(&[0o755, 0])[..8]),
        (TOP, CREATE, &words(&[0x42, 0o644, 0, 0])[..16]),
        (root, MKNOD, &device[..16]),
    ] {
        if mount.call(opcode, node, &[body, b"new\0"]).is_ok() {
            say!("wrong: opcode {opcode} makes what it must not");
        }
    }
    lives(&FS);
}

/// Links that lead to the host's files, for a server that followed them.
fn links() {
    say!("attack 0 fs: links to the host's files");
    let mut mount = Mount::new(&FS);
    let root = root(&mut mount);
    for target in [
        &b"/etc/passwd\0"[..],
        b"../../canary\0",
        b"/proc/self/root\0",
        b".\0",
    ] {
        let _ = mount.call(UNLINK, root, &[b"link\0"]);
        let made = mount.call(SYMLINK, root, &[b"link\0", target]);
        let link = mount.look_up(root, b"link");
        let (Ok(_), Ok(link)) = (made, link) else {
            say!("wrong: {made:?} and {link:?} for a link");
            continue;
        };
        // O_RDWR, and with O_CREAT and O_TRUNC.
        for flags in [0, 2, 0o1102] {
            let opened = mount.call(OPEN, link, &[&words(&[flags, 0])[..8]]);
            if opened.is_ok() {
                say!("wrong: a link is opened: {opened:?}");
            }
        }
        let below = mount.look_up(link, b"passwd");
        if below.is_ok() {
            say!("wrong: a name is found below a link");
        }
        let made = mount.call(CREATE, root, &[&words(&[2, 0o644, 0, 0])[..16], b"link\0"]);
        if made.is_ok() {
            say!("wrong: a link is opened by CREATE");
        }
    }
    lives(&FS);
}

/// Look-ups without a FORGET: what is there, what is not, and names that may not be.
fn look_ups(count: u64) {
    say!("attack 0 fs: {count} look-ups");
    let mut mount = Mount::new(&FS);
    let root = root(&mut mount);
    let mut dice = Dice::new(61);
    let mut name = [b'f'; 12];
    for round in 0..count {
        let there = dice.below(4) > 0;
        let end = decimal(&mut name, dice.below(FILES));
        name[0] = if there { b'f' } else { b'm' };
        let slot = mount.queue(LOOKUP, root, &[&name[..end], &[0]]);
        if round % 1000 == 0 {
            mount.finish();
            if matches!(mount.answer(slot), Ok(1..)) != there {
                say!("wrong: {:?} in round {round}", mount.answer(slot));
            }
        }
        if round % 100_000 == 99_999 {
            say!("{} look-ups", round + 1);
        }
    }
    mount.finish();
    // The server has counted: now all of them are forgotten, in one breath.
    for file in 0..FILES {
        let end = decimal(&mut name, file);
        name[0] = b'f';
        if let Ok(node) = mount.look_up(root, &name[..end]) {
            mount.queue(FORGET, node, &[&u64::MAX.to_le_bytes()]);
        }
    }
    mount.finish();
    lives(&FS);
}

/// Writes a number behind the first letter of a name; gives the name's length.
fn decimal(name: &mut [u8; 12], number: u64) -> usize {
    let digits = number.checked_ilog10().unwrap_or(0) as usize + 1;
    let mut rest = number;
    for place in name[1..=digits].iter_mut().rev() {
        *place = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    digits + 1
}

/// FORGETs of what was never looked up, and of more than was.
fn forgets() {
    say!("attack 0 fs: a storm of FORGETs");
    let mut mount = Mount::new(&FS);
    let root = root(&mut mount);
    for count in [0, 1, 2, u64::MAX, 1 << 63] {
        for node in [0, TOP, root, root + 1, 1 << 40, u64::MAX] {
            mount.queue(FORGET, node, &[&count.to_le_bytes()]);
        }
    }
    mount.finish();
    // Each batch has 120 entries of 16 bytes, of random nodes and counts.
    let mut dice = Dice::new(63);
    let mut body = [0; 8 + 120 * 16];
    body[0] = 120;
    for _ in 0..200 {
        for entry in body[8..].chunks_exact_mut(16) {
            let node = dice.one_of(&[0, TOP, root, 2, 3, u64::MAX]);
            entry[..8].copy_from_slice(&node.to_le_bytes());
            entry[8..].copy_from_slice(&dice.number().to_le_bytes());
        }
        mount.queue(BATCH_FORGET, 0, &[&body]);
    }
    mount.finish();
    lives(&FS);
}

/// Requests about handles and nodes that are not there.
fn handles() {
    say!("attack 0 fs: handles and nodes that are not there");
    let mut mount = Mount::new(&FS);
    let root = root(&mut mount);
    let mut dice = Dice::new(65);
    // READ, RELEASE, FSYNC, FLUSH, READDIR, RELEASEDIR, FSYNCDIR, FALLOCATE, READDIRPLUS, LSEEK.
    let opcodes = [15, 18, 20, 25, 28, 29, 30, 43, 44, 46];
    for _ in 0..600 {
        let mut body = [0; 64];
        let handle = dice.number();
        body[..8].copy_from_slice(&handle.to_le_bytes());
        body[16..20].copy_from_slice(&4096_u32.to_le_bytes());
        let node = dice.one_of(&[root, 0, 77_777, u64::MAX]);
        let opcode = dice.one_of(&opcodes);
        let answer = mount.call(opcode, node, &[&body]);
        if answer.is_ok() {
            say!("wrong: opcode {opcode} with handle {handle:#x}: {answer:?}");
        }
    }
    // OPEN, GETATTR, READLINK, STATFS of nodes that are not there.
    for opcode in [OPEN, 3, 5, 17] {
        for node in [0, 77_777, u64::MAX] {
            if mount.call(opcode, node, &[&[0; 16]]).is_ok() {
                say!("wrong: opcode {opcode} with node {node}");
            }
        }
    }
    lives(&FS);
}

/// Those that take a name: a body of zeros is none, and the server's end (`requests`). INIT and
/// DESTROY are not for here either.
const NAMED: [u32; 15] = [1, 6, 8, 9, 10, 11, 12, 13, 21, 22, 24, 26, 35, 38, 45];

/// Every other opcode, and some that are none, with a body of zeros.
fn zeros() {
    say!("attack 0 fs: opcodes with zeros");
    let mut mount = Mount::new(&FS);
    let root = root(&mut mount);
    for opcode in (0..70).chain([4096, 1 << 31, u32::MAX]) {
        if !NAMED.contains(&opcode) {
            for node in [0, TOP, root, u64::MAX] {
                mount.queue(opcode, node, &[&[0; 256]]);
            }
            mount.finish();
        }
    }
    lives(&FS);
}

/// INIT again and again, DESTROY, and what comes after it.
fn begins() {
    say!("attack 0 fs: INIT and DESTROY again and again");
    let mut mount = Mount::new(&FS);
    for _ in 0..100 {
        let _ = mount.begin();
        let root = root(&mut mount);
        mount.queue(DESTROY, TOP, &[]);
        mount.queue(LOOKUP, root, &[b"f1\0"]);
        mount.queue(DESTROY, TOP, &[]);
        mount.finish();
        let _ = mount.begin();
    }
    lives(&FS);
}

/// `struct fuse_lk_in`.
fn lock(handle: u64, owner: u64, (start, end): (u64, u64), kind: u32) -> [u8; 48] {
    let mut body = [0; 48];
    for (place, number) in body.chunks_exact_mut(8).zip([handle, owner, start, end]) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    body[32..36].copy_from_slice(&kind.to_le_bytes());
    body
}

/// Locks of many owners, waiting ones, and ranges that end before they begin.
fn locks() {
    say!("attack 0 fs: locks");
    let mut mount = Mount::new(&VOLUMES);
    let volume = mount.look_up(TOP, b"v1").unwrap_or(0);
    let file = mount.look_up(volume, b"locked").unwrap_or(0);
    let handle = mount.call(OPEN, file, &[&words(&[2, 0])[..8]]);
    let Ok(handle) = handle else {
        say!("wrong: {handle:?} for a file of the volume");
        return;
    };
    let mut dice = Dice::new(67);
    for owner in 0..2000 {
        let range = (dice.number(), dice.number());
        let kind = dice.one_of(&[0, 1, 2, 3, u32::MAX]);
        let handle = dice.one_of(&[handle, handle, 0, u64::MAX]);
        mount.queue(SETLK, file, &[&lock(handle, owner, range, kind)]);
    }
    mount.finish();
    lives(&VOLUMES);
    say!("attack 0 fs: locks that wait, under a reset");
    let mut mount = Mount::new(&VOLUMES);
    let volume = mount.look_up(TOP, b"v1").unwrap_or(0);
    let file = mount.look_up(volume, b"locked").unwrap_or(0);
    let handle = mount.call(OPEN, file, &[&words(&[2, 0])[..8]]).unwrap_or(0);
    for owner in 1..100 {
        mount.queue(SETLKW, file, &[&lock(handle, owner, (0, 1 << 62), 1)]);
    }
    mount.kick();
    lives(&VOLUMES);
}
