//! Rings as the kernel writes them, and as an attacker does.

use std::sync::Arc;

use kata_like_boot::{End, EndReason, MAX_MESSAGE, VmReport};
use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;

const RING: u64 = 0x1000;
const DESCRIPTORS: u64 = 0x2000;
const INFOS: u64 = 0x3000;
const DATA: u64 = 0x8000;
const COUNT_BITS: u32 = 3;
const SIZE_BITS: u32 = 8;

fn layout() -> PrintkLayout {
    PrintkLayout {
        prb: 0x800,
        desc_ring: 0,
        text_ring: 0x40,
        count_bits: 0,
        descs: 8,
        infos: 16,
        head_id: 24,
        tail_id: 32,
        size_bits: 0,
        data: 8,
        desc_size: 24,
        desc_state: 0,
        desc_begin: 8,
        desc_next: 16,
        info_size: 32,
        info_seq: 0,
        info_time: 8,
        info_text_len: 16,
        info_level: 19,
    }
}

/// Plays the kernel: a ring of 8 records and 256 bytes of text.
struct Kernel {
    memory: GuestRam,
    next_id: u64,
    next_position: u64,
}

impl Kernel {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let kernel = Self {
            memory: Arc::new(memory),
            next_id: 1 << 40,
            next_position: 0,
        };
        kernel.put(0x800, TEXT_MAP + RING);
        kernel.put(RING, u64::from(COUNT_BITS));
        kernel.put(RING + 8, TEXT_MAP + DESCRIPTORS);
        kernel.put(RING + 16, DIRECT_MAPS[0] + INFOS);
        kernel.put(RING + 0x40, u64::from(SIZE_BITS));
        kernel.put(RING + 0x48, TEXT_MAP + DATA);
        kernel
    }

    fn put(&self, address: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    /// As `printk` does: a block of whole words, at the ring's beginning if it would wrap.
    fn say(&mut self, text: &str, facility: u8) {
        let (id, index) = (self.next_id, self.next_id % 8);
        let length = (BLOCK_HEADER + text.len() as u64).next_multiple_of(8);
        let begin = self.next_position;
        let wraps = begin / 256 != (begin + length - 1) / 256;
        let next = match wraps {
            true => (begin / 256 + 1) * 256 + length,
            false => begin + length,
        };
        let at = DATA + if wraps { 0 } else { begin % 256 };
        self.put(at, id);
        let place = GuestAddress(at + BLOCK_HEADER);
        self.memory.write_slice(text.as_bytes(), place).unwrap();
        let descriptor = DESCRIPTORS + 24 * index;
        self.put(descriptor, FINALIZED << 62 | id);
        self.put(descriptor + 8, begin);
        self.put(descriptor + 16, next);
        let info = INFOS + 32 * index;
        self.put(info, id - (1 << 40));
        self.put(info + 8, 1_234_567_000);
        self.put(info + 16, text.len() as u64 | u64::from(facility) << 16);
        self.put(RING + 24, id);
        self.put(RING + 32, id.saturating_sub(7).max(1 << 40));
        self.next_id += 1;
        self.next_position = next;
    }

    fn log(&self) -> GuestLog {
        GuestLog::new(Some(layout()), self.memory.clone())
    }
}

#[test]
fn new_lines_are_told_once() {
    let mut kernel = Kernel::new();
    let mut log = kernel.log();
    kernel.say("first", 0);
    assert_eq!(log.news().text, "[    1.234567] first\n");
    kernel.say("second\nthird", 0);
    let news = log.news();
    assert_eq!(news.text, "[    1.234567] second\n[    1.234567] third\n");
    assert!(!news.more);
    assert_eq!(log.news(), News::default());
}

/// A line that was told is not read again, however long the log is.
#[test]
fn a_record_that_was_told_ends_a_look() {
    let mut kernel = Kernel::new();
    let mut log = kernel.log();
    for text in ["first", "second"] {
        kernel.say(text, 0);
    }
    log.news();
    // If an older record is read, this sequence number shows it: the kernel would not give it.
    kernel.put(INFOS, 1000);
    kernel.say("third", 0);
    assert_eq!(log.news().text, "[    1.234567] third\n");
}

#[test]
fn a_full_ring_gives_its_newest_records() {
    let mut kernel = Kernel::new();
    for number in 0..40 {
        kernel.say(&format!("a line with the number {number}"), 0);
    }
    let tail = kernel.log().tail();
    // 256 bytes hold fewer than eight such lines; newer blocks overwrite older ones.
    assert_eq!(
        tail.last().unwrap(),
        "[    1.234567] a line with the number 39"
    );
    assert!(tail.len() <= 8, "{tail:?}");
}

