//! The shim fails, stands still or dies at each step of create, start and delete; or the VMM or the
//! fs server dies while it stands there. Afterwards all is as if nothing had been (`Aftermath`),
//! and the same container can be made.
//!
//! The shim is a build with fail points (`shim-v2/src/steps/fail_points.rs`); everything else is
//! what is installed. A first pod that lives undisturbed says which points there are.
//!
//! `make test` takes a sample. `KATA_LIKE_FAULTS=all` (`make faults`) takes all, and
//! `KATA_LIKE_FAULTS_SEED` repeats a sample.

mod cases;
mod shim;

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use kata_like_tests::{Aftermath, Host, Parts, TestResult, failure, kata_like_only};

use cases::{Case, Kind};
use shim::Shim;

/// How many cases `make test` has time for: one of each kind in each phase.
const SAMPLE: usize = 8;

/// Points that are there whatever else changes: of each of the lists of steps, of start and delete.
const KNOWN: [&str; 9] = [
    "before read",
    "after network",
    cases::BORN,
    "after agent",
    "before place",
    "after guest",
    "before start in the guest",
    "before delete",
    "before undo",
];

#[test]
fn a_shim_that_fails_anywhere_leaves_nothing() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let shim = Shim::install(&host)?;
    let aftermath = Aftermath::expect(&host)?;
    let points = cases::points_of_a_life(&host, &shim)?;
    aftermath.holds()?;
    let missing: Vec<_> = KNOWN
        .iter()
        .filter(|known| !points.iter().any(|point| point.name == **known))
        .collect();
    assert!(missing.is_empty(), "no point {missing:?} in {points:?}");
    let all = cases::of(&points);
    println!("{} points, {} cases", points.len(), all.len());
    let mut parts = Parts::new();
    for case in chosen(all)? {
        parts.run(&case.to_string(), || {
            case.run(&host, &shim)?;
            aftermath.holds()
        });
    }
    parts.run("the neighbour's end", || aftermath.end());
    drop(shim);
    parts.end()
}

/// All, or a sample in which each kind and each phase of a life occurs.
fn chosen(all: Vec<Case>) -> TestResult<Vec<Case>> {
    if std::env::var("KATA_LIKE_FAULTS").is_ok_and(|value| value == "all") {
        return Ok(all);
    }
    let seed = match std::env::var("KATA_LIKE_FAULTS_SEED") {
        Ok(text) => text.parse()?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
    };
    println!("KATA_LIKE_FAULTS_SEED={seed}");
    let mut left = shuffled(all, seed);
    let mut taken = Vec::new();
    let mut seen = HashSet::new();
    // First one of each pair of kind and phase, then any.
    for new_only in [true, false] {
        let mut rest = Vec::new();
        for case in left {
            let is_new = !seen.contains(&case.group());
            if taken.len() < SAMPLE && (is_new || !new_only) {
                seen.insert(case.group());
                taken.push(case);
            } else {
                rest.push(case);
            }
        }
        left = rest;
    }
    match taken.iter().any(|case| case.kind == Kind::Abort) {
        true => Ok(taken),
        false => Err(failure("no shim dies in the sample")),
    }
}

/// Fisher and Yates' shuffle, with splitmix64: the same from the same seed.
fn shuffled<T>(mut all: Vec<T>, mut seed: u64) -> Vec<T> {
    for last in (1..all.len()).rev() {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = seed;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        all.swap(last, mixed as usize % (last + 1));
    }
    all
}
