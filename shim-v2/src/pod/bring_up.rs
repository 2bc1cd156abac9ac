//! The steps from nothing to an agent that answers.
//!
//! Called by `create` for a pod's first container, whose spec sizes the VM. Each step hands what it
//! has made to [`Undo`]: a step that fails and the pod's end take the same way back. A failure's
//! text has the steps that were done before it and how long each took.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kata_like_config::Config;
use kata_like_config::state::{NetworkLock, Process, Record, StateError, StateFolder, name};
use tokio::sync::mpsc;

use super::oom_score::OomScore;
use super::sandbox::Sandbox;
use super::{cleanup, oom_score, sources, uid};
use crate::cgroup::limits::Limits;
use crate::cgroup::{self, Cgroup, LEAF};
use crate::network::namespace::Namespace;
use crate::network::pod_network::PodNetwork;
use crate::selinux::Labels;
use crate::share::Share;
use crate::spawn::Network;
use crate::spec::{self, MemorySize, NetworkPart, Owners, Split};
use crate::stand_in::StandIn;
use crate::steps::{self, Build, Undo, blocking};
use crate::vm::agent::Event;
use crate::vm::clock::Clock;
use crate::vm::disks::Disks;
use crate::vm::guest::Guest;
use crate::vm::launch::{Parts, Place};
use crate::vm::ledger::{Ledger, process_of};
use crate::vm::machine::{self, Vm};
use crate::vm::memory::MemoryNames;
use kata_like_failure::{Failure, Kind, Step as _};
use kata_like_linux::lock;

/// What a sandbox is made from.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) namespace: String,
    /// The sandbox's id.
    pub(super) id: String,
    /// The first container's id, most often the sandbox's too.
    pub(super) first: String,
    /// It runs nothing: CRI's pause container.
    pub(super) placeholder: bool,
    /// The first container's bundle.
    pub(super) bundle: PathBuf,
    /// The configuration file named by the runtime's options; none: the installed one.
    pub(super) config_path: Option<PathBuf>,
    /// The mount namespace of containerd, where hooks run; none: the shim's own.
    pub(super) host_mounts: Option<Arc<OwnedFd>>,
    /// The claim on the pod's network namespace, if the pod has it already.
    pub(super) network: Option<NetworkLock>,
}

/// A sandbox that is up, its events, and what its first container is made with.
pub(super) type Up = (Arc<Sandbox>, mpsc::Receiver<Event>, First);

/// What the first container is made with: the VM was made for its spec, and the pod was born in its
/// cgroup.
#[derive(Debug)]
pub(super) struct First {
    pub(super) split: Split,
    pub(super) cgroup: Cgroup,
    pub(super) stand_in: StandIn,
}

/// The steps of a bring-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Configuration, spec and the files of a VM.
    Read,
    /// The state folder and the ledger in it.
    State,
    Cgroups,
    /// Before the network: it is undone after the containers, whose mounts are in it.
    Share,
    /// The first stand-in, the namespace, and the claim on it.
    Network,
    Processes,
    Boot,
    Agent,
}

const ORDER: [Step; 8] = [
    Step::Read,
    Step::State,
    Step::Cgroups,
    Step::Share,
    Step::Network,
    Step::Processes,
    Step::Boot,
    Step::Agent,
];

impl fmt::Display for Step {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        to.write_str(match self {
            Self::Read => "read",
            Self::State => "state",
            Self::Cgroups => "cgroups",
            Self::Share => "share",
            Self::Network => "network",
            Self::Processes => "VMM, fs server and proxy",
            Self::Boot => "guest's boot",
            Self::Agent => "agent",
        })
    }
}

/// Starts a sandbox. What was made is undone if a step fails.
pub(super) async fn start(request: Request) -> Result<Up, Failure> {
    let id = request.id.clone();
    let undo = Undo::default();
    let mut making = Making::new(request);
    let (times, built) = steps::build(&mut making, &undo).await;
    built.map_err(|error| error.during(format!("start sandbox {id} ({})", times.failure())))?;
    let took = times.total().as_millis();
    tracing::info!(sandbox = id, "sandbox started in {took} ms ({times})");
    making.finish(undo)
}

