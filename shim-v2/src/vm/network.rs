//! The VM's part of the pod's network: an interface for each that the namespace has when the first container
//! starts, or gets later.
//!
//! Called by `sandbox`. Not earlier: `ctr run --cni`, Docker and hooks fill the namespace between Create and
//! Start. The order of a way in is: a tap beside each interface, a slot of the VM's for each tap, and one call
//! to the guest. The way out is the VM's end, with which the taps go, and then what is left in a namespace
//! that lives on. From the first start on the namespace is watched: what comes, changes and goes there does so in the
//! guest.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kata_like_config::state;
use kata_like_netlink::Changes;

use super::bring_up::blocking;
use super::{Sandbox, forward};
use crate::network::read::later::{self, Later, Watch};
use crate::network::read::{self, Interface, Joined, Network};
use crate::vm::agent::GuestInterface;
use kata_like_failure::{Failure, Kind};

/// How long the guest may take to let an interface go.
const UNBIND: Duration = Duration::from_secs(10);

/// How far it has come.
#[derive(Debug, Default)]
pub(super) enum PodNetwork {
    /// No container has started yet, or the network could not be made and nothing is left of it.
    #[default]
    Untouched,
    /// The guest has it.
    Joined(Whole),
    /// It could not be made, and something is left of it in the guest.
    Failed(String),
    /// The pod has ended.
    Left,
}

/// A namespace's interfaces, and where the guest has them.
#[derive(Debug)]
pub(super) struct Whole {
    joined: Arc<Mutex<Joined>>,
    bound: Vec<Bound>,
}

/// An interface in a slot of the VM's.
#[derive(Debug)]
struct Bound {
    /// Its number in the namespace.
    index: u32,
    name: String,
    /// N of the guest's `virtio-mmio.N`.
    slot: u32,
}

/// Gives the guest the pod's network, if it has it not yet. Goes on if the caller leaves.
pub(super) async fn join(sandbox: &Arc<Sandbox>) -> Result<(), Failure> {
    let me = Arc::clone(sandbox);
    let work = tokio::spawn(async move {
        let mut state = me.pod_network.lock().await;
        match &*state {
            PodNetwork::Joined(_) => Ok(()),
            PodNetwork::Failed(why) => Err(Failure::new(Kind::Failed, why)),
            PodNetwork::Left => Err(Failure::new(
                Kind::WrongState,
                "the sandbox has been stopped",
            )),
            PodNetwork::Untouched => match make(&me).await {
                Ok(whole) => {
                    *state = PodNetwork::Joined(whole);
                    forward::start(&me).await;
                    Ok(())
                }
                Err((error, left)) => {
                    let error = error.during("set up the pod's network");
                    // What was joined is undone by now: nobody is to look for it.
                    me.inner().record.network = None;
                    me.record();
                    if let Some(left) = left {
                        let why = format!("{}; {}", error.one_line(), left.one_line());
                        *state = PodNetwork::Failed(why);
                    }
                    Err(error)
                }
            },
        }
    });
    let failed = |panic| Err(Failure::failed("set up the pod's network", panic));
    work.await.unwrap_or_else(failed)
}

/// An error comes with what could not be undone, if that is so.
async fn make(sandbox: &Arc<Sandbox>) -> Result<Whole, (Failure, Option<Failure>)> {
    let namespace = copy(&sandbox.network).map_err(|error| (error, None))?;
    let work = move || {
        let changes = later::open(namespace.as_fd())?; // before what they change is read
        Ok((changes, read::join(namespace.as_fd())?))
    };
    let (changes, (network, taps, joined)) = blocking(work).await.map_err(|error| (error, None))?;
    keep(sandbox, joined.qdiscs());
    let mut bound = Vec::new();
    if let Err(error) = give(sandbox, network, taps, &mut bound).await {
        return Err((error, take_back(sandbox, bound).await.err()));
    }
    follow(sandbox, changes);
    Ok(Whole {
        joined: Arc::new(Mutex::new(joined)),
        bound,
    })
}

/// Gives the guest interfaces and the ways over them. Those that have got a slot are in `bound` also if a later
/// step fails.
async fn give(
    sandbox: &Sandbox,
    network: Network,
    taps: Vec<OwnedFd>,
    bound: &mut Vec<Bound>,
) -> Result<(), Failure> {
    let mut interfaces = Vec::new();
    for (interface, tap) in network.interfaces.into_iter().zip(taps) {
        let (mac, mtu) = (interface.mac, interface.mtu);
        let slot = sandbox.vmm.add_interface(&tap, mac, mtu).await;
        let slot = slot.map_err(|error| error.during(format!("add {}", interface.name)))?;
        bound.push(Bound {
            index: interface.index,
            name: interface.name.clone(),
            slot,
        });
        interfaces.push(GuestInterface {
            slot,
            interface,
            bound: false,
        });
        // From here on the VM alone holds the tap: it goes with it.
    }
    let (routes, neighbours) = (network.routes, network.neighbours);
    if interfaces.is_empty() && routes.is_empty() && neighbours.is_empty() {
        return Ok(());
    }
    let agent = &sandbox.agent;
    agent
        .configure_network(interfaces, routes, neighbours, false)
        .await
}