#[test]
fn only_the_kernel_itself_can_panic() {
    let mut kernel = Kernel::new();
    kernel.say("Kernel panic - not syncing: says a user", 1);
    assert_eq!(kernel.log().panic(), None);
    kernel.say("Kernel panic - not syncing: VFS", 0);
    assert_eq!(
        kernel.log().panic().unwrap(),
        "Kernel panic - not syncing: VFS"
    );
}

#[test]
fn nothing_that_a_terminal_obeys_passes() {
    let mut kernel = Kernel::new();
    kernel.say("\x1b[2J\rred\t\u{202e}", 0);
    assert_eq!(kernel.log().tail(), ["[    1.234567] ?[2J?red ???"]);
}

#[test]
fn without_a_layout_there_is_no_log() {
    let kernel = Kernel::new();
    let mut log = GuestLog::new(None, kernel.memory.clone());
    assert_eq!(log.news(), News::default());
    assert!(log.tail().is_empty());
}

/// Every record of a large ring points to the same KiB of newlines: the guest needs 1 MiB for
/// sixteen million lines.
#[test]
fn a_ring_full_of_newlines_costs_bounded_work() {
    const COUNT: u64 = MAX_RECORDS;
    const INFOS: u64 = 0x10_0000;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
    let kernel = Kernel {
        memory: Arc::new(memory),
        next_id: 0,
        next_position: 0,
    };
    kernel.put(0x800, TEXT_MAP + RING);
    kernel.put(RING, u64::from(COUNT.ilog2()));
    kernel.put(RING + 8, TEXT_MAP + 0x8000);
    kernel.put(RING + 16, TEXT_MAP + INFOS);
    kernel.put(RING + 24, COUNT);
    kernel.put(RING + 32, 1);
    kernel.put(RING + 0x40, 12);
    kernel.put(RING + 0x48, TEXT_MAP + DESCRIPTORS);
    let newlines = [b'\n'; MAX_TEXT];
    let text = GuestAddress(DESCRIPTORS + BLOCK_HEADER);
    kernel.memory.write_slice(&newlines, text).unwrap();
    for id in 1..=COUNT {
        let (descriptor, info) = (0x8000 + 24 * (id % COUNT), INFOS + 32 * (id % COUNT));
        kernel.put(descriptor, FINALIZED << 62 | id);
        kernel.put(descriptor + 16, BLOCK_HEADER + MAX_TEXT as u64);
        kernel.put(info, id);
        kernel.put(info + 16, MAX_TEXT as u64);
    }
    let before = peak_kib();
    let mut log = kernel.log();
    let news = log.news();
    assert!(news.more);
    assert!(news.text.len() < 40 << 10, "{} bytes", news.text.len());
    assert_eq!(log.tail(), vec!["[    0.000000] "; TAIL]);
    assert_eq!(log.panic(), None);
    let more = peak_kib() - before;
    assert!(more < 64 << 10, "{more} KiB for one look");
    // What one look leaves is in the next ones; and the longest last message is short enough.
    assert!(log.news().more);
    let end = VmReport::Ended(End {
        reason: EndReason::Failed,
        detail: String::new(),
        log_tail: vec!["\"".repeat(MAX_TEXT); TAIL],
        log: news.text,
    });
    let message = serde_json::to_vec(&end).unwrap();
    assert!(message.len() < MAX_MESSAGE / 10 * 9, "{}", message.len());
}

/// The most memory that this process has had (VmHWM of proc_pid_status(5)).
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

/// The largest ring that we believe costs bounded work.
#[test]
fn giant_claims_are_refused() {
    for (address, bits) in [
        (RING, MAX_COUNT_BITS + 1),
        (RING + 0x40, MAX_SIZE_BITS + 1),
        (RING, u32::MAX),
    ] {
        let mut kernel = Kernel::new();
        kernel.say("hello", 0);
        kernel.put(address, u64::from(bits));
        assert!(kernel.log().tail().is_empty());
    }
}

proptest! {
    /// Whatever is in guest memory, reading the log ends, without a panic, with clean lines.
    #[test]
    fn no_memory_breaks_the_reader(
        writes in proptest::collection::vec((0u64..0x2000, any::<u64>()), 0..60),
        pointers in proptest::collection::vec((prop::sample::select(vec![0x800u64, RING, RING + 8, RING + 16, RING + 24, RING + 32, RING + 0x40, RING + 0x48]), any::<u64>()), 0..4),
    ) {
        let mut kernel = Kernel::new();
        for number in 0..10 {
            kernel.say(&format!("line {number}"), 0);
        }
        for (offset, value) in writes {
            kernel.put(DESCRIPTORS + offset, value);
        }
        for (address, value) in pointers {
            kernel.put(address, value);
        }
        let mut log = kernel.log();
        let text = log.news().text;
        prop_assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte) || byte == b'\n'));
        for line in log.tail() {
            prop_assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        }
        let _ = log.panic();
    }
}
