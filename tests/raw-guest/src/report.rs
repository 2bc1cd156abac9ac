//! What the guest says: a ring of records like a kernel's log, which the VMM reads from memory.
//!
//! The layout is ours; the test hands it to the VMM in place of a kernel's. One record is one line.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use crate::machine::{FREE, barrier, now, put, store};

/// Where the VMM finds the address of the ring.
pub const POINTER: u64 = FREE;
/// The ring's two parts. Their fields are [`COUNT_BITS`] and its neighbours, and [`SIZE_BITS`].
pub const RING: u64 = FREE + 0x100;
/// Where the second part is.
pub const TEXT_RING: u64 = 0x80;

/// Fields of the first part.
pub const COUNT_BITS: u64 = 0;
/// The address of the descriptors.
pub const DESCRIPTORS: u64 = 8;
/// The address of the records' heads.
pub const INFOS: u64 = 16;
/// The newest record.
pub const HEAD: u64 = 24;
/// The oldest record.
pub const TAIL: u64 = 32;
/// Fields of the second part.
pub const SIZE_BITS: u64 = 0;
/// The address of the text.
pub const DATA: u64 = 8;

/// The sizes of a descriptor and of a record's head.
pub const DESCRIPTOR_SIZE: u64 = 24;
/// The fields are: number, time, length of the text, facility, level.
pub const INFO_SIZE: u64 = 32;

/// Where a kernel maps its text: the VMM expects such addresses.
pub const TEXT_MAP: u64 = 0xffff_ffff_8000_0000;

/// Where the parts lie.
pub const DESCRIPTORS_AT: u64 = FREE + 0x1000;
/// The records' heads.
pub const INFOS_AT: u64 = FREE + 0x8000;
/// The text.
pub const DATA_AT: u64 = FREE + 0x1_0000;

/// 1024 records, and 256 bytes of text for each.
pub const RECORDS: u32 = 10;
/// The text's size.
pub const BYTES: u32 = 18;

const SLOT: u64 = 256;
const LONGEST: usize = 200;

/// The number of the next record.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// How far the numbers of records are ahead of what was said.
static AHEAD: AtomicU64 = AtomicU64::new(0);

/// The number that the next record will have.
pub fn number() -> u64 {
    NEXT.load(Ordering::Relaxed) + AHEAD.load(Ordering::Relaxed)
}

/// Leaves out so many numbers: those of forged records. The reader looks for higher ones.
pub fn skip(numbers: u64) {
    AHEAD.fetch_add(numbers, Ordering::Relaxed);
}

/// Makes the ring, empty at first; puts it in order again if it was forged.
pub fn begin() {
    let next = NEXT.load(Ordering::Relaxed);
    store(RING + COUNT_BITS, RECORDS);
    store(RING + DESCRIPTORS, TEXT_MAP + DESCRIPTORS_AT);
    store(RING + INFOS, TEXT_MAP + INFOS_AT);
    store(RING + TEXT_RING + SIZE_BITS, BYTES);
    store(RING + TEXT_RING + DATA, TEXT_MAP + DATA_AT);
    store(RING + HEAD, next.saturating_sub(1));
    store(RING + TAIL, next.saturating_sub(1 << RECORDS));
    store(POINTER, TEXT_MAP + RING);
}

/// One line that is being put together.
struct Line {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let rest = &mut self.bytes[self.length..];
        let count = rest.len().min(text.len());
        rest[..count].copy_from_slice(&text.as_bytes()[..count]);
        self.length += count;
        Ok(())
    }
}

/// Says one line, cut after 200 bytes. [`crate::say!`] is how to call it.
pub fn line(text: fmt::Arguments) {
    let mut line = Line {
        bytes: [0; LONGEST],
        length: 0,
    };
    let _ = line.write_fmt(text);
    let number = number();
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let index = id % (1 << RECORDS);
    let begin = id * SLOT;
    let info = INFOS_AT + index * INFO_SIZE;
    store(info, number);
    store(info + 8, now());
    store(info + 16, line.length as u16);
    store(info + 18, 1_u8);
    put(
        DATA_AT + begin % (1 << BYTES) + 8,
        &line.bytes[..line.length],
    );
    let descriptor = DESCRIPTORS_AT + index * DESCRIPTOR_SIZE;
    store(descriptor + 8, begin);
    // A block that ends where the text ends would seem to wrap.
    store(descriptor + 16, begin + SLOT - 8);
    barrier();
    store(descriptor, id | 1 << 62);
    store(RING + HEAD, id);
    store(RING + TAIL, id.saturating_sub((1 << RECORDS) - 1));
    barrier();
}

/// Says one line.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::report::line(format_args!($($text)*)) };
}
