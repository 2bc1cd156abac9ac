//! Which test binaries there are, how long each part of them may take, and in which order they
//! begin.
//!
//! The times hold for the machine that `kata-like-limits` speaks of.

use std::time::Duration;

/// A part of all that is run.
pub struct Part {
    pub name: &'static str,
    pub minutes: u64,
    /// Its test binaries.
    pub binaries: &'static [&'static str],
}

const fn part(name: &'static str, minutes: u64, binaries: &'static [&'static str]) -> Part {
    Part {
        name,
        minutes,
        binaries,
    }
}

/// The parts, in the order of the summary.
pub const PARTS: [Part; 11] = [
    part("set-up and builds", 25, &[]),
    part("virtual machine", 7, &["boot", "devices", "hostile_guest"]),
    part(
        "OCI",
        10,
        &[
            "oci",
            "oci_1_7",
            "volumes",
            "read_only",
            "databases",
            "pods",
            "task_states",
        ],
    ),
    part(
        "lifecycle",
        8,
        &["lifecycle", "streams", "task_api", "containerd_1_7"],
    ),
    part(
        "data",
        15,
        &["full_disk", "ends", "attributes", "file_systems"],
    ),
    part("workloads", 6, &["workloads", "host_devices"]),
    part("the worst moment", 18, &["worst_moment"]),
    part("network", 9, &["network", "port_forward"]),
    part("Kubernetes", 10, &["cri", "cri_1_7", "deploy", "selinux"]),
    part("callers", 5, &["docker", "callers"]),
    part(
        "faults and hostile",
        14,
        &[
            "faults",
            "fail_points",
            "swapper",
            "hostile_agent",
            "bad_input",
            "slow_hosts",
            "figures",
            "processes",
        ],
    ),
];

/// Those that take longest, which begin first: so no host is left with one of them when the others
/// are done.
const LONGEST: [&str; 9] = [
    "worst_moment",
    "oci",
    "cri",
    "lifecycle",
    "streams",
    "pods",
    "workloads",
    "task_states",
    "network",
];

/// Those that want a host whose kernel has SELinux: one more, for the first thread that has nothing
/// left to do.
pub const SELINUX: [&str; 1] = ["selinux"];

/// Those that have a guest each and look at its host's figures: one test at a time.
pub const ALONE: [&str; 3] = ["boot", "devices", "hostile_guest"];

/// The one that needs a shim with fail points.
pub const FAIL_POINTS: &str = "fail_points";

/// Those of the VMM's crate; the others are in `tests/`.
pub const OF_THE_VMM: [&str; 3] = ["boot", "devices", "hostile_guest"];

/// Tests of the house itself need no host.
pub const OUTSIDE: [&str; 3] = ["house", "kata_like_tests", "run-tests"];

/// All that `make test` does, from its first step. What is not run by then is reported as not run.
/// It takes 65 to 70 minutes from nothing; the rest is for a machine that has other work.
pub fn total() -> Duration {
    Duration::from_secs(80 * 60) * series()
}

/// How long one test binary may take: twice the time of its part.
pub fn limit(name: &str) -> Duration {
    let part = PARTS.iter().find(|part| part.binaries.contains(&name));
    Duration::from_secs(part.map_or(5, |part| part.minutes) * 60 * 2) * series()
}

/// How many times as long `make faults` has: it does whole series where `make test` takes samples.
fn series() -> u32 {
    match std::env::var("KATA_LIKE_FAULTS").as_deref() {
        Ok("all") => 6,
        _ => 1,
    }
}

/// All test binaries that need a host, in the order in which they begin.
pub fn in_order() -> Vec<&'static str> {
    let mut names: Vec<_> = PARTS
        .iter()
        .flat_map(|part| part.binaries.iter().copied())
        .collect();
    names.sort_by_key(|name| {
        let place = LONGEST.iter().position(|longest| longest == name);
        place.unwrap_or(LONGEST.len())
    });
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_begin_first_and_none_is_lost() {
        let order = in_order();
        assert_eq!(order[..LONGEST.len()], LONGEST);
        let all: usize = PARTS.iter().map(|part| part.binaries.len()).sum();
        assert_eq!(order.len(), all);
        assert_eq!(limit("boot"), Duration::from_secs(14 * 60));
    }
}
