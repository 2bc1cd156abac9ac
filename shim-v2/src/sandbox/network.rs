//! The VM's part of the pod's network: an interface for each that the namespace has when the first container
//! starts.
//!
//! Called by `sandbox`. Not earlier: `ctr run --cni`, Docker and hooks fill the namespace between Create and
//! Start. The order of a way in is: a tap beside each interface, a slot of the VM's for each tap, and one call
//! to the guest. The way out is the VM's end, with which the taps go, and then what is left in a namespace
//! that lives on.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kata_like_config::state;

use super::Sandbox;
use super::bring_up::blocking;
use crate::agent::GuestInterface;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::network::{self, Joined};

/// How far it has come.
#[derive(Debug, Default)]
pub(super) enum PodNetwork {
    /// No container has started yet.
    #[default]
    Untouched,
    /// The guest has it.
    Joined(#[allow(dead_code)] Joined), // its drop is what it is for
    /// It could not be made. What has been done is not tried again in the same VM.
    Failed(String),
    /// The pod has ended.
    Left,
}

/// Gives the guest the pod's network, if it has it not yet. Goes on if the caller leaves.
pub(super) async fn join(sandbox: &Arc<Sandbox>) -> Result<(), SandboxError> {
    let me = Arc::clone(sandbox);
    let work = tokio::spawn(async move {
        let mut state = me.pod_network.lock().await;
        match &*state {
            PodNetwork::Joined(_) => Ok(()),
            PodNetwork::Failed(why) => Err(SandboxError::new(SandboxErrorKind::Failed, why)),
            PodNetwork::Left => Err(SandboxError::new(
                SandboxErrorKind::WrongState,
                "the sandbox has been stopped",
            )),
            PodNetwork::Untouched => match make(&me).await {
                Ok(joined) => {
                    *state = PodNetwork::Joined(joined);
                    Ok(())
                }
                Err(error) => {
                    let error = error.during("set up the pod's network");
                    // What was joined is undone by now: nobody is to look for it.
                    me.inner().record.network = None;
                    me.record();
                    *state = PodNetwork::Failed(error.one_line());
                    Err(error)
                }
            },
        }
    });
    let failed = |panic| Err(SandboxError::failed("set up the pod's network", panic));
    work.await.unwrap_or_else(failed)
}

async fn make(sandbox: &Sandbox) -> Result<Joined, SandboxError> {
    let namespace = copy(&sandbox.network)?;
    let (network, taps, joined) = blocking(move || network::join(namespace.as_fd())).await?;
    keep(sandbox, joined.qdiscs());
    let mut interfaces = Vec::new();
    for (interface, tap) in network.interfaces.into_iter().zip(&taps) {
        let (mac, mtu) = (interface.mac, interface.mtu);
        let slot = sandbox.vmm.add_interface(tap, mac, mtu).await;
        let slot = slot.map_err(|error| error.during(format!("add {}", interface.name)))?;
        interfaces.push(GuestInterface { slot, interface });
    }
    // From here on the VM alone holds them: they go with it.
    drop(taps);
    if !interfaces.is_empty() || !network.routes.is_empty() {
        let (routes, neighbours) = (network.routes, network.neighbours);
        let agent = &sandbox.agent;
        agent
            .configure_network(interfaces, routes, neighbours)
            .await?;
    }
    Ok(joined)
}

/// For whoever cleans up after this shim, where the namespace outlives the pod.
fn keep(sandbox: &Sandbox, qdiscs: Vec<u32>) {
    if let Some(path) = &sandbox.network_path {
        let path = path.clone();
        sandbox.inner().record.network = Some(state::Network { path, qdiscs });
        sandbox.record();
    }
}

/// Leaves the namespace as it was. The VM has ended.
pub(super) async fn leave(sandbox: &Sandbox) {
    let state = std::mem::replace(&mut *sandbox.pod_network.lock().await, PodNetwork::Left);
    let _ = tokio::task::spawn_blocking(move || drop(state)).await;
}

pub(super) fn copy(fd: &OwnedFd) -> Result<OwnedFd, SandboxError> {
    let copied = fd.try_clone();
    copied.map_err(|cause| SandboxError::failed("copy a descriptor", cause))
}
