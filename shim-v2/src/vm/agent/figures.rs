//! A container's stats, as the guest tells them.
//!
//! Numbers are taken as they are: they are the guest's own, and harm nobody. How many there are,
//! and each text, has a bound.

use std::collections::HashMap;

use kata_like_agent_protocol::agent;
use ttrpc::context::with_duration;

use super::{ASK, Agent, request_for};
use kata_like_failure::Failure;

/// The most devices that are told of.
const MOST_DEVICES: usize = 64;
/// The most sizes of huge pages that are told of.
const MOST_SIZES: usize = 16;
/// The longest name of a size, in characters.
const MAX_SIZE_NAME: usize = 16;

/// A container's stats, from its cgroup in the guest. Times are in microseconds, memory in bytes,
/// and a limit of `u64::MAX` means none.
#[allow(missing_docs)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub cpu_usage_us: u64,
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_us: u64,
    pub memory_usage: u64,
    pub memory_limit: u64,
    pub memory_peak: u64,
    pub memory_anon: u64,
    pub memory_file: u64,
    pub memory_inactive_file: u64,
    pub memory_active_file: u64,
    pub memory_kernel_stack: u64,
    pub memory_slab: u64,
    pub page_faults: u64,
    pub page_major_faults: u64,
    pub oom_kills: u64,
    pub swap_usage: u64,
    pub swap_limit: u64,
    pub pids_current: u64,
    /// 0: no limit.
    pub pids_limit: u64,
    pub swap_peak: u64,
    /// The file `memory.stat`.
    pub memory_stat: HashMap<String, u64>,
    /// The file `memory.events`.
    pub memory_events: HashMap<String, u64>,
    pub io: Vec<DeviceIo>,
    pub huge_pages: Vec<HugePages>,
}

/// What a container has read from a device and written to it, in bytes and in operations.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    pub major: u64,
    pub minor: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// A container's huge pages of one size, in bytes.
#[allow(missing_docs)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// As in the names of the cgroup's files: "2MB".
    pub size: String,
    pub current: u64,
    pub max: u64,
    pub failures: u64,
}

impl Agent {
    /// A container's stats.
    pub async fn stats(&self, container: &str) -> Result<Stats, Failure> {
        let request = request_for(container);
        let client = self.client.clone();
        let work = async move { client.stats(with_duration(ASK), &request).await };
        let what = format!("read the figures of container {container}");
        self.call(&what, ASK, work).await.map(stats_of)
    }
}

fn stats_of(answer: agent::StatsResponse) -> Stats {
    let device = |device: agent::DeviceIo| DeviceIo {
        major: device.major,
        minor: device.minor,
        read_bytes: device.read_bytes,
        written_bytes: device.written_bytes,
        reads: device.reads,
        writes: device.writes,
    };
    let pages = |pages: agent::HugePages| HugePages {
        size: kata_like_failure::clean(&pages.size, MAX_SIZE_NAME),
        current: pages.current,
        max: pages.max,
        failures: pages.failures,
    };
    Stats {
        cpu_usage_us: answer.cpu_usage_us,
        cpu_user_us: answer.cpu_user_us,
        cpu_system_us: answer.cpu_system_us,
        cpu_periods: answer.cpu_periods,
        cpu_throttled_periods: answer.cpu_throttled_periods,
        cpu_throttled_us: answer.cpu_throttled_us,
        memory_usage: answer.memory_usage,
        memory_limit: answer.memory_limit,
        memory_peak: answer.memory_peak,
        memory_anon: answer.memory_anon,
        memory_file: answer.memory_file,
        memory_inactive_file: answer.memory_inactive_file,
        memory_active_file: answer.memory_active_file,
        memory_kernel_stack: answer.memory_kernel_stack,
        memory_slab: answer.memory_slab,
        page_faults: answer.page_faults,
        page_major_faults: answer.page_major_faults,
        oom_kills: answer.oom_kills,
        swap_usage: answer.swap_usage,
        swap_limit: answer.swap_limit,
        pids_current: answer.pids_current,
        pids_limit: answer.pids_limit,
        swap_peak: answer.swap_peak,
        memory_stat: answer.memory_stat,
        memory_events: answer.memory_events,
        io: answer
            .io
            .into_iter()
            .take(MOST_DEVICES)
            .map(device)
            .collect(),
        huge_pages: answer
            .huge_pages
            .into_iter()
            .take(MOST_SIZES)
            .map(pages)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_devices_and_sizes_is_cut() {
        let stats = stats_of(agent::StatsResponse {
            io: vec![agent::DeviceIo::new(); 1000],
            huge_pages: vec![
                agent::HugePages {
                    size: "2\nMB".repeat(100),
                    ..Default::default()
                };
                1000
            ],
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