/// What the steps have found and made so far.
struct Making {
    request: Request,
    read: Option<Read>,
    state: Option<Arc<StateFolder>>,
    ledger: Option<Arc<Ledger>>,
    cgroup: Option<Cgroup>,
    leaf: Option<Cgroup>,
    limits: Option<Limits>,
    share: Option<Arc<Share>>,
    stand_in: Arc<Mutex<Option<StandIn>>>,
    network: Option<Arc<PodNetwork>>,
    host_only: usize,
    vm: Option<Arc<Vm>>,
    guest: Option<(Guest, mpsc::Receiver<Event>)>,
}

/// What is known before anything is made.
struct Read {
    config: Config,
    parts: Parts,
    labels: Labels,
    /// The first container's cgroup, from the root of all.
    cgroup: PathBuf,
    split: Split,
    memory_names: MemoryNames,
    memory: MemorySize,
    vcpus: u8,
    /// What the pod's processes are born with.
    oom_score: i32,
}

impl Build for Making {
    type Step = Step;

    fn order(&self) -> &'static [Step] {
        &ORDER
    }

    async fn make(&mut self, step: Step, undo: &Undo) -> Result<(), Failure> {
        match step {
            Step::Read => self.read(),
            Step::State => self.make_state(undo).await,
            Step::Cgroups => self.make_cgroups(undo).await,
            Step::Share => self.make_share(undo).await,
            Step::Network => self.make_network(undo).await,
            Step::Processes => self.start_processes(undo).await,
            Step::Boot => self.boot().await,
            Step::Agent => self.meet_agent().await,
        }
    }
}

/// A step that needs what an earlier one makes.
fn made<T>(earlier: Option<&T>) -> Result<&T, Failure> {
    earlier.ok_or_else(|| Failure::new(Kind::Failed, "an earlier step has made nothing"))
}

impl Making {
    fn new(request: Request) -> Self {
        Self {
            request,
            read: None,
            state: None,
            ledger: None,
            cgroup: None,
            leaf: None,
            limits: None,
            share: None,
            stand_in: Arc::default(),
            network: None,
            host_only: 0,
            vm: None,
            guest: None,
        }
    }

    fn read(&mut self) -> Result<(), Failure> {
        let request = &self.request;
        let config = match &request.config_path {
            None => Config::load(),
            Some(path) => Config::load_file(path),
        };
        let config = config.step(|| "read the configuration")?;
        crate::log::set_level(config.log_level);
        let spec = spec::read(&request.bundle)?;
        let mut memory_names = MemoryNames::default();
        let owners = Owners {
            of_sandbox: request.placeholder,
            ..Owners::default()
        };
        let halves = spec::split(spec, &request.bundle, &owners)?;
        let found = sources::look_up(&halves.binds, |found| memory_names.volume(found))?;
        let split = halves.with(found)?;
        let given = split.host.cgroups_path.as_deref();
        let cgroup = cgroup::path_of(given, &request.namespace, &request.first)
            .step(|| "find the sandbox's cgroup")?;
        let default = u64::from(config.memory_mib) << 20;
        let memory = split.host.size.memory(default, host_memory())?;
        let labels = split.host.labels.clone().on_this_host(config.selinux);
        let oom_score = oom_score::at_birth(split.host.oom_score, request.placeholder);
        let place = Place {
            label: labels.process.clone(),
            oom_score,
        };
        let parts = Parts::open(&config, place)?;
        let vcpus = split
            .host
            .size
            .vcpus(config.max_vcpus, kata_like_config::online_cpus());
        self.read = Some(Read {
            config,
            parts,
            labels,
            cgroup,
            split,
            memory_names,
            memory,
            vcpus,
            oom_score,
        });
        Ok(())
    }

