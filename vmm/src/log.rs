//! The guest's log: the kernel's own printk ring, read from guest memory.
//!
//! `machine` appends new lines to the log's file on request and when the VM ends. A console would
//! cost exits; the ring costs none, and has a panic's last lines. Facts:
//! kernel/printk/printk_ringbuffer.{h,c}.
//!
//! The guest can write all of it. We take every index modulo a size that is bounded here; every
//! address must lie in guest memory; every text is cut and cleaned. What does not fit is left out.
//! One pass reads at most [`MAX_RECORDS`] records of [`MAX_TEXT`] bytes.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use kata_like_boot::PrintkLayout;
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::GuestRam;

/// The most bytes that we ever write to the log's file.
const MAX_FILE: u64 = 1 << 20;

/// Bounds of one pass, whatever the guest's ring claims.
const MAX_RECORDS: u64 = 1 << 16;
const MAX_COUNT_BITS: u32 = 20;
const MAX_SIZE_BITS: u32 = 25;
const MAX_TEXT: u64 = 1024;

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
const PANIC: &str = "Kernel panic - not syncing";

#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    sequence: u64,
    nanoseconds: u64,
    /// Whether the kernel itself said it, and not a process through `/dev/kmsg`.
    kernel: bool,
    text: String,
}

/// One guest's log, and how much of it is in the file.
pub struct GuestLog {
    layout: Option<PrintkLayout>,
    memory: GuestRam,
    file: File,
    next: u64,
    written: u64,
    full: bool,
}

impl GuestLog {
    /// Without a layout the log stays empty.
    pub fn new(layout: Option<PrintkLayout>, memory: GuestRam, file: OwnedFd) -> Self {
        Self {
            layout,
            memory,
            file: file.into(),
            next: 0,
            written: 0,
            full: false,
        }
    }

    /// Appends new lines to the file. If the file fails its owner loses lines; the VM goes on.
    pub fn write_new(&mut self) -> std::io::Result<()> {
        if self.full {
            return Ok(());
        }
        for line in self.read(self.next) {
            self.next = self.next.max(line.sequence.saturating_add(1));
            let text = format(&line);
            let length = text.len() as u64 + 1;
            if self.written + length > MAX_FILE {
                self.full = true;
                return writeln!(
                    self.file,
                    "[the log's limit of {MAX_FILE} bytes is reached]"
                );
            }
            self.written += length;
            writeln!(self.file, "{text}")?;
        }
        Ok(())
    }

    /// The last lines, oldest first.
    pub fn tail(&self) -> Vec<String> {
        let lines = self.read(0);
        let skipped = lines.len().saturating_sub(TAIL);
        lines.iter().skip(skipped).map(format).collect()
    }

    /// The kernel's own words on why it panicked, if it did.
    pub fn panic(&self) -> Option<String> {
        let lines = self.read(0).into_iter();
        let mut panics = lines.filter(|line| line.kernel && line.text.contains(PANIC));
        panics.next().map(|line| line.text)
    }

    /// The lines from a sequence number on.
    fn read(&self, from: u64) -> Vec<Line> {
        let ring = self
            .layout
            .as_ref()
            .and_then(|layout| Ring::find(layout, &self.memory));
        ring.map_or(Vec::new(), |ring| ring.lines(from))
    }
}

fn format(line: &Line) -> String {
    let (seconds, rest) = (
        line.nanoseconds / 1_000_000_000,
        line.nanoseconds % 1_000_000_000,
    );
    format!("[{seconds:5}.{:06}] {}", rest / 1000, line.text)
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

    /// Searches from the newest record on: a frequent caller reads the new ones and one old one.
    fn lines(&self, from: u64) -> Vec<Line> {
        let records = (self.head.wrapping_sub(self.tail) & ID_MASK).saturating_add(1);
        // The newest ones, if the guest claims more than there can be.
        let records = records.min(self.count).min(MAX_RECORDS);
        let is_new = |record: &Vec<Line>| record.iter().all(|line| line.sequence >= from);
        let mut found: Vec<_> = (0..records)
            .filter_map(|step| self.record(self.head.wrapping_sub(step) & ID_MASK))
            .take_while(is_new)
            .collect();
        found.reverse();
        found.into_iter().flatten().collect()
    }

    fn word(&self, base: u64, index: u64, size: u64, field: u64) -> Option<u64> {
        self.memory
            .read_obj(element(base, index, size, field)?)
            .ok()
    }

    /// The lines of the record `id`, if it is there and complete.
    fn record(&self, id: u64) -> Option<Vec<Line>> {
        let index = id % self.count;
        let layout = self.layout;
        let field = |offset| self.word(self.descriptors, index, layout.desc_size, offset);
        let state = field(layout.desc_state)?;
        if state & ID_MASK != id || !matches!(state >> 62, COMMITTED | FINALIZED) {
            return None;
        }
        let (begin, next) = (field(layout.desc_begin)?, field(layout.desc_next)?);
        let info = |offset| self.word(self.infos, index, layout.info_size, offset);
        let (sequence, nanoseconds) = (info(layout.info_seq)?, info(layout.info_time)?);
        let info = |offset| element(self.infos, index, layout.info_size, offset);
        let length: u16 = self.memory.read_obj(info(layout.info_text_len)?).ok()?;
        // The byte before `flags` and `level` is `facility`: 0 is the kernel's.
        let facility: u8 = self
            .memory
            .read_obj(info(layout.info_level.checked_sub(1)?)?)
            .ok()?;
        let text = self.text(begin, next, u64::from(length))?;
        let line = |text: &[u8]| Line {
            sequence,
            nanoseconds,
            kernel: facility == 0,
            text: clean(text),
        };
        let lines = text.split(|byte| *byte == b'\n');
        Some(lines.map(line).collect())
    }

    /// The text of a block. A block is in one piece: at its place or, if it would wrap, at 0.
    fn text(&self, begin: u64, next: u64, length: u64) -> Option<Vec<u8>> {
        if begin & 1 != 0 {
            return Some(Vec::new()); // a record without data
        }
        let (begin_wraps, next_wraps) = (begin / self.size, next / self.size);
        let (at, block) = if begin_wraps == next_wraps && begin < next {
            (begin % self.size, next - begin)
        } else if begin_wraps.wrapping_add(1) == next_wraps {
            (0, next % self.size)
        } else {
            return None;
        };
        let length = length.min(block.checked_sub(BLOCK_HEADER)?).min(MAX_TEXT);
        let mut text = vec![0; length as usize];
        let address = self.data.checked_add(at)?.checked_add(BLOCK_HEADER)?;
        self.memory
            .read_slice(&mut text, GuestAddress(address))
            .ok()?;
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
