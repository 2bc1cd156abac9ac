//! Time limits in units of the machine, and not of the clock.
//!
//! A limit is a time on the machine where the tests were written: two cores, each with one emulated
//! host. A slower machine gets more. A reference says how much more: a fixed piece of work. It is
//! timed when the first limit is needed (unless [`VARIABLE`] hands over what the caller has found),
//! and again each time that something is late. The scale is the slowest that was seen, never below
//! 1 and never above [`MOST`]. The time in which a machine stands still does not count.
//!
//! `run-tests`, the tests and `test-host` use it.

use std::fs;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// The environment's variable that holds a scale to begin with.
pub const VARIABLE: &str = "KATA_LIKE_SCALE";

/// No limit grows more than this: what really hangs has to end, too.
pub const MOST: f64 = 4.0;

/// How often the reference goes round.
const ROUNDS: u64 = 40_000_000;

/// How long the reference takes where limits were chosen.
const NATIVE: Duration = Duration::from_millis(150);

/// The same on an emulated host with another one beside it.
const EMULATED: Duration = Duration::from_millis(230);

/// How long an emulated host takes there from its kernel's first instruction until it is up.
pub const BOOT: Duration = Duration::from_millis(7500);

/// Part of the name that QEMU's emulator gives its CPUs.
const EMULATED_CPU: &str = "QEMU TCG";

/// How often the watch looks at the clock.
const LOOK: Duration = Duration::from_millis(250);

/// A watch that comes so much too late was not slow: the machine stood still.
const STILL: Duration = Duration::from_secs(1);

/// One measurement serves all who are late at the same time.
const FRESH: Duration = Duration::from_secs(10);

/// The bits of the largest scale that was seen, as an `f64`.
static SCALE: AtomicU64 = AtomicU64::new(0);

/// For how many milliseconds the machine has stood still since the watch began.
static STOOD: AtomicU64 = AtomicU64::new(0);

/// When the reference was timed last.
static MEASURED: Mutex<Option<Instant>> = Mutex::new(None);

/// How many times slower than there this machine is, as far as is known: between 1 and [`MOST`].
pub fn scale() -> f64 {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| {
        let given = std::env::var(VARIABLE);
        match given.ok().and_then(|text| text.parse().ok()) {
            Some(given) => slower(given),
            None => drop(measure()),
        }
    });
    known()
}

fn known() -> f64 {
    bounded(f64::from_bits(SCALE.load(Ordering::SeqCst)))
}

/// A limit of this machine.
pub fn scaled(limit: Duration) -> Duration {
    limit.mul_f64(scale())
}

/// Whether what took so long was in time. The reference is timed again before it is said to be
/// late.
pub fn in_time(took: Duration, limit: Duration) -> bool {
    took < scaled(limit) || took < limit.mul_f64(measure())
}

/// Times the reference, unless somebody did a moment ago, and gives the scale as it is known now.
pub fn measure() -> f64 {
    let mut measured = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    if measured.is_none_or(|at| at.elapsed() > FRESH) {
        let nominal = if emulated() { EMULATED } else { NATIVE };
        slower(reference().div_duration_f64(nominal));
        *measured = Some(Instant::now());
    }
    known()
}

/// Takes what another reference has said: limits grow with it, and never shrink.
pub fn slower(scale: f64) {
    // Positive numbers have the same order as their bits.
    SCALE.fetch_max(bounded(scale).to_bits(), Ordering::SeqCst);
}

fn bounded(scale: f64) -> f64 {
    match scale.is_nan() {
        true => 1.0,
        false => scale.clamp(1.0, MOST),
    }
}

/// Does the work and says how long it took.
///
/// An emulated host looks at the time that its CPU gave to this thread. That leaves out what else
/// runs on the host, and holds what the emulator itself was kept from. Elsewhere others count, so
/// the clock does.
fn reference() -> Duration {
    let clock = match emulated() {
        true => ClockId::ThreadCPUTime,
        false => ClockId::Monotonic,
    };
    let begun = now(clock);
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    for round in 0..ROUNDS {
        state = black_box(
            (state ^ round)
                .rotate_left(13)
                .wrapping_mul(0xff51_afd7_ed55_8ccd),
        );
    }
    black_box(state);
    now(clock).saturating_sub(begun)
}

