//! Raw FUSE (Linux include/uapi/linux/fuse.h): a driver that speaks to the fs server as it likes.

use crate::machine::{DATA, fill, load, put, store, until};
use crate::say;
use crate::session::{Session, Victim};
use crate::transport::{NEXT, WRITE};

/// Where requests lie; each has 4 KiB, and behind it 4 KiB for its answer.
const AT: u64 = DATA + 0x60_0000;
const SLOT: u64 = 0x2000;
const ANSWER: u64 = 0x1000;

/// How many requests are under way.
const MOST: u16 = 128;

/// `struct fuse_in_header` and `fuse_out_header`.
const HEADER: u32 = 40;
const ANSWER_HEADER: u64 = 16;

/// ENOENT.
pub const NOTHING: i32 = 2;

/// The root of the share.
pub const TOP: u64 = 1;

/// Opcodes.
pub const LOOKUP: u32 = 1;
/// It has no answer.
pub const FORGET: u32 = 2;
/// A symbolic link.
pub const SYMLINK: u32 = 6;
/// A device or a pipe.
pub const MKNOD: u32 = 8;
/// A directory.
pub const MKDIR: u32 = 9;
/// Removes a name.
pub const UNLINK: u32 = 10;
/// Opens.
pub const OPEN: u32 = 14;
/// Begins.
pub const INIT: u32 = 26;
/// Sets a lock.
pub const SETLK: u32 = 32;
/// Sets a lock, and waits for it.
pub const SETLKW: u32 = 33;
/// Makes and opens a file.
pub const CREATE: u32 = 35;
/// Ends.
pub const DESTROY: u32 = 38;
/// Many of FORGET.
pub const BATCH_FORGET: u32 = 42;

/// A share that is mounted.
pub struct Mount {
    /// The device, and its queues.
    pub session: Session,
    unique: u64,
    /// Requests that were queued since the last [`Mount::finish`].
    queued: u16,
}

/// By the book: INIT, which is what the host must answer.
pub fn mounts(session: &mut Session) -> bool {
    let copy = Session {
        victim: session.victim,
        device: session.device,
        rings: session.rings,
    };
    Mount::over(copy).begin() == Ok(0)
}

impl Mount {
    fn over(session: Session) -> Self {
        Self {
            session,
            unique: 0,
            queued: 0,
        }
    }

    /// Switches the device on, and mounts.
    pub fn new(victim: &'static Victim) -> Self {
        let mut mount = Self::over(victim.open());
        if mount.begin() != Ok(0) {
            say!("wrong: {} is not mounted", victim.name);
        }
        mount
    }

    /// INIT, of version 7.38, with locks.
    pub fn begin(&mut self) -> Result<u64, i32> {
        let mut body = [0_u32; 16];
        body[0] = 7;
        body[1] = 38;
        body[3] = 1 << 1 | 1 << 10 | 1 << 30;
        self.call(INIT, TOP, &[&words(&body)]).map(|_| 0)
    }

    /// Sends one request, and waits: the first eight bytes of the answer, or the errno.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Result<u64, i32> {
        self.finish();
        let slot = self.queue(opcode, node, body);
        if !self.finish() {
            return Err(0);
        }
        self.answer(slot)
    }

    /// The answer in this slot.
    pub fn answer(&self, slot: u16) -> Result<u64, i32> {
        let at = AT + u64::from(slot) * SLOT + ANSWER;
        match load::<u32>(at + 4) as i32 {
            0 => Ok(load(at + ANSWER_HEADER)),
            error => Err(-error),
        }
    }

    /// Puts one request into the queue; gives its slot. Waits if too many are under way.
    pub fn queue(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> u16 {
        if self.queued == MOST {
            self.finish();
        }
        self.unique += 1;
        let slot = self.queued;
        let at = AT + u64::from(slot) * SLOT;
        fill(at, u64::from(HEADER), 0);
        fill(at + ANSWER, 32, 0);
        let mut end = at + u64::from(HEADER);
        for part in body {
            put(end, part);
            end += part.len() as u64;
        }
        store(at, (end - at) as u32);
        store(at + 4, opcode);
        store(at + 8, self.unique);
        store(at + 16, node);
        self.offer((end - at) as u32);
        slot
    }

    /// Offers the request in the next slot, with that many bytes, whatever its header says.
    pub fn offer(&mut self, bytes: u32) {
        let slot = self.queued;
        self.queued += 1;
        let at = AT + u64::from(slot) * SLOT;
        let ring = self.session.ring();
        ring.describe(2 * slot, at, bytes, NEXT, 2 * slot + 1);
        ring.describe(2 * slot + 1, at + ANSWER, ANSWER as u32, WRITE, 0);
        ring.offer(2 * slot);
    }

    /// Where the next request will lie.
    pub fn place(&self) -> u64 {
        AT + u64::from(self.queued) * SLOT
    }

    /// Waits until all requests have come back.
    pub fn finish(&mut self) -> bool {
        let queue = self.session.victim.queue;
        self.session.device.kick(queue);
        let ring = *self.session.ring();
        self.queued = 0;
        let back = until(|| ring.used() == ring.available);
        if !back {
            say!(
                "wrong: {} of {} requests came back",
                ring.used(),
                ring.available
            );
        }
        back
    }

    /// Notifies the server, and waits for nothing.
    pub fn kick(&mut self) {
        let queue = self.session.victim.queue;
        self.session.device.kick(queue);
    }

    /// Looks a name up: its node, or the errno. Node 0 is a name that is not there.
    pub fn look_up(&mut self, node: u64, name: &[u8]) -> Result<u64, i32> {
        match self.call(LOOKUP, node, &[name, &[0]]) {
            Ok(0) => Err(NOTHING),
            found => found,
        }
    }
}

/// The bytes of some words.
pub fn words<const N: usize>(words: &[u32; N]) -> [u8; 64] {
    let mut bytes = [0; 64];
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}
