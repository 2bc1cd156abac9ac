//! A log that no kernel has written: sizes, addresses, loops and lines that cost the reader much.

use crate::dice::Dice;
use crate::machine::{DATA, RAM_END, fill, sleep, store};
use crate::report::{
    self, COUNT_BITS, DATA as TEXT, DESCRIPTOR_SIZE, DESCRIPTORS, HEAD, INFO_SIZE, INFOS,
};
use crate::report::{POINTER, RING, SIZE_BITS, TAIL, TEXT_MAP, TEXT_RING};
use crate::say;

/// Where forged records lie, and their heads.
const RECORDS_AT: u64 = DATA + 0x10_0000;
const HEADS_AT: u64 = DATA + 0x100_0000;
/// A MiB of newlines.
const NEWLINES: u64 = DATA + 0x200_0000;

/// Within this time the host looks, in milliseconds.
const LOOK: u32 = 200;

/// Forges the ring in `count` random ways beside those that are known to be hard.
pub fn attack(count: u64) {
    forged("addresses outside RAM", |dice| {
        let far = [0, TEXT_MAP - 1, u64::MAX, TEXT_MAP + RAM_END, 1 << 63];
        store(POINTER, dice.one_of(&far));
    });
    forged("parts outside RAM", |dice| {
        let far = [
            0,
            u64::MAX,
            TEXT_MAP + RAM_END - 8,
            0xffff_8880_0000_0000 + (1 << 44),
        ];
        store(RING + dice.one_of(&[DESCRIPTORS, INFOS]), dice.one_of(&far));
        store(RING + TEXT_RING + TEXT, dice.one_of(&far));
    });
    forged("sizes", |dice| {
        store(
            RING + COUNT_BITS,
            dice.one_of(&[0, 20, 21, 63, 64, u32::MAX]),
        );
        store(
            RING + TEXT_RING + SIZE_BITS,
            dice.one_of(&[0, 25, 26, 64, u32::MAX]),
        );
    });
    forged("heads and tails", |dice| {
        store(RING + HEAD, dice.number());
        store(RING + TAIL, dice.number());
    });
    for count_bits in [14, 20] {
        forged("records that are all the same MiB of newlines", |_| {
            newlines(count_bits)
        });
    }
    for _ in 0..count {
        forged("bytes of no meaning", |dice| {
            for word in 0..6 {
                store(RING + 8 * word, dice.number());
                store(RING + TEXT_RING + 8 * word, dice.number());
            }
        });
    }
}

/// Forges, lets the host read, and says so in a ring in order.
fn forged(what: &str, mut forge: impl FnMut(&mut Dice)) {
    say!("attack 0 log: {what}");
    let mut dice = Dice::new(51);
    for _ in 0..3 {
        // The host must have read what was said before.
        sleep(LOOK);
        forge(&mut dice);
        sleep(LOOK);
        report::begin();
        say!("asks log");
        say!("answered log");
    }
}

/// As many records as the ring may claim, whose texts are the same newlines.
pub fn newlines(count_bits: u32) {
    fill(NEWLINES, 1 << 20, b'\n');
    let (records, number) = (1_u64 << count_bits.min(16), report::number());
    for id in 0..records {
        let (record, head) = (RECORDS_AT + id * DESCRIPTOR_SIZE, HEADS_AT + id * INFO_SIZE);
        store(record + 8, 0_u64);
        store(record + 16, 1_u64 << 20);
        store(record, id | 1 << 62);
        store(head, number + id);
        store(head + 16, u16::MAX);
        store(head + 18, 0_u8);
    }
    store(RING + COUNT_BITS, count_bits);
    store(RING + DESCRIPTORS, TEXT_MAP + RECORDS_AT);
    store(RING + INFOS, TEXT_MAP + HEADS_AT);
    store(RING + TEXT_RING + SIZE_BITS, 25_u32);
    store(RING + TEXT_RING + TEXT, TEXT_MAP + NEWLINES);
    store(RING + HEAD, records - 1);
    store(RING + TAIL, 0_u64);
    report::skip(records);
}
