//! Pause and resume of a container.
//!
//! Called by `service.rs`. No process can come up in a paused container. It can be killed, updated
//! and deleted: none of these needs one of its processes to run.

use std::sync::Arc;
use std::time::Duration;

use kata_like_failure::{Failure, one_line};

use crate::cgroup::Cgroup;
use crate::container::{Container, Phase};
use crate::write_back;

/// How long all processes may take to freeze, or to go on.
const DEADLINE: Duration = Duration::from_secs(10);

impl Container {
    /// Freezes every process. What they have written is on the host then, for those who copy its
    /// files. If the freeze fails, all go on.
    pub async fn pause(&self) -> Result<(), Failure> {
        let running = |phase: &Phase| matches!(phase, Phase::Running);
        let cgroup = self.begin(running, Phase::Pausing, "running")?;
        let result = cgroup.freeze(true, DEADLINE).await;
        if result.is_ok()
            && let Err(error) = write_back::write_back().await
        {
            // The container is frozen, as was asked.
            log::warn!("pause container {}: {}", self.name, one_line(&error));
        }
        let pausing = |phase: &Phase| matches!(phase, Phase::Pausing);
        self.finish(pausing, result, Phase::Paused, Phase::Running, "running")
    }

    /// Thaws every process.
    pub async fn resume(&self) -> Result<(), Failure> {
        let paused = |phase: &Phase| matches!(phase, Phase::Paused);
        let cgroup = self.begin(paused, Phase::Resuming, "paused")?;
        let result = cgroup.freeze(false, DEADLINE).await;
        let resuming = |phase: &Phase| matches!(phase, Phase::Resuming);
        self.finish(resuming, result, Phase::Running, Phase::Paused, "paused")
    }

    fn begin(
        &self,
        from: impl Fn(&Phase) -> bool,
        to: Phase,
        wanted: &'static str,
    ) -> Result<Arc<Cgroup>, Failure> {
        let mut state = self.state();
        let (Some(cgroup), true) = (state.cgroup.clone(), from(&state.phase)) else {
            return Err(self.wrong_state(&state.phase, wanted));
        };
        state.phase = to;
        Ok(cgroup)
    }

    /// The container may have ended meanwhile. Then it is not what it was asked to be.
    fn finish(
        &self,
        still: impl Fn(&Phase) -> bool,
        result: Result<(), Failure>,
        done: Phase,
        undone: Phase,
        wanted: &'static str,
    ) -> Result<(), Failure> {
        let mut state = self.state();
        if !still(&state.phase) {
            return Err(self.wrong_state(&state.phase, wanted));
        }
        state.phase = if result.is_ok() { done } else { undone };
        result
    }
}
