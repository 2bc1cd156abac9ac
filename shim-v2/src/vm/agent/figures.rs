//! A container's stats, as the guest tells them.
//!
//! Numbers are taken as they are: they are the guest's own, and harm nobody. How many there are,
//! and each text, has a bound.

use kata_like_agent_protocol::agent::StatsResponse;
use kata_like_failure::{Failure, clean};
use ttrpc::context::with_duration;

use super::{ASK, Agent, request_for};

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

fn bounded(mut stats: StatsResponse) -> StatsResponse {
    stats.io.truncate(MOST_DEVICES);
    stats.huge_pages.truncate(MOST_SIZES);
    for pages in &mut stats.huge_pages {
        pages.size = clean(&pages.size, MAX_SIZE_NAME);
    }
    stats
}

#[cfg(test)]
mod tests {
    use kata_like_agent_protocol::agent::{DeviceIo, HugePages};

    use super::*;

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
