//! What the containers of a pod share while its VM runs.
//!
//! Made by `bring_up`, held by the pod and by each of its containers. The guest's end comes before
//! that of the host's parts, so that it can write back what it holds of them.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use kata_like_config::state::StateFolder;
use kata_like_linux::lock;

use super::oom_score::OomScore;
use crate::cgroup::limits::Limits;
use crate::network::pod_network::PodNetwork;
use crate::selinux::Labels;
use crate::share::Share;
use crate::spec::MemorySize;
use crate::steps::Undo;
use crate::vm::disks::Disks;
use crate::vm::ending;
use crate::vm::guest::Guest;
use crate::vm::ledger::Ledger;
use crate::vm::memory::MemoryNames;

/// A running VM, and what the pod has around it on the host.
#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) namespace: String,
    pub(super) guest: Guest,
    pub(super) network: Arc<PodNetwork>,
    pub(super) share: Arc<Share>,
    pub(super) state: Arc<StateFolder>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) oom_score: Arc<OomScore>,
    pub(super) disks: Arc<Disks>,
    /// The names of the pod's memory volumes.
    pub(super) memory_names: Mutex<MemoryNames>,
    /// What VMM and fs server run under.
    pub(super) labels: Labels,
    /// containerd's mount namespace, where hooks run.
    pub(super) host_mounts: Option<Arc<OwnedFd>>,
    /// The pod's limits on the host.
    pub(super) limits: Limits,
    /// The VM's memory.
    pub(super) memory: MemorySize,
    pub(super) vcpus: u8,
    /// The way back from all steps, and how far of it the guest's end leads.
    pub(super) made: Undo,
    pub(super) host_only: usize,
    /// Held while the sandbox is stopped: a second call waits for the first.
    pub(super) stopping: tokio::sync::Mutex<()>,
}

impl Sandbox {
    /// Ends the VM: the guest writes back what it has, the processes end, the network is left.
    pub(super) async fn end_guest(&self) {
        self.guest.begin_end();
        if self.made.is_undone() {
            return;
        }
        self.network.namespace().begin_release();
        if self.guest.agent.is_stuck() {
            self.guest.vmm.child().kill();
        } else {
            ending::write_back(&self.guest).await;
        }
        self.made.back_to(self.host_only).await;
    }

    /// Removes what is left on the host. The guest and the containers have ended.
    pub(super) async fn remove(&self) {
        if self.made.is_undone() {
            return;
        }
        self.made.run().await;
        tracing::info!(
            sandbox = %self.guest.sandbox,
            namespace = self.namespace,
            "sandbox stopped"
        );
    }

    pub(super) fn memory_names(&self) -> MutexGuard<'_, MemoryNames> {
        lock(&self.memory_names)
    }
}
