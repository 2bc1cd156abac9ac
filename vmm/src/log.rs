//! The guest's log: the kernel's own printk ring, read from guest memory.
//!
//! `machine` tells the shim new lines on request and when the VM ends; the shim has the file. A
//! console would cost exits; the ring costs none, and has a panic's last lines. Facts:
//! kernel/printk/printk_ringbuffer.{h,c}.
//!
//! The guest can write all of it. We take every index modulo a size that is bounded here; every
//! address must lie in guest memory; every text is cut and cleaned. What does not fit is left out.
//!
//! One pass runs on the event loop, so it is short whatever the guest claims: it looks at
//! [`MAX_RECORDS`] records, reads [`MAX_BYTES`] of text, makes [`MAX_NEW`] bytes of lines or
//! [`TAIL`] lines, and holds the text of one record at a time. All descriptors may point to the
//! same text of newlines: the sum of what records claim has nothing to do with the memory that they
//! take.

use kata_like_boot::PrintkLayout;
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::GuestRam;

/// Bounds of one pass, whatever the guest's ring claims. The guest's kernel has 2,048 records in 64
/// KiB of text (CONFIG_LOG_BUF_SHIFT), and some more with many CPUs.
const MAX_RECORDS: u64 = 1 << 14;
const MAX_BYTES: usize = 4 << 20;
/// What is told at once, without the lines of the last record.
const MAX_NEW: usize = 16 << 10;
const MAX_COUNT_BITS: u32 = 20;
const MAX_SIZE_BITS: u32 = 25;
/// Of one record.
const MAX_TEXT: usize = 1024;

/// How many of the last lines the shim gets.
const TAIL: usize = 20;

/// Where the kernel maps its text and all memory, unless it was moved (no KASLR under PVH).
const TEXT_MAP: u64 = 0xffff_ffff_8000_0000;
const DIRECT_MAPS: [u64; 2] = [0xffff_8880_0000_0000, 0xff11_0000_0000_0000];
const DIRECT_MAP_SIZE: u64 = 1 << 45;

/// A descriptor's state is in the top two bits of `state_var`, its id in the others.
const ID_MASK: u64 = !(3 << 62);
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;

/// A data block begins with its descriptor's id.
const BLOCK_HEADER: u64 = 8;

/// A panic's line contains this.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// A record of the ring, whose text is not read yet.
struct Record {
    sequence: u64,
    nanoseconds: u64,
    /// Whether the kernel itself said it, and not a process through `/dev/kmsg`.
    kernel: bool,
    begin: u64,
    next: u64,
    length: u16,
}

/// One guest's log, and how much of it was told.
pub struct GuestLog {
    layout: Option<PrintkLayout>,
    memory: GuestRam,
    next: u64,
}

/// New lines.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Each line ends with a newline. Less than 40 KiB.
    pub text: String,
    /// Whether there are more, for the next time.
    pub more: bool,
}

impl GuestLog {
    /// Without a layout the log stays empty.
    pub fn new(layout: Option<PrintkLayout>, memory: GuestRam) -> Self {
        Self {
            layout,
            memory,
            next: 0,
        }
    }

    /// The lines since the last call, oldest first.
    pub fn news(&mut self) -> News {
        let mut news = News::default();
        let layout = self.layout.as_ref();
        let Some(ring) = layout.and_then(|layout| Ring::find(layout, &self.memory)) else {
            return news;
        };
        let mut buffer = [0; MAX_TEXT];
        for record in ring.since(self.next) {
            if news.text.len() >= MAX_NEW {
                news.more = true;
                break;
            }
            self.next = self.next.max(record.sequence.saturating_add(1));
            let text = ring.text(&record, &mut buffer);
            for line in text
                .iter()
                .flat_map(|text| text.split(|byte| *byte == b'\n'))
            {
                news.text.push_str(&format(&record, line));
                news.text.push('\n');
            }
        }
        news
    }