fn now(clock: ClockId) -> Duration {
    Duration::try_from(clock_gettime(clock)).unwrap_or_default()
}

/// Whether this machine's CPUs are QEMU's.
pub fn emulated() -> bool {
    static EMULATED: OnceLock<bool> = OnceLock::new();
    *EMULATED.get_or_init(|| {
        fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains(EMULATED_CPU))
    })
}

/// The time that the machine has stood still since the first call, told by a thread that comes too
/// late.
fn stood() -> Duration {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        thread::spawn(|| {
            loop {
                let begun = Instant::now();
                thread::sleep(LOOK);
                let lost = lost(begun.elapsed()).as_millis();
                STOOD.fetch_add(u64::try_from(lost).unwrap_or(u64::MAX), Ordering::SeqCst);
            }
        });
    });
    Duration::from_millis(STOOD.load(Ordering::SeqCst))
}

/// What of a sleep of [`LOOK`] was no sleep.
fn lost(slept: Duration) -> Duration {
    let late = slept.saturating_sub(LOOK);
    if late < STILL { Duration::ZERO } else { late }
}

/// Waits for one thing: begun now, with a limit of its own.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    begun: Instant,
    stood: Duration,
    limit: Duration,
}

impl Patience {
    /// Begins to wait.
    pub fn new(limit: Duration) -> Self {
        Self {
            stood: stood(),
            begun: Instant::now(),
            limit,
        }
    }

    /// How much longer to wait. Before it says that there is nothing left, it times the reference
    /// again.
    pub fn left(&self) -> Duration {
        let left = self.left_at(scale());
        match left.is_zero() {
            true => self.left_at(measure()),
            false => left,
        }
    }

    /// Whether nothing is left.
    pub fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    fn left_at(&self, scale: f64) -> Duration {
        let still = stood().saturating_sub(self.stood);
        let all = self.limit.mul_f64(scale).saturating_add(still);
        all.saturating_sub(self.begun.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_between_one_and_the_most() {
        let given = [0.2, 1.0, 1.5, 90.0, f64::NAN, f64::INFINITY, -1.0];
        let wanted = [1.0, 1.0, 1.5, MOST, 1.0, MOST, 1.0];
        assert_eq!(given.map(bounded), wanted);
    }

    #[test]
    fn a_slow_machine_gets_more_time_and_no_less_later() {
        let patience = Patience {
            begun: Instant::now() - Duration::from_secs(15),
            stood: stood(),
            limit: Duration::from_secs(10),
        };
        assert_eq!(patience.left_at(1.0), Duration::ZERO);
        let left = patience.left_at(2.0);
        assert!(left > Duration::from_secs(4), "{left:?}");
        slower(3.0);
        slower(1.5);
        let seconds = Duration::from_secs;
        assert!(in_time(seconds(29), seconds(10)));
        assert!(!in_time(seconds(41), seconds(10)));
        assert!(known() >= 3.0);
        assert!(scaled(Duration::from_secs(1)) >= Duration::from_secs(3));
    }

    #[test]
    fn a_thread_that_comes_a_little_late_did_not_see_the_machine_stand_still() {
        let seconds = Duration::from_secs;
        assert_eq!(lost(LOOK + STILL / 2), Duration::ZERO);
        assert_eq!(lost(LOOK + seconds(30)), seconds(30));
        let patience = Patience {
            begun: Instant::now() - seconds(15),
            // As if the machine had stood still for ten of the fifteen seconds since.
            stood: Duration::ZERO,
            limit: seconds(10),
        };
        stood();
        STOOD.fetch_add(10_000, Ordering::SeqCst);
        assert!(patience.left_at(1.0) > seconds(4));
    }

    #[test]
    fn the_reference_takes_time() {
        assert!(reference() > Duration::from_millis(1));
    }
}
