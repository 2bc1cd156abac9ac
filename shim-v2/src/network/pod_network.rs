//! The pod's network as the guest has it: an interface for each that the namespace has when the
//! first container starts, or gets later.
//!
//! Called by `pod`. The guest gets its network at the first start and not before: `ctr run --cni`,
//! Docker and hooks fill the namespace between Create and Start. Each interface is joined to a tap,
//! each tap gets a slot of the VM, and one call configures the guest. With the VM the taps go; what
//! is then left in a namespace that lives on is removed. From the first start on the namespace is
//! watched, and the guest follows what changes there.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kata_like_config::state;
use kata_like_netlink::Changes;
use tokio::net::UnixStream;

use super::forward::{self, Forward};
use super::names::Names;
use super::namespace::Namespace;
use super::read::later::{self, Later, Watch};
use super::read::{self, Joined, Network};
use super::resolver::ResolvConf;
use crate::steps::blocking;
use crate::vm::agent::{GuestInterface, Interface, NameQuestion, new_token};
use crate::vm::guest::Guest;
use crate::vm::ledger::Ledger;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;

/// How long the guest may take to let an interface go.
const UNBIND: Duration = Duration::from_secs(10);

/// A pod's network.
#[derive(Debug)]
pub struct PodNetwork {
    namespace: Arc<Namespace>,
    ledger: Arc<Ledger>,
    stage: tokio::sync::Mutex<Stage>,
    /// What the namespace's loopback leads to. None: not yet, not any more, or it can't be had.
    forward: Mutex<Option<Forward>>,
    names: Arc<Names>,
}

/// How far the guest's part has come.
#[derive(Debug, Default)]
enum Stage {
    /// No container has started yet, or the network could not be made and nothing is left of it.
    #[default]
    Untouched,
    /// The guest has it.
    Joined(Whole),
    /// It could not be made, and something is left of it in the guest.
    Failed(String),
    /// The pod has left the namespace.
    Left,
}

/// A namespace's interfaces, and where the guest has them.
#[derive(Debug)]
struct Whole {
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

impl PodNetwork {
    /// A network that the guest does not have yet.
    pub fn new(namespace: Arc<Namespace>, ledger: Arc<Ledger>) -> Self {
        let names = Arc::new(Names::new(Arc::clone(&namespace)));
        Self {
            namespace,
            ledger,
            stage: tokio::sync::Mutex::default(),
            forward: Mutex::default(),
            names,
        }
    }

    /// The namespace on the host.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }

    /// Gives the guest the pod's network, if it does not have it yet.
    pub async fn join(self: &Arc<Self>, guest: &Guest) -> Result<(), Failure> {
        let mut stage = self.stage.lock().await;
        match &*stage {
            Stage::Joined(_) => Ok(()),
            Stage::Failed(why) => Err(Failure::new(Kind::Failed, why)),
            Stage::Left => Err(Failure::new(
                Kind::WrongState,
                "the sandbox has been stopped",
            )),
            Stage::Untouched => match self.make(guest).await {
                Ok(whole) => {
                    *stage = Stage::Joined(whole);
                    self.begin_forward(guest).await;
                    Ok(())
                }
                Err((error, left)) => {
                    let error = error.during("set up the pod's network");
                    // What was joined is undone by now: nobody is to look for it.
                    if let Err(error) = self.ledger.change(|record| record.network = None) {
                        tracing::warn!("{}", error.one_line());
                    }
                    if let Some(left) = left {
                        let why = format!("{}; {}", error.one_line(), left.one_line());
                        *stage = Stage::Failed(why);
                    }
                    Err(error)
                }
            },
        }
    }

    /// Has the agent listen in the place of the name servers that a container's resolv.conf names
    /// on loopback. What fails is only logged.
    pub async fn serve_names(&self, guest: &Guest, container: &str, conf: &ResolvConf) {
        self.names.serve(guest, container, conf).await;
    }

    /// Fetches the answer to a question of the guest's, in a task of its own.
    pub fn answer(&self, guest: &Guest, question: NameQuestion) {
        self.names.answer(guest, question);
    }

    /// Leaves the namespace as it was, and gives up the claim on it. The VM must have ended.
    pub async fn leave(&self) {
        let stage = std::mem::replace(&mut *self.stage.lock().await, Stage::Left);
        self.keep_forward(None);
        let _ = tokio::task::spawn_blocking(move || drop(stage)).await;
        self.namespace.release();
    }

    /// An error comes with what could not be undone, if that is so.
    async fn make(self: &Arc<Self>, guest: &Guest) -> Result<Whole, (Failure, Option<Failure>)> {
        let namespace = Arc::clone(&self.namespace);
        let work = move || {
            let changes = later::open(namespace.as_fd())?; // before what they change is read
            Ok((changes, read::join(namespace.as_fd())?))
        };
        let (changes, (network, taps, joined)) =
            blocking(work).await.map_err(|error| (error, None))?;
        self.note(joined.qdiscs());
        let mut bound = Vec::new();
        if let Err(error) = give(guest, network, taps, &mut bound).await {
            return Err((error, take_back(guest, bound).await.err()));
        }
        follow(self, guest, changes);
        Ok(Whole {
            joined: Arc::new(Mutex::new(joined)),
            bound,
        })
    }