    /// The last lines, oldest first.
    pub fn tail(&self) -> Vec<String> {
        let mut lines = Vec::new();
        self.backwards(|record, text| {
            let last = text.rsplit(|byte| *byte == b'\n');
            lines.extend(
                last.take(TAIL - lines.len())
                    .map(|line| format(record, line)),
            );
            lines.len() < TAIL
        });
        lines.reverse();
        lines
    }

    /// The kernel's own words on why it panicked, if it did: the first ones.
    pub fn panic(&self) -> Option<String> {
        let mut found = None;
        self.backwards(|record, text| {
            let mut lines = text.split(|byte| *byte == b'\n');
            let is_it = |line: &&[u8]| line.windows(PANIC.len()).any(|part| part == PANIC);
            if let Some(line) = lines.find(|line| record.kernel && is_it(line)) {
                found = Some(clean(line));
            }
            true
        });
        found
    }

    /// Shows the records and their texts from the newest on, until `more` is false or the pass has
    /// read enough.
    fn backwards(&self, mut more: impl FnMut(&Record, &[u8]) -> bool) {
        let layout = self.layout.as_ref();
        let Some(ring) = layout.and_then(|layout| Ring::find(layout, &self.memory)) else {
            return;
        };
        let mut buffer = [0; MAX_TEXT];
        let mut bytes = 0;
        for (_, record) in ring.newest() {
            let Some(text) = ring.text(&record, &mut buffer) else {
                continue;
            };
            bytes += text.len();
            if !more(&record, text) || bytes >= MAX_BYTES {
                return;
            }
        }
    }
}

fn format(record: &Record, line: &[u8]) -> String {
    let (seconds, rest) = (
        record.nanoseconds / 1_000_000_000,
        record.nanoseconds % 1_000_000_000,
    );
    format!("[{seconds:5}.{:06}] {}", rest / 1000, clean(line))
}

/// The ring, after its sizes were checked and its parts found.
struct Ring<'a> {
    layout: &'a PrintkLayout,
    memory: &'a GuestRam,
    count: u64,
    size: u64,
    descriptors: u64,
    infos: u64,
    data: u64,
    head: u64,
    tail: u64,
}

impl<'a> Ring<'a> {
    fn find(layout: &'a PrintkLayout, memory: &'a GuestRam) -> Option<Self> {
        let word = |address: u64| -> Option<u64> { memory.read_obj(GuestAddress(address)).ok() };
        let half = |address: u64| -> Option<u32> { memory.read_obj(GuestAddress(address)).ok() };
        let base = physical(word(layout.prb)?)?;
        let descriptors = base.checked_add(layout.desc_ring)?;
        let text = base.checked_add(layout.text_ring)?;
        let count_bits = half(descriptors.checked_add(layout.count_bits)?)?;
        let size_bits = half(text.checked_add(layout.size_bits)?)?;
        if count_bits > MAX_COUNT_BITS || size_bits > MAX_SIZE_BITS {
            return None;
        }
        Some(Self {
            layout,
            memory,
            count: 1 << count_bits,
            size: 1 << size_bits,
            descriptors: physical(word(descriptors.checked_add(layout.descs)?)?)?,
            infos: physical(word(descriptors.checked_add(layout.infos)?)?)?,
            data: physical(word(text.checked_add(layout.data)?)?)?,
            head: word(descriptors.checked_add(layout.head_id)?)? & ID_MASK,
            tail: word(descriptors.checked_add(layout.tail_id)?)? & ID_MASK,
        })
    }

    /// The records from the newest on, and how many steps each is behind it.
    fn newest(&self) -> impl DoubleEndedIterator<Item = (u64, Record)> {
        let records = (self.head.wrapping_sub(self.tail) & ID_MASK).saturating_add(1);
        // The newest ones, if the guest claims more than there can be.
        let records = records.min(self.count).min(MAX_RECORDS);
        (0..records).filter_map(|step| {
            let record = self.record(self.head.wrapping_sub(step) & ID_MASK)?;
            Some((step, record))
        })
    }

