//! The end of a container: its processes are killed, and all that it holds is freed.
//!
//! Called by `pod.rs`.

use std::time::Duration;

use kata_like_failure::{Failure, Step};
use tokio::time::timeout;

use crate::container::{Container, Phase, SIGKILL};
use crate::deadline::blocking;
use crate::storage;
use crate::write_back;

/// How long killed processes may take to exit when they have nothing to write back.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

impl Container {
    /// Kills what is left of the container and frees all that it holds. The call can be repeated
    /// after a failure.
    pub async fn delete(&self) -> Result<(), Failure> {
        self.end_placeholder(SIGKILL);
        let creating = self.created.notified();
        let wait = {
            let mut state = self.state();
            match state.phase {
                Phase::Creating => {
                    self.kill(&state);
                    true
                }
                Phase::Deleting => return Err(self.wrong_state(&state.phase, "stopped")),
                _ => {
                    state.phase = Phase::Deleting;
                    false
                }
            }
        };
        if wait {
            // The kill makes the create fail, and it cleans up by itself.
            let step = || format!("delete container {}: wait for its create to end", self.name);
            let ended = timeout(KILL_DEADLINE, creating).await;
            ended.map_err(|_| Failure::late(step(), KILL_DEADLINE))?;
            self.state().phase = Phase::Deleting;
        }
        let result = self.take_down().await;
        if result.is_err() {
            self.state().phase = Phase::Stopped;
        }
        result
    }

    /// Kills all processes and waits until they have gone. Then what they have written is written
    /// back.
    pub async fn end(&self) -> Result<(), Failure> {
        self.end_placeholder(SIGKILL);
        let cgroup = {
            let state = self.state();
            self.kill(&state);
            state.cgroup.clone()
        };
        match cgroup {
            Some(cgroup) => cgroup
                .empty()
                .await
                .step(|| format!("wait for the processes of container {} to go", self.name)),
            None => Ok(()),
        }
    }

    /// Undoes `set_up`, as far as that came.
    pub(super) async fn take_down(&self) -> Result<(), Failure> {
        let (cgroup, init) = {
            let mut state = self.state();
            state.namespaces.clear();
            if let Some(watch) = state.memory_watch.take() {
                watch.abort();
            }
            self.kill(&state);
            (state.cgroup.clone(), state.init.clone())
        };
        if let Some(init) = init {
            let step = || format!("wait for the init of container {} to go", self.name);
            write_back::while_it_shrinks(step, init.gone()).await?;
        }
        if let Some(cgroup) = cgroup {
            let removed = cgroup.remove(KILL_DEADLINE).await;
            removed.step(|| format!("delete container {}", self.name))?;
        }
        {
            let mut state = self.state();
            state.cgroup = None;
            state.init = None;
            state.execs.clear();
            state.lingering.clear();
        }
        let held = std::mem::take(&mut self.state().volumes);
        let free = self.around.volumes.remove(&held);
        let (name, volumes) = (self.name.clone(), free.clone());
        let freed = blocking("free the rootfs", move || storage::forget(&name, &volumes)).await;
        if freed.is_err() {
            // The volumes are still to be freed when the call is repeated.
            self.around.volumes.add(&free);
            self.state().volumes = free;
        }
        freed
    }
}