    async fn make_state(&mut self, undo: &Undo) -> Result<(), Failure> {
        let (namespace, id) = (&self.request.namespace, &self.request.id);
        let failed = |cause: StateError| Failure::failed("keep the pod's state", cause);
        let create = || StateFolder::create(namespace, id);
        let state = match create() {
            // containerd gives no name twice: what is there is a dead shim's.
            Err(StateError::Exists { .. })
                if cleanup::remove_dead(namespace, id).map_err(failed)? =>
            {
                create()
            }
            other => other,
        };
        let state = Arc::new(state.map_err(failed)?);
        let (folder, claim) = (Arc::clone(&state), Arc::new(Mutex::new(None)));
        let held = Arc::clone(&claim);
        undo.push(async move {
            let remove = move || {
                remove_state(&folder);
                drop(held);
            };
            let _ = tokio::task::spawn_blocking(remove).await;
        })
        .await?;
        *lock(&claim) = state.try_lock().map_err(failed)?;
        let mut record = Record::new(namespace, id);
        record.shim = Process::current().ok();
        let ledger = Arc::new(Ledger::open(Arc::clone(&state), record)?);
        let closing = Arc::clone(&ledger);
        undo.push(async move { closing.close() }).await?;
        state.create_directory(name::EMPTY).map_err(failed)?;
        (self.state, self.ledger) = (Some(state), Some(ledger));
        Ok(())
    }

    async fn make_cgroups(&mut self, undo: &Undo) -> Result<(), Failure> {
        let (read, ledger) = (made(self.read.as_ref())?, made(self.ledger.as_ref())?);
        let step = || "make the pod's cgroups";
        // `start` has made both and gave birth to this process in the leaf: they are found here.
        let leaf = Cgroup::create(&read.cgroup.join(LEAF)).step(step)?;
        let paths = leaf.made().to_vec();
        undo.push(async move {
            // The leaf holds this process: it stays, and its parents, until the process ends.
            let remove = move || cgroup::remove(&paths, Duration::ZERO);
            let _ = tokio::task::spawn_blocking(remove).await;
        })
        .await?;
        let own = Cgroup::create(&read.cgroup).step(step)?;
        ledger.change(|record| record.cgroups = leaf.made().to_vec())?;
        let is_limited = read.split.host.size.memory.is_some();
        let limits = Limits::of(&own, read.memory.bytes, is_limited);
        if let Err(error) = limits.set() {
            let line = kata_like_failure::one_line(&error);
            tracing::warn!("{line}; the pod runs without this limit on the host");
        }
        (self.cgroup, self.leaf) = (Some(own), Some(leaf));
        self.limits = Some(limits);
        Ok(())
    }

    async fn make_share(&mut self, undo: &Undo) -> Result<(), Failure> {
        let (read, state) = (made(self.read.as_ref())?, made(self.state.as_ref())?);
        let (labels, folder) = (read.labels.clone(), Arc::clone(state));
        let share = Arc::new(blocking(move || Share::create(&folder, &labels)).await?);
        let mounted = Arc::clone(&share);
        undo.push(async move { mounted.unmount() }).await?;
        self.share = Some(share);
        Ok(())
    }

    /// A new namespace is born with the stand-in. One that is given is claimed before a process is
    /// in it.
    async fn make_network(&mut self, undo: &Undo) -> Result<(), Failure> {
        let (read, state) = (made(self.read.as_ref())?, made(self.state.as_ref())?);
        let ledger = made(self.ledger.as_ref())?;
        let pod = (self.request.namespace.as_str(), self.request.id.as_str());
        let mut held = self.request.network.take();
        let given = match &read.split.host.network {
            NetworkPart::Path(path) => {
                let given = Namespace::given(path)?;
                given.claim(held.take(), pod, ledger).await?;
                Some(Arc::new(given))
            }
            NetworkPart::New => None,
            NetworkPart::Pod => {
                return Err(Failure::new(
                    Kind::BadRequest,
                    "linux.namespaces of type network: a sandbox can't join its own pod",
                ));
            }
        };
        let cgroup = made(self.cgroup.as_ref())?.as_fd().try_clone_to_owned();
        let cgroup = cgroup.step(|| "copy a descriptor")?;
        let (task, empty) = (self.request.first.clone(), state.path().join(name::EMPTY));
        let (joined, oom_score) = (given.clone(), read.oom_score);
        let stand_in = blocking(move || {
            let network = match &joined {
                Some(given) => Network::Join(given.as_fd()),
                None => Network::New,
            };
            StandIn::start(&task, cgroup.as_fd(), network, &empty, oom_score)
                .step(|| "make the pod's network namespace")
        });
        let stand_in = stand_in.await?;
        let pid = stand_in.pid();
        *lock(&self.stand_in) = Some(stand_in);
        // Whatever of it no container has taken.
        let left = Arc::clone(&self.stand_in);
        undo.push(async move {
            let left = lock(&left).take();
            if let Some(stand_in) = left {
                stand_in.end().await;
            }
        })
        .await?;
        let namespace = match given {
            Some(given) => given,
            None => {
                let new = Namespace::of_stand_in(pid)?;
                new.claim(held.take(), pod, ledger).await?;
                Arc::new(new)
            }
        };
        let network = Arc::new(PodNetwork::new(namespace, Arc::clone(ledger)));
        self.host_only = undo.mark();
        let leaving = Arc::clone(&network);
        undo.push(async move { leaving.leave().await }).await?;
        self.network = Some(network);
        Ok(())
    }

