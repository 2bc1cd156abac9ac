//! The worst moment: VMM, fs server, shim and containerd are killed by turns under whoever writes,
//! and all that was acknowledged is on the host, byte for byte and in order.
//!
//! The guest writes through: what `write` has answered is in the host's page cache, which survives
//! the kill of any process. So the writer that never syncs must lose nothing either, and the way of
//! `fsync` to the disk can't be judged by kills: `disk` has a disk that fails in the midst of it.
//! What is stored through a mapping is the guest's alone until its kernel writes it back; how long
//! that takes is measured.
//!
//! `KATA_LIKE_KILL_ROUNDS` is how often something is killed, 200 without it; the databases' share
//! grows with it. `KATA_LIKE_KILL_SEED` repeats the moments of an earlier run, as far as moments
//! can be repeated.

mod containerd;
mod databases;
mod disk;
mod machine;
mod records;
mod rounds;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kata_like_tests::TestResult;

/// Whose death ends the pod.
const VICTIMS: [&str; 3] = ["vmm", "fsd", "shim"];

/// What was stored through a mapping may be lost if it is younger than this, and only then.
const MAPPED_BOUND: Duration = Duration::from_secs(5);

/// How often something is killed, the databases' kills not counted.
fn rounds() -> TestResult<u64> {
    match std::env::var("KATA_LIKE_KILL_ROUNDS") {
        Ok(text) => Ok(text.parse()?),
        Err(_) => Ok(200),
    }
}

/// Numbers by chance (splitmix64), the same from the same seed.
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

    /// A time up to this one.
    fn up_to(&mut self, most: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        most.mul_f64(mixed as f64 / u64::MAX as f64)
    }
}
