//! The neighbour: it adds up its memory again and again, and says each sum.

use crate::dice::Dice;
use crate::machine::{FREE, load, sleep, store};
use crate::say;

const AT: u64 = FREE + (8 << 20);
const WORDS: u64 = 16 << 10;
const SEED: u64 = 0x5eed;

/// How many milliseconds it sleeps after each sum, to leave the CPUs to others.
const PAUSE: u32 = 50;

/// The sum of all words, as it has to be.
pub fn right() -> u64 {
    let mut dice = Dice::new(SEED);
    (0..WORDS).fold(0, |sum: u64, _| add(sum, dice.next()))
}

fn add(sum: u64, word: u64) -> u64 {
    sum.rotate_left(5) ^ word
}

/// Goes on until the VM is stopped.
pub fn go_on() -> ! {
    let mut dice = Dice::new(SEED);
    for word in 0..WORDS {
        store(AT + 8 * word, dice.next());
    }
    for round in 1_u64.. {
        let sum = (0..WORDS).fold(0, |sum, word| add(sum, load(AT + 8 * word)));
        say!("sum {round} {sum:x}");
        sleep(PAUSE);
    }
    crate::machine::end()
}
