//! The worst moment: VMM, fs server, proxy, shim and containerd are killed in turn under busy
//! writers. Everything acknowledged must be on the host, byte for byte and in order.
//!
//! The guest writes through: an answered `write` is in the host's page cache, which survives the
//! kill of any process. So the writer that never syncs must lose nothing either, and kills can't
//! judge the way of `fsync` to the disk: `disk` has a disk that fails meanwhile. A store through a
//! mapping is the guest's alone until its kernel writes it back; the test measures how long that
//! takes.
//!
//! `KATA_LIKE_KILL_ROUNDS` is the number of kills, by default 100; the databases' share grows with
//! it. `KATA_LIKE_KILL_SEED` repeats the moments of an earlier run, as far as moments can be
//! repeated.

mod containerd;
mod databases;
mod disk;
mod machine;
mod records;
mod rounds;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kata_like_tests::TestResult;

/// The processes whose death ends the pod.
const VICTIMS: [&str; 4] = ["vmm", "fsd", "proxy", "shim"];

/// A store through a mapping may be lost only if it is younger than this.
const MAPPED_BOUND: Duration = Duration::from_secs(5);

/// The number of kills, without the databases'.
fn rounds() -> TestResult<u64> {
    match std::env::var("KATA_LIKE_KILL_ROUNDS") {
        Ok(text) => Ok(text.parse()?),
        Err(_) => Ok(100),
    }
}

/// Random numbers (splitmix64), the same from the same seed.
struct Chance(u64);

impl Chance {
    /// Prints the seed.
    fn new(what: &str) -> TestResult<Self> {
        let seed = match std::env::var("KATA_LIKE_KILL_SEED") {
            Ok(text) => text.parse()?,
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
        };
        println!("{what}: KATA_LIKE_KILL_SEED={seed}");
        Ok(Self(seed))
    }

    /// A random time up to `most`.
    fn up_to(&mut self, most: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        most.mul_f64(mixed as f64 / u64::MAX as f64)
    }
}
