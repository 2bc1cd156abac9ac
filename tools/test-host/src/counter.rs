//! How fast this machine's time stamp counter runs. An emulated CPU has the same counter.
//!
//! The emulated host's kernel would measure it against an emulated timer. On a busy machine that
//! went wrong by a factor of ten: the host's clock was that much too fast, and every deadline in
//! the host too short.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long the counter is watched.
const WATCHED: Duration = Duration::from_millis(100);

/// How often it is read at either end, so that one reading is uninterrupted.
const READINGS: u32 = 50;

/// The counter's frequency in kHz.
pub fn khz() -> u64 {
    let (from, first) = reading();
    thread::sleep(WATCHED);
    let (to, last) = reading();
    let ticks = last.wrapping_sub(first) as f64;
    (ticks / to.saturating_duration_since(from).as_secs_f64() / 1000.0).round() as u64
}

/// A moment and the counter, as close to each other as possible.
fn reading() -> (Instant, u64) {
    let readings = (0..READINGS).map(|_| {
        let before = Instant::now();
        // SAFETY: every x86-64 CPU has the instruction, and Linux lets all programs use it.
        let ticks = unsafe { _rdtsc() };
        (before.elapsed(), before, ticks)
    });
    match readings.min_by_key(|(between, ..)| *between) {
        Some((_, at, ticks)) => (at, ticks),
        None => (Instant::now(), 0), // there is at least one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_looks_agree() {
        let (one, other) = (khz(), khz());
        assert!(one > 100_000, "{one} kHz");
        assert!(one.abs_diff(other) < one / 1000, "{one} and {other} kHz");
    }
}