    /// The records from a sequence number on, oldest first. Searches from the newest record on: a
    /// frequent caller reads the new ones and one old one.
    fn since(&self, from: u64) -> impl Iterator<Item = Record> {
        let new = self
            .newest()
            .take_while(|(_, record)| record.sequence >= from);
        let steps = new.last().map_or(0, |(step, _)| step + 1);
        let ids = (0..steps).rev();
        ids.filter_map(|step| self.record(self.head.wrapping_sub(step) & ID_MASK))
    }

    fn word(&self, base: u64, index: u64, size: u64, field: u64) -> Option<u64> {
        self.memory
            .read_obj(element(base, index, size, field)?)
            .ok()
    }

    /// The record `id`, if it is there and complete.
    fn record(&self, id: u64) -> Option<Record> {
        let index = id % self.count;
        let layout = self.layout;
        let field = |offset| self.word(self.descriptors, index, layout.desc_size, offset);
        let state = field(layout.desc_state)?;
        if state & ID_MASK != id || !matches!(state >> 62, COMMITTED | FINALIZED) {
            return None;
        }
        let info = |offset| element(self.infos, index, layout.info_size, offset);
        // The byte before `flags` and `level` is `facility`: 0 is the kernel's.
        let facility = info(layout.info_level.checked_sub(1)?)?;
        let word = |offset| self.word(self.infos, index, layout.info_size, offset);
        Some(Record {
            sequence: word(layout.info_seq)?,
            nanoseconds: word(layout.info_time)?,
            kernel: self.memory.read_obj::<u8>(facility).ok()? == 0,
            begin: field(layout.desc_begin)?,
            next: field(layout.desc_next)?,
            length: self.memory.read_obj(info(layout.info_text_len)?).ok()?,
        })
    }

    /// The text of a record. Its block is in one piece: at its place or, if it would wrap, at 0.
    fn text<'b>(&self, record: &Record, buffer: &'b mut [u8; MAX_TEXT]) -> Option<&'b [u8]> {
        let Record { begin, next, .. } = *record;
        if begin & 1 != 0 {
            return Some(&[]); // a record without data
        }
        let (begin_wraps, next_wraps) = (begin / self.size, next / self.size);
        let (at, block) = if begin_wraps == next_wraps && begin < next {
            (begin % self.size, next - begin)
        } else if begin_wraps.wrapping_add(1) == next_wraps {
            (0, next % self.size)
        } else {
            return None;
        };
        let room = usize::try_from(block.checked_sub(BLOCK_HEADER)?).ok()?;
        let length = usize::from(record.length).min(room).min(MAX_TEXT);
        let text = buffer.get_mut(..length)?;
        let address = self.data.checked_add(at)?.checked_add(BLOCK_HEADER)?;
        self.memory.read_slice(text, GuestAddress(address)).ok()?;
        Some(text)
    }
}

fn element(base: u64, index: u64, size: u64, field: u64) -> Option<GuestAddress> {
    let offset = index.checked_mul(size)?.checked_add(field)?;
    base.checked_add(offset).map(GuestAddress)
}

/// The guest-physical address behind a kernel address.
fn physical(address: u64) -> Option<u64> {
    if address >= TEXT_MAP {
        return Some(address - TEXT_MAP);
    }
    let offset = |map: &u64| address.checked_sub(*map);
    DIRECT_MAPS
        .iter()
        .filter_map(offset)
        .find(|offset| *offset < DIRECT_MAP_SIZE)
}

/// Printable ASCII stays; a tab becomes a space, everything else (also what a terminal obeys) `?`.
fn clean(text: &[u8]) -> String {
    let clean = |byte: &u8| match byte {
        b'\t' => ' ',
        b' '..=b'~' => char::from(*byte),
        _ => '?',
    };
    text.iter().map(clean).collect()
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
