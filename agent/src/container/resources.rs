//! What a container uses, and what it may use.
//!
//! Called by `service.rs`. An update waits for the kernel, which may free memory first.

use std::convert::Infallible;

use kata_like_agent_protocol::agent::StatsResponse;
use kata_like_failure::Failure;

use crate::cgroup::Change;
use crate::container::Container;
use crate::deadline::blocking;

impl Container {
    /// Reads the container's stats.
    pub async fn stats(&self) -> Result<StatsResponse, Failure> {
        let cgroup = self.cgroup()?;
        blocking("read the stats", move || {
            Ok::<_, Infallible>(cgroup.stats())
        })
        .await
    }

    /// Changes the limits, all or none, by the JSON of OCI `linux.resources`.
    pub async fn update(&self, update: &[u8]) -> Result<(), Failure> {
        let (cgroup, before) = {
            let mut state = self.state();
            let (Some(cgroup), true) = (state.cgroup.clone(), state.phase.is_alive()) else {
                return Err(self.wrong_state(&state.phase, "created"));
            };
            let Some(before) = state.resources.take() else {
                return Err(Failure::wrong_state(
                    format!("container {}", self.name),
                    "being updated",
                    "done with it",
                ));
            };
            (cgroup, before)
        };
        let result = async {
            let change = Change::of(&before, update)?;
            let work = move || Ok::<_, Infallible>(cgroup.update(&change).map(|()| change));
            blocking("update the limits", work).await?
        };
        let result = result.await;
        let (now, result) = match result {
            Ok(change) => (change.resources, Ok(())),
            Err(error) => (before, Err(error)),
        };
        self.state().resources = Some(now);
        result
    }
}
