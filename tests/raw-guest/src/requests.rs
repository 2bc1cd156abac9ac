//! Requests that the fs server can't decode. Each is the end of the server, and so of the VM, or
//! has an answer.

use crate::fuse::{BATCH_FORGET, LOOKUP, Mount, SETLK, SYMLINK, TOP, words};
use crate::machine::store;
use crate::say;
use crate::victim::{FS, lives};

/// A name, and what it sends.
type Attack = (&'static str, fn(&mut Mount));

/// One attack after the other, from `from` on.
pub fn broken(from: u64) {
    const ALL: [Attack; 13] = [
        ("a name without an end", |mount| {
            mount.queue(LOOKUP, TOP, &[b"c1"]);
        }),
        ("two names where there must be one", |mount| {
            mount.queue(LOOKUP, TOP, &[b"c1\0/etc/passwd\0"]);
        }),
        ("a request of no body", |mount| {
            mount.queue(LOOKUP, TOP, &[]);
        }),
        ("a length below the header's", |mount| lying(mount, 39)),
        ("a length of 0", |mount| lying(mount, 0)),
        ("a length of 4 GiB", |mount| lying(mount, u32::MAX)),
        ("a length of 1 MiB", |mount| lying(mount, 1 << 20)),
        ("half a header", |mount| mount.offer(20)),
        ("a count of 1000 in a batch of one", |mount| {
            mount.queue(BATCH_FORGET, 0, &[&words(&[1000, 0, 99])]);
        }),
        ("a count of 2^32 - 1", |mount| {
            mount.queue(BATCH_FORGET, 0, &[&words(&[u32::MAX, 0, 99])]);
        }),
        ("one name where there must be two", |mount| {
            mount.queue(SYMLINK, TOP, &[b"one\0"]);
        }),
        ("a lock of no body", |mount| {
            mount.queue(SETLK, TOP, &[]);
        }),
        ("no room for an answer", |mount| {
            let at = mount.place();
            mount.queue(LOOKUP, TOP, &[b"c1\0"]);
            mount.session.ring().describe(0, at, 43, 0, 0);
        }),
    ];
    for (number, (name, break_it)) in (0..).zip(ALL).skip(from as usize) {
        say!("attack {number} fs: {name}");
        let mut mount = Mount::new(&FS);
        break_it(&mut mount);
        mount.finish();
        lives(&FS);
    }
}

fn lying(mount: &mut Mount, length: u32) {
    let at = mount.place();
    mount.queue(LOOKUP, TOP, &[b"c1\0"]);
    store(at, length);
}
