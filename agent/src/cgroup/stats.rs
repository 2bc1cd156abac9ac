//! A container's figures, read from its cgroup.
//!
//! Called by `container.rs`. Each file is read whole and at once; a file or a key that this kernel
//! does not have counts as zero, a limit of "max" as none.

use std::fs;
use std::path::Path;

/// A container's figures: memory in bytes, times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// `usage_usec`, `user_usec`, `system_usec`.
    pub cpu: [u64; 3],
    /// `nr_periods`, `nr_throttled`, `throttled_usec`.
    pub throttling: [u64; 3],
    pub memory_usage: u64,
    pub memory_limit: Option<u64>,
    pub memory_peak: u64,
    pub anon: u64,
    pub file: u64,
    pub inactive_file: u64,
    pub active_file: u64,
    pub kernel_stack: u64,
    pub slab: u64,
    pub page_faults: u64,
    pub major_faults: u64,
    pub oom_kills: u64,
    pub swap_usage: u64,
    pub swap_limit: Option<u64>,
    pub pids: u64,
    pub pids_limit: Option<u64>,
}

impl Stats {
    /// Reads the figures of the cgroup in `directory`.
    pub fn read(directory: &Path) -> Self {
        let text = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
        let number = |file: &str| limit(&text(file)).unwrap_or(0);
        let (cpu, memory) = (text("cpu.stat"), text("memory.stat"));
        Self {
            cpu: ["usage_usec", "user_usec", "system_usec"].map(|key| value(&cpu, key)),
            throttling: ["nr_periods", "nr_throttled", "throttled_usec"]
                .map(|key| value(&cpu, key)),
            memory_usage: number("memory.current"),
            memory_limit: limit(&text("memory.max")),
            memory_peak: number("memory.peak"),
            anon: value(&memory, "anon"),
            file: value(&memory, "file"),
            inactive_file: value(&memory, "inactive_file"),
            active_file: value(&memory, "active_file"),
            kernel_stack: value(&memory, "kernel_stack"),
            slab: value(&memory, "slab"),
            page_faults: value(&memory, "pgfault"),
            major_faults: value(&memory, "pgmajfault"),
            oom_kills: oom_kills(&text("memory.events")),
            swap_usage: number("memory.swap.current"),
            swap_limit: limit(&text("memory.swap.max")),
            pids: number("pids.current"),
            pids_limit: limit(&text("pids.max")),
        }
    }
}

/// How many processes were killed for want of memory, from the text of `memory.events`.
pub fn oom_kills(events: &str) -> u64 {
    value(events, "oom_kill")
}

/// The number after `key` in a file of lines `key number`.
fn value(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, number)| number.trim().parse().ok())
        .unwrap_or(0)
}

/// A file of one number; "max" and nonsense are no limit.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_taken_from_the_files_of_a_cgroup() {
        let directory = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        put(
            "cpu.stat",
            "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 3\nnr_throttled 2\nthrottled_usec 1\n",
        );
        put("memory.current", "4096\n");
        put("memory.max", "max\n");
        put(
            "memory.stat",
            "anon 5\nfile 6\nkernel_stack 7\nslab_reclaimable 1\nslab 8\npgfault 9\npgmajfault 10\n",
        );
        put("memory.events", "oom 3\noom_kill 2\noom_group_kill 0\n");
        put("pids.current", "4\n");
        put("pids.max", "100\n");
        assert_eq!(
            Stats::read(directory.path()),
            Stats {
                cpu: [30, 20, 10],
                throttling: [3, 2, 1],
                memory_usage: 4096,
                anon: 5,
                file: 6,
                kernel_stack: 7,
                slab: 8,
                page_faults: 9,
                major_faults: 10,
                oom_kills: 2,
                pids: 4,
                pids_limit: Some(100),
                ..Stats::default()
            }
        );
    }

    #[test]
    fn a_cgroup_without_these_files_has_figures_of_zero() {
        assert_eq!(Stats::read(Path::new("/nonexistent")), Stats::default());
    }
}