    async fn start_processes(&mut self, undo: &Undo) -> Result<(), Failure> {
        let (read, state) = (made(self.read.as_ref())?, made(self.state.as_ref())?);
        let leaf = made(self.leaf.as_ref())?.as_fd();
        let tree = made(self.share.as_ref())?.tree()?;
        let uid = uid::take(state).await?;
        let (memory, vcpus) = (read.memory.bytes, read.vcpus);
        let boot = machine::boot(&read.config, memory, vcpus, &read.parts, uid);
        let vm = Vm::start(&read.parts, &boot, state, tree, leaf, &read.labels).await?;
        let vm = Arc::new(vm);
        let running = Arc::clone(&vm);
        undo.push(async move { running.stop().await }).await?;
        let [vmm, fsd, proxy] = vm.pids();
        made(self.ledger.as_ref())?.change(|record| {
            record.uid = Some(uid);
            record.vmm = process_of(vmm);
            record.fsd = process_of(fsd);
            record.proxy = process_of(proxy);
        })?;
        self.vm = Some(vm);
        Ok(())
    }

    async fn boot(&mut self) -> Result<(), Failure> {
        let patience = made(self.read.as_ref())?.config.boot_deadline;
        made(self.vm.as_ref())?.booted(patience).await
    }

    async fn meet_agent(&mut self) -> Result<(), Failure> {
        let (vm, state) = (made(self.vm.as_ref())?, made(self.state.as_ref())?);
        let watch = || "watch the host's clock";
        let clock = Clock::watch().step(watch)?;
        let guest = vm.guest(Arc::clone(state), &self.request.id).await?;
        let memory = made(self.read.as_ref())?.memory;
        let happened = vm.follow(&guest, memory);
        clock.follow(guest.clone()).step(watch)?;
        self.guest = Some((guest, happened));
        Ok(())
    }

    /// Puts together what the steps have made.
    fn finish(self, undo: Undo) -> Result<Up, Failure> {
        let none = || Failure::new(Kind::Failed, "start a sandbox: a step has made nothing");
        let read = self.read.ok_or_else(none)?;
        let (guest, happened) = self.guest.ok_or_else(none)?;
        let stand_in = lock(&self.stand_in).take();
        let ledger = self.ledger.ok_or_else(none)?;
        let first = First {
            split: read.split,
            cgroup: self.cgroup.ok_or_else(none)?,
            stand_in: stand_in.ok_or_else(none)?,
        };
        let sandbox = Sandbox {
            namespace: self.request.namespace,
            disks: Arc::new(Disks::new(guest.clone())),
            guest,
            network: self.network.ok_or_else(none)?,
            oom_score: Arc::new(OomScore::new(Arc::clone(&ledger), read.oom_score)),
            ledger,
            share: self.share.ok_or_else(none)?,
            state: self.state.ok_or_else(none)?,
            memory_names: Mutex::new(read.memory_names),
            labels: read.labels,
            host_mounts: self.request.host_mounts,
            limits: self.limits.ok_or_else(none)?,
            memory: read.memory,
            vcpus: read.vcpus,
            made: undo,
            host_only: self.host_only,
            stopping: tokio::sync::Mutex::default(),
        };
        Ok((Arc::new(sandbox), happened, first))
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

/// The host's memory in bytes.
fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_step_that_fails_undoes_those_before_it_in_reverse() {
        let wanted = [
            "read",
            "state",
            "cgroups",
            "share",
            "network",
            "VMM, fs server and proxy",
            "guest's boot",
            "agent",
        ];
        steps::tests::check(&ORDER, &wanted).await;
    }
}
