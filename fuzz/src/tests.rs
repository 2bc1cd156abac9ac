//! Replays what was found, and goes a little beyond it.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::mutate::{Chance, mutate};
use super::{TARGETS, Target};

/// How many inputs are made of the files of a corpus, in turn.
const MADE: usize = 3000;

/// What the corpora may take, in bytes.
const MOST_OF_ONE: usize = 4 << 10;
const MOST_OF_ALL: usize = 1 << 20;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Runs a target. On failure says the input, which a file can be made of.
fn run(target: Target, input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| target.run(input))).is_err() {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!("{} fails with the input (hex) {hex}", target.name);
    }
}

fn replay(name: &str) {
    let target = Target::find(name).expect("a target of that name");
    let corpus = corpus(name);
    assert!(
        corpus.len() >= 5,
        "{name}: a corpus of {} files",
        corpus.len()
    );
    let mut chance = Chance::new(1);
    for input in &corpus {
        run(target, input);
    }
    for input in corpus.iter().cycle().take(MADE) {
        let other = &corpus[chance.below(corpus.len())];
        run(target, &mutate(input, other, &mut chance));
    }
}

/// One test for each target, so that they run side by side.
macro_rules! replays {
    ($($name:ident)*) => {
        const REPLAYED: &[&str] = &[$(stringify!($name)),*];
        $(#[test] fn $name() { replay(stringify!($name)); })*
    };
}

replays! { bus queue vsock net block log elf cpio messages config spec process uri answer events gate }

#[test]
fn each_target_is_replayed() {
    assert_eq!(TARGETS.map(|target| target.name), REPLAYED);
}

#[test]
fn the_corpora_are_small_and_belong_to_targets() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut all = 0;
    for entry in fs::read_dir(top).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            Target::find(&name).is_some(),
            "corpus/{name} is no target's"
        );
        for input in corpus(&name) {
            assert!(input.len() <= MOST_OF_ONE, "{name}: {} bytes", input.len());
            all += input.len();
        }
    }
    assert!(all <= MOST_OF_ALL, "{all} bytes");
}

#[test]
fn a_target_that_takes_too_much_fails() {
    let greedy = Target {
        name: "greedy",
        most: 100,
        function: |data| drop(std::hint::black_box(data.to_vec())),
    };
    greedy.run(&[0; 100]);
    assert!(catch_unwind(|| greedy.run(&[0; 101])).is_err());
}
