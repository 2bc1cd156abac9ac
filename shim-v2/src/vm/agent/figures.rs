//! A container's stats, as the guest tells them.
//!
//! Numbers are taken as they are: they are the guest's own, and harm nobody. How many there are,
//! and each text, has a bound; of a file's keys only those are taken that containerd is told.

use std::collections::HashMap;

use kata_like_agent_protocol::agent::StatsResponse;
use kata_like_failure::{Failure, clean};
use protobuf::SpecialFields;
use ttrpc::context::with_duration;

use super::{ASK, Agent, request_for};

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

impl Agent {
    /// A container's stats.
    pub async fn stats(&self, container: &str) -> Result<StatsResponse, Failure> {
        let request = request_for(container);
        let client = self.client.clone();
        let work = async move { client.stats(with_duration(ASK), &request).await };
        let what = format!("read the stats of container {container}");
        self.call(&what, ASK, work).await.map(bounded)
    }
}

/// What is taken of stats that the guest has sent.
pub fn bounded(mut stats: StatsResponse) -> StatsResponse {
    keep(&mut stats.cpu_stat, &CPU_KEYS);
    keep(&mut stats.memory_stat, &MEMORY_KEYS);
    keep(&mut stats.memory_events, &EVENT_KEYS);
    stats.io.truncate(MOST_DEVICES);
    stats.io.shrink_to_fit();
    stats.huge_pages.truncate(MOST_SIZES);
    stats.huge_pages.shrink_to_fit();
    for pages in &mut stats.huge_pages {
        pages.size = clean(&pages.size, MAX_SIZE_NAME);
        // Here and below: what no version that we know has.
        pages.special_fields = SpecialFields::new();
    }
    for device in &mut stats.io {
        device.special_fields = SpecialFields::new();
    }
    stats.special_fields = SpecialFields::new();
    stats
}

/// Takes the known keys into a map of their own: one that was large stays large.
fn keep(file: &mut HashMap<String, u64>, known: &[&str]) {
    let keys = known.iter();
    *file = keys.filter_map(|key| file.remove_entry(*key)).collect();
}

#[cfg(test)]
mod tests {
    use kata_like_agent_protocol::agent::{DeviceIo, HugePages};

    use super::*;

    #[test]
    fn of_a_flood_of_keys_the_known_ones_are_taken() {
        let flood = || {
            let strange = (0..10_000).map(|number| (format!("key{number}"), number));
            let known = CPU_KEYS.iter().chain(&MEMORY_KEYS).chain(&EVENT_KEYS);
            let known = known.map(|key| ((*key).to_owned(), 7));
            strange.chain(known).collect::<HashMap<_, _>>()
        };
        let stats = bounded(StatsResponse {
            cpu_stat: flood(),
            memory_stat: flood(),
            memory_events: flood(),
            ..Default::default()
        });
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
        let stats = bounded(StatsResponse {
            io: vec![DeviceIo::new(); 1000],
            huge_pages: vec![pages; 1000],
            swap_peak: 5,
            ..Default::default()
        });
        assert_eq!(stats.io.len(), MOST_DEVICES);
        assert_eq!(stats.huge_pages.len(), MOST_SIZES);
        assert_eq!(stats.swap_peak, 5);
        let first = stats.huge_pages.first().map(|pages| pages.size.as_str());
        assert_eq!(first, Some("2 MB2 MB2 MB2 MB"));
    }
}