    /// Notes what is to be undone in a namespace that outlives the pod.
    fn note(&self, qdiscs: Vec<u32>) {
        let Some(path) = self.namespace.path() else {
            return;
        };
        let network = state::Network {
            path: path.to_owned(),
            qdiscs,
        };
        let noted = self.ledger.change(|record| record.network = Some(network));
        if let Err(error) = noted {
            tracing::warn!("{}", error.one_line());
        }
    }

    /// Forwards connections to the guest's loopback. A pod goes without it where the host's kernel
    /// can't or may not steer connections.
    async fn begin_forward(&self, guest: &Guest) {
        let namespace = Arc::clone(&self.namespace);
        let own = namespace.path().is_none();
        let listener = blocking(move || forward::listen_in(namespace.as_fd(), own)).await;
        let guest = guest.clone();
        let connect = move |port| connect(guest.clone(), port);
        match listener.and_then(|listener| listener.serve(connect)) {
            Ok(forward) => self.keep_forward(Some(forward)),
            Err(error) => tracing::warn!(
                "port-forward is not there, the pod runs without it: {}",
                error.one_line()
            ),
        }
    }

    fn keep_forward(&self, forward: Option<Forward>) {
        *lock(&self.forward) = forward;
    }
}

/// A connection to a port of the guest's loopback.
async fn connect(guest: Guest, port: u16) -> Result<UnixStream, Failure> {
    if guest.ending().is_wanted() {
        let why = "the sandbox has been stopped";
        return Err(Failure::new(Kind::WrongState, why));
    }
    let token = new_token().map_err(|cause| Failure::failed("make a token", cause))?;
    guest.agent.connect(port, token).await?;
    guest.open_stream(token).await
}

/// Plugs the taps into free slots and configures them in the guest. `bound` lists every filled
/// slot, even when a later step fails.
async fn give(
    guest: &Guest,
    network: Network,
    taps: Vec<OwnedFd>,
    bound: &mut Vec<Bound>,
) -> Result<(), Failure> {
    let mut interfaces = Vec::new();
    for (interface, tap) in network.interfaces.into_iter().zip(taps) {
        let (mac, mtu) = (interface.mac, interface.mtu);
        let slot = guest.vmm.add_interface(&tap, mac, mtu).await;
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
    let agent = &guest.agent;
    agent
        .configure_network(interfaces, routes, neighbours, false)
        .await
}

/// Sends the guest changed addresses and routes of interfaces that it has.
async fn change(
    guest: &Guest,
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
    let agent = &guest.agent;
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
async fn take_back(guest: &Guest, bound: Vec<Bound>) -> Result<(), Failure> {
    let mut result = Ok(());
    for Bound { name, slot, .. } in bound {
        let gone = match guest.agent.unbind_device(slot, UNBIND).await {
            Ok(()) => guest.vmm.remove_interface(slot).await,
            Err(error) => Err(error),
        };
        let step = format!("take {name} from the guest; its slot {slot} stays filled");
        result = result.and(gone.map_err(|error| error.during(step)));
    }
    result
}

/// Watches the namespace as long as the VM lives.
fn follow(network: &Arc<PodNetwork>, guest: &Guest, changes: Changes) {
    let (network, guest) = (Arc::downgrade(network), guest.clone());
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
                _ = guest.vmm.ended() => return,
            }
            let Some(network) = network.upgrade() else {
                return;
            };
            if let Err(error) = look_again(&network, &guest).await
                && !guest.vmm.has_ended()
            {
                tracing::warn!("follow the pod's network: {}", error.one_line());
            }
        }
    });
}

/// Has the guest follow what has come and gone.
async fn look_again(network: &PodNetwork, guest: &Guest) -> Result<(), Failure> {
    let mut stage = network.stage.lock().await;
    let Stage::Joined(Whole { joined, bound }) = &mut *stage else {
        return Ok(());
    };
    let (namespace, looked_at) = (Arc::clone(&network.namespace), Arc::clone(joined));
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
    let left = take_back(guest, left).await;
    let followed = change(guest, bound, changed, removed).await;
    let mut added = Ok(());
    if !come.is_empty() {
        let mut new = Vec::new();
        for interface in &come.interfaces {
            tracing::info!("interface {} of the pod's network has come", interface.name);
        }
        let indices: Vec<_> = come.interfaces.iter().map(|it| it.index).collect();
        added = give(guest, come, taps, &mut new).await;
        if added.is_ok() {
            bound.extend(new);
        } else {
            let joined = Arc::clone(joined);
            let give_up = move || {
                indices.into_iter().for_each(|it| lock(&joined).give_up(it));
                Ok(())
            };
            added = added.and(take_back(guest, new).await);
            added = added.and(blocking(give_up).await);
        }
    }
    network.note(lock(joined).qdiscs());
    left.and(followed).and(added)
}