/// Has the guest follow what is different of interfaces that it has.
async fn change(
    sandbox: &Sandbox,
    bound: &[Bound],
    changed: Vec<Interface>,
    removed: Network,
) -> Result<(), Failure> {
    let in_slots = |interfaces: Vec<Interface>| -> Vec<_> {
        let interfaces = interfaces.into_iter();
        let found = interfaces.filter_map(|interface| {
            let own = bound.iter().find(|it| it.index == interface.index)?;
            let (slot, bound) = (own.slot, true);
            Some(GuestInterface {
                slot,
                interface,
                bound,
            })
        });
        found.collect()
    };
    let agent = &sandbox.agent;
    if !removed.is_empty() {
        let (routes, neighbours) = (removed.routes, removed.neighbours);
        let gone = in_slots(removed.interfaces);
        let removed = agent.configure_network(gone, routes, neighbours, true);
        removed.await?;
    }
    let changed = in_slots(changed);
    if changed.is_empty() {
        return Ok(());
    }
    agent
        .configure_network(changed, Vec::new(), Vec::new(), false)
        .await
}

/// Takes interfaces from the guest and out of their slots.
async fn take_back(sandbox: &Sandbox, bound: Vec<Bound>) -> Result<(), Failure> {
    let mut result = Ok(());
    for Bound { name, slot, .. } in bound {
        let gone = match sandbox.agent.unbind_device(slot, UNBIND).await {
            Ok(()) => sandbox.vmm.remove_interface(slot).await,
            Err(error) => Err(error),
        };
        let step = format!("take {name} from the guest; its slot {slot} stays filled");
        result = result.and(gone.map_err(|error| error.during(step)));
    }
    result
}

/// Watches the namespace as long as the VM lives.
fn follow(sandbox: &Arc<Sandbox>, changes: Changes) {
    let (sandbox, vmm) = (Arc::downgrade(sandbox), sandbox.vmm.clone());
    tokio::spawn(async move {
        let failed = |error| tracing::warn!("the pod's network is watched no more: {error}");
        let watch = match Watch::new(changes) {
            Ok(watch) => watch,
            Err(error) => return failed(error),
        };
        loop {
            tokio::select! {
                settled = watch.settled() => if let Err(error) = settled {
                    return failed(error);
                },
                _ = vmm.over() => return,
            }
            let Some(sandbox) = sandbox.upgrade() else {
                return;
            };
            if let Err(error) = look_again(&sandbox).await
                && !vmm.is_over()
            {
                tracing::warn!("follow the pod's network: {}", error.one_line());
            }
        }
    });
}

/// Has the guest follow what has come and gone.
async fn look_again(sandbox: &Sandbox) -> Result<(), Failure> {
    let mut state = sandbox.pod_network.lock().await;
    let PodNetwork::Joined(Whole { joined, bound }) = &mut *state else {
        return Ok(());
    };
    let (namespace, looked_at) = (copy(&sandbox.network)?, Arc::clone(joined));
    let look = move || lock(&looked_at).look_again(namespace.as_fd());
    let Later {
        gone,
        come,
        taps,
        changed,
        removed,
    } = blocking(look).await?;
    let (left, stay) = std::mem::take(bound)
        .into_iter()
        .partition(|it: &Bound| gone.contains(&it.index));
    *bound = stay;
    for Bound { name, .. } in &left {
        tracing::info!("interface {name} of the pod's network has gone");
    }
    let left = take_back(sandbox, left).await;
    let followed = change(sandbox, bound, changed, removed).await;
    let mut added = Ok(());
    if !come.is_empty() {
        let mut new = Vec::new();
        for interface in &come.interfaces {
            tracing::info!("interface {} of the pod's network has come", interface.name);
        }
        let indices: Vec<_> = come.interfaces.iter().map(|it| it.index).collect();
        added = give(sandbox, come, taps, &mut new).await;
        if added.is_ok() {
            bound.extend(new);
        } else {
            let joined = Arc::clone(joined);
            let give_up = move || {
                indices.into_iter().for_each(|it| lock(&joined).give_up(it));
                Ok(())
            };
            added = added.and(take_back(sandbox, new).await);
            added = added.and(blocking(give_up).await);
        }
    }
    keep(sandbox, lock(joined).qdiscs());
    left.and(followed).and(added)
}

fn lock(joined: &Mutex<Joined>) -> MutexGuard<'_, Joined> {
    joined.lock().unwrap_or_else(PoisonError::into_inner)
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
    forward::end(sandbox);
    let _ = tokio::task::spawn_blocking(move || drop(state)).await;
}

/// A descriptor of one's own.
pub(super) fn copy(fd: &OwnedFd) -> Result<OwnedFd, Failure> {
    let copied = fd.try_clone();
    copied.map_err(|cause| Failure::failed("copy a descriptor", cause))
}
