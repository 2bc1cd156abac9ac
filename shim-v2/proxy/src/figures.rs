//! A container's stats, as the guest tells them.
//!
//! Numbers are taken as they are: they are the guest's own, and harm nobody. How many there are,
//! and each text, has a bound; of a file's keys only those are taken that containerd is told.

use std::collections::HashMap;

use kata_like_agent_protocol::agent::{self, StatsResponse};
use kata_like_failure::clean;
use serde::{Deserialize, Serialize};

/// The keys of cpu.stat that are taken.
pub const CPU_KEYS: [&str; 6] = [
    "usage_usec",
    "user_usec",
    "system_usec",
    "nr_periods",
    "nr_throttled",
    "throttled_usec",
];
/// The keys of memory.stat that are taken.
pub const MEMORY_KEYS: [&str; 33] = [
    "anon",
    "file",
    "kernel_stack",
    "slab",
    "sock",
    "shmem",
    "file_mapped",
    "file_dirty",
    "file_writeback",
    "anon_thp",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
    "slab_reclaimable",
    "slab_unreclaimable",
    "pgfault",
    "pgmajfault",
    "workingset_refault_anon",
    "workingset_refault_file",
    "workingset_activate_anon",
    "workingset_activate_file",
    "workingset_nodereclaim",
    "pgrefill",
    "pgscan",
    "pgsteal",
    "pgactivate",
    "pgdeactivate",
    "pglazyfree",
    "pglazyfreed",
    "thp_fault_alloc",
    "thp_collapse_alloc",
];
/// The keys of memory.events that are taken.
pub const EVENT_KEYS: [&str; 6] = ["low", "high", "max", "oom", "oom_kill", "oom_group_kill"];

/// The most devices that are told of.
const MOST_DEVICES: usize = 64;
/// The most sizes of huge pages that are told of.
const MOST_SIZES: usize = 16;
/// The longest name of a size, in characters.
const MAX_SIZE_NAME: usize = 16;

/// A container's stats, by the names of the agent's protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "agent.proto has what each field is")]
pub struct Stats {
    pub cpu_stat: HashMap<String, u64>,
    pub memory_stat: HashMap<String, u64>,
    pub memory_events: HashMap<String, u64>,
    pub memory_usage: u64,
    pub memory_limit: u64,
    pub memory_peak: u64,
    pub swap_usage: u64,
    pub swap_limit: u64,
    pub swap_peak: u64,
    pub pids_current: u64,
    pub pids_limit: u64,
    pub io: Vec<DeviceIo>,
    pub huge_pages: Vec<HugePages>,
}

/// What a container's processes have read from a device and written to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "agent.proto has what each field is")]
pub struct DeviceIo {
    pub major: u64,
    pub minor: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// A container's huge pages of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "agent.proto has what each field is")]
pub struct HugePages {
    pub size: String,
    pub current: u64,
    pub max: u64,
    pub failures: u64,
}

impl Stats {
    /// What is taken of stats that somebody hostile may have sent.
    pub fn bounded(mut self) -> Self {
        keep(&mut self.cpu_stat, &CPU_KEYS);
        keep(&mut self.memory_stat, &MEMORY_KEYS);
        keep(&mut self.memory_events, &EVENT_KEYS);
        self.io.truncate(MOST_DEVICES);
        self.io.shrink_to_fit();
        self.huge_pages.truncate(MOST_SIZES);
        self.huge_pages.shrink_to_fit();
        for pages in &mut self.huge_pages {
            pages.size = clean(&pages.size, MAX_SIZE_NAME);
        }
        self
    }
}

impl From<StatsResponse> for Stats {
    fn from(stats: StatsResponse) -> Self {
        let device = |it: agent::DeviceIo| DeviceIo {
            major: it.major,
            minor: it.minor,
            read_bytes: it.read_bytes,
            written_bytes: it.written_bytes,
            reads: it.reads,
            writes: it.writes,
        };
        let pages = |it: agent::HugePages| HugePages {
            size: it.size,
            current: it.current,
            max: it.max,
            failures: it.failures,
        };
        Self {
            cpu_stat: stats.cpu_stat,
            memory_stat: stats.memory_stat,
            memory_events: stats.memory_events,
            memory_usage: stats.memory_usage,
            memory_limit: stats.memory_limit,
            memory_peak: stats.memory_peak,
            swap_usage: stats.swap_usage,
            swap_limit: stats.swap_limit,
            swap_peak: stats.swap_peak,
            pids_current: stats.pids_current,
            pids_limit: stats.pids_limit,
            io: stats.io.into_iter().map(device).collect(),
            huge_pages: stats.huge_pages.into_iter().map(pages).collect(),
        }
    }
}

/// Takes the known keys into a map of their own: one that was large stays large.
fn keep(file: &mut HashMap<String, u64>, known: &[&str]) {
    let keys = known.iter();
    *file = keys.filter_map(|key| file.remove_entry(*key)).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_flood_of_keys_the_known_ones_are_taken() {
        let flood = || {
            let strange = (0..10_000).map(|number| (format!("key{number}"), number));
            let known = CPU_KEYS.iter().chain(&MEMORY_KEYS).chain(&EVENT_KEYS);
            let known = known.map(|key| ((*key).to_owned(), 7));
            strange.chain(known).collect::<HashMap<_, _>>()
        };
        let stats = Stats {
            cpu_stat: flood(),
            memory_stat: flood(),
            memory_events: flood(),
            ..Default::default()
        }
        .bounded();
        for (file, keys) in [
            (&stats.cpu_stat, CPU_KEYS.as_slice()),
            (&stats.memory_stat, &MEMORY_KEYS),
            (&stats.memory_events, &EVENT_KEYS),
        ] {
            assert_eq!(file.len(), keys.len());
            assert!(file.capacity() < 100, "{}", file.capacity());
            assert!(keys.iter().all(|key| file[*key] == 7));
        }
    }

    #[test]
    fn a_flood_of_devices_and_sizes_is_cut() {
        let pages = HugePages {
            size: "2\nMB".repeat(100),
            ..Default::default()
        };
        let stats = Stats {
            io: vec![DeviceIo::default(); 1000],
            huge_pages: vec![pages; 1000],
            swap_peak: 5,
            ..Default::default()
        }
        .bounded();
        assert_eq!(stats.io.len(), MOST_DEVICES);
        assert_eq!(stats.huge_pages.len(), MOST_SIZES);
        assert_eq!(stats.swap_peak, 5);
        let first = stats.huge_pages.first().map(|pages| pages.size.as_str());
        assert_eq!(first, Some("2 MB2 MB2 MB2 MB"));
    }
}
