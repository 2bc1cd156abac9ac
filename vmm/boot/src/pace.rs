//! What became of the time of a guest that does not get through its boot in time.
//!
//! Asked by whoever waits for the guest's agent, of the host's scheduler: it counts for each thread
//! of the VMM how long it ran and how long it waited for a CPU.

use std::fmt;
use std::fs;
use std::io;
use std::time::Duration;

/// How long a VMM has existed, and what its threads did in that time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Since the VMM was started.
    pub elapsed: Duration,
    /// With a CPU: all threads together, the vCPUs among them.
    pub ran: Duration,
    /// Ready to run, without a CPU.
    pub waited: Duration,
    /// Whether the guest made progress to the end.
    pub gets_on: bool,
}

impl Pace {
    /// That of the VMM with this pid. Fails where it is gone, or where the host's kernel does not
    /// count (CONFIG_SCHED_INFO).
    pub fn of(vmm: u32, elapsed: Duration, gets_on: bool) -> io::Result<Self> {
        let (mut ran, mut waited) = (0, 0);
        for thread in fs::read_dir(format!("/proc/{vmm}/task"))? {
            // Documentation/scheduler/sched-stats.rst: nanoseconds, nanoseconds, time slices.
            let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else {
                continue; // it has ended meanwhile
            };
            let mut numbers = text.split_whitespace().map(str::parse::<u64>);
            let (Some(Ok(running)), Some(Ok(waiting))) = (numbers.next(), numbers.next()) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            ran += running;
            waited += waiting;
        }
        Ok(Self {
            elapsed,
            ran: Duration::from_nanos(ran),
            waited: Duration::from_nanos(waited),
            gets_on,
        })
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            elapsed,
            ran,
            waited,
            gets_on,
        } = self;
        write!(
            to,
            "its virtual machine ran for {ran:.1?} of {elapsed:.1?} and waited for a CPU for {waited:.1?}"
        )?;
        let half = *elapsed / 2;
        if waited > ran && *ran + *waited >= half {
            to.write_str(": this host's CPUs are too busy")
        } else if *gets_on && *ran >= half {
            to.write_str(
                " and gets on: KVM runs guests far too slowly on this host, \
                 as one does that interprets them (in a nested or an emulated machine)",
            )
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(ran: u64, waited: u64, gets_on: bool) -> String {
        let [elapsed, ran, waited] = [20, ran, waited].map(Duration::from_secs);
        let pace = Pace {
            elapsed,
            ran,
            waited,
            gets_on,
        };
        pace.to_string()
    }

    #[test]
    fn slow_is_told_from_busy_and_from_stuck() {
        let begin = "its virtual machine ran for 19.0s of 20.0s and waited for a CPU for 1.0s";
        let slow = text(19, 1, true);
        let rest = slow.strip_prefix(begin).expect(&slow);
        assert!(
            rest.starts_with(" and gets on: KVM runs guests far too slowly"),
            "{rest}"
        );
        assert_eq!(text(19, 1, false), begin, "it may spin for ever");
        assert!(text(4, 15, true).ends_with("this host's CPUs are too busy"));
        assert!(
            text(1, 0, true).ends_with("for a CPU for 0.0ns"),
            "{}",
            text(1, 0, true)
        );
    }

    #[test]
    fn the_hosts_kernel_counts() {
        let begin = std::time::Instant::now();
        let pace = || Pace::of(std::process::id(), begin.elapsed(), true).expect("schedstat");
        let before = pace();
        while begin.elapsed() < Duration::from_millis(300) {
            std::hint::spin_loop();
        }
        let after = pace();
        let (ran, waited) = (after.ran - before.ran, after.waited - before.waited);
        assert!(ran + waited >= Duration::from_millis(200), "{after:?}");
        assert!(Pace::of(u32::MAX, Duration::ZERO, true).is_err());
    }
}
