//! All that a sandbox is made of on the host, and its way down.
//!
//! Filled step by step by `bring_up`, kept by `sandbox`. Dropped, it kills its processes; the rest
//! needs a wait and is [`Machine::take_down`]'s.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kata_like_config::state::{NetworkLock, StateFolder};

use crate::cgroup;
use crate::share::Share;
use crate::stand_in::StandIn;
use crate::vm::launch::{Fsd, Vmm};

/// How long each process may take to be gone once it is told to.
const STOP: Duration = Duration::from_secs(1);

/// What the steps have made, in their order.
#[derive(Debug, Default)]
pub(super) struct Machine {
    pub(super) state: Option<Arc<StateFolder>>,
    pub(super) cgroups: Vec<PathBuf>,
    pub(super) lock: Option<std::fs::File>,
    pub(super) network: Option<NetworkLock>,
    pub(super) stand_in: Option<StandIn>,
    pub(super) share: Option<Arc<Share>>,
    pub(super) fsd: Option<Fsd>,
    pub(super) vmm: Option<Vmm>,
}

impl Machine {
    /// Ends the VM and the file server.
    pub(super) async fn stop_processes(&mut self) {
        if let Some(vmm) = self.vmm.take() {
            vmm.stop(STOP).await;
        }
        if let Some(fsd) = self.fsd.take() {
            fsd.child().end(STOP).await;
        }
    }

    /// Takes down what is there, the last thing first.
    pub(super) async fn take_down(&mut self) {
        self.stop_processes().await;
        if let Some(share) = self.share.take() {
            share.unmount();
        }
        // Before what keeps the namespace ends: the next one may have its number.
        self.network = None;
        if let Some(stand_in) = self.stand_in.take() {
            stand_in.end().await;
        }
        let (state, cgroups) = (self.state.take(), std::mem::take(&mut self.cgroups));
        let lock = self.lock.take();
        let _ = tokio::task::spawn_blocking(move || {
            if let Some(state) = state {
                remove_state(&state);
            }
            drop(lock);
            // The leaf holds this process: it stays, and its parents, until the process ends.
            cgroup::remove(&cgroups, Duration::ZERO);
        })
        .await;
    }
}

/// The folder may be shared with a call that is under way: it is opened anew to be removed.
fn remove_state(folder: &StateFolder) {
    let Some(name) = folder.path().file_name().and_then(|name| name.to_str()) else {
        return;
    };
    let Some((namespace, id)) = name.split_once(':') else {
        return;
    };
    let removed = match StateFolder::open(namespace, id) {
        Ok(Some(folder)) => folder.remove(),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        tracing::warn!("{}", kata_like_failure::one_line(&error));
    }
}

/// The steps that were done, and how long each took.
#[derive(Debug)]
pub(super) struct Steps {
    pub(super) begin: Instant,
    pub(super) last: Instant,
    pub(super) done: Vec<(&'static str, Duration)>,
}

impl Steps {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            begin: now,
            last: now,
            done: Vec::new(),
        }
    }

    pub(super) fn done(&mut self, step: &'static str) {
        let now = Instant::now();
        self.done.push((step, now - self.last));
        self.last = now;
    }
}

impl std::fmt::Display for Steps {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        for (index, (step, took)) in self.done.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(to, "{comma}{step} {} ms", took.as_millis())?;
        }
        Ok(())
    }
}
