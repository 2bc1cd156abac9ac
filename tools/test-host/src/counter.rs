//! How fast this machine's time stamp counter runs, which is that of an emulated CPU, too.
//!
//! The emulated host's kernel would measure it against an emulated timer. On a busy machine that goes wrong, by a
//! factor of ten as has been seen: then the host's clock is so much too fast, and every deadline in it too short.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// For how long it is watched.
const WATCHED: Duration = Duration::from_millis(100);

/// How often it is read at either end, for one reading that nothing has come in between.
const READINGS: u32 = 50;

/// Its frequency in kHz.
pub fn khz() -> u64 {
    let (from, first) = reading();
    thread::sleep(WATCHED);
    let (to, last) = reading();
    let ticks = last.wrapping_sub(first) as f64;
    (ticks / to.saturating_duration_since(from).as_secs_f64() / 1000.0).round() as u64
}

/// The moment and the counter, as close to each other as can be had.
fn reading() -> (Instant, u64) {
    let readings = (0..READINGS).map(|_| {
        let before = Instant::now();
        // SAFETY: every x86-64 CPU has the instruction, and Linux lets all programs use it.
        let ticks = unsafe { _rdtsc() };
        (before.elapsed(), before, ticks)
    });
    match readings.min_by_key(|(between, ..)| *between) {
        Some((_, at, ticks)) => (at, ticks),
        None => (Instant::now(), 0), // there is one at least
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
