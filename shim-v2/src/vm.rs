//! One pod's microVM, seen from the shim: brought up step by step, taken down in reverse.
//!
//! Called by `pod`. Everything here is in the shim's own types: containerd's messages stop in
//! `service` and `convert`, the agent's in `agent`. What flows back (an exit, a lack of memory, the
//! end of the VM) is a [`SandboxEvent`] on the channel that the caller handed down.
//!
//! Invariants: no lock is held over a call into the guest; every such call has a deadline that is
//! bound to the guest's progress, and goes on if its caller leaves; whatever a step has made, its
//! guard takes down, also when a later step fails.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use kata_like_config::state::{NetworkLock, Record, StateFolder, name};
use kata_like_failure::{Failure, Kind};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::cgroup::Cgroup;
use crate::network::forward::Forward;
use crate::network::resolver::ResolvConf;
use crate::selinux::Labels;
use crate::share::{Mounted, Share, SharedVolume};
use crate::spec::{MemorySize, Split};
use crate::stand_in::StandIn;
use crate::vm::agent::{Agent, GuestEvent};
use crate::vm::launch::Vmm;
pub use crate::vm::request::{
    ContainerRequest, CreatedContainer, ExecRequest, RootfsMount, SandboxEvent, SandboxRequest,
    Stats, StreamTokens,
};

pub mod agent;
mod bring_up;
pub mod cleanup;
mod clock;
mod container;
mod disks;
mod ending;
mod forward;
mod hooks;
pub mod launch;
mod limits;
mod machine;
mod memory;
mod namespace;
mod network;
pub mod request;
mod resolver;

use disks::{Disk, Number};
use hooks::ContainerHooks;
use limits::Limits;
use machine::Machine;
use memory::MemoryNames;
use network::PodNetwork;
use resolver::Resolver;

/// How long the agent has to take a container away before the host goes on without it. Nothing is lost then: what the
/// fs server has open it goes on to serve. containerd's CRI plugin gives all of a deletion ten seconds.
const DELETE_IN_GUEST: Duration = Duration::from_secs(5);
/// How long a stream may take to be taken by the VMM.
const OPEN_STREAM: Duration = Duration::from_secs(10);

/// SIGKILL.
const KILL: u32 = 9;

/// The least time between two that a container's lack of memory is told.
const OUT_OF_MEMORY: Duration = Duration::from_millis(100);

/// A running microVM with its file server.
#[derive(Debug)]
pub struct Sandbox {
    namespace: String,
    id: String,
    agent: Agent,
    vmm: Vmm,
    state: Arc<StateFolder>,
    share: Arc<Share>,
    /// The pod's network namespace, which each stand-in joins.
    network: OwnedFd,
    /// Where it is, if the pod was given one.
    network_path: Option<PathBuf>,
    /// What the VM has of it.
    pod_network: tokio::sync::Mutex<PodNetwork>,
    /// What its loopback on the host leads to; none: not yet, not any more, or it can't be had.
    forward: Mutex<Option<Forward>>,
    resolver: Resolver,
    /// containerd's mount namespace, where hooks run.
    host_mounts: Option<Arc<OwnedFd>>,
    /// What VMM and fs server run under.
    labels: Labels,
    /// The sandbox container's cgroup, which has the pod's limits on the host.
    limited: PathBuf,
    /// The VM's memory.
    memory: MemorySize,
    vcpus: u8,
    events: mpsc::UnboundedSender<SandboxEvent>,
    inner: Mutex<Inner>,
    /// The processes and the rest of the machine, until they are taken down.
    machine: tokio::sync::Mutex<Option<Machine>>,
    /// The end is wanted: it is no event.
    stopping: AtomicBool,
    me: Weak<Sandbox>,
}

/// What changes while the pod lives. Held for moments only, never over a wait.
#[derive(Debug)]
struct Inner {
    containers: HashMap<String, Container>,
    /// The stand-in that was born with the pod, until its container takes it.
    first: Option<(Cgroup, StandIn)>,
    /// The first container's spec, which the VM was made by, until that container is made.
    first_split: Option<Split>,
    memory: MemoryNames,
    disks: HashMap<Number, Disk>,
    record: Record,
}

/// A container, from its request to its deletion.
#[derive(Debug, Default)]
struct Container {
    stand_in: Option<StandIn>,
    cgroup: Option<Arc<Cgroup>>,
    /// Its root file system's, to be dropped from the last to the first.
    root: Vec<Mounted>,
    volumes: Vec<SharedVolume>,
    /// Its disks, a number each time that it holds one.
    disks: Vec<Number>,
    /// Its hooks on the host, once the first of them has been begun.
    hooks: Option<Arc<ContainerHooks>>,
    /// What names its name servers.
    resolv_conf: ResolvConf,
    /// Its limits, as far as it has them.
    limits: Limits,
    execs: HashMap<String, Exec>,
    exited: bool,
    /// When a lack of memory was last told.
    out_of_memory: Option<Instant>,
}

#[derive(Debug, Default)]
struct Exec {
    stand_in: Option<StandIn>,
    exited: bool,
}

impl Drop for Container {
    fn drop(&mut self) {
        while self.root.pop().is_some() {}
    }
}

impl Sandbox {
    /// Brings the VM up, to the agent's answer to its first call. Goes on if the caller leaves.
    pub async fn start(request: SandboxRequest) -> Result<Arc<Self>, Failure> {
        let id = request.id.clone();
        let work = tokio::spawn(bring_up::start(request));
        work.await
            .unwrap_or_else(|panic| Err(Failure::failed(format!("start sandbox {id}"), panic)))
    }

    /// Makes a container up to the point before its first instruction. Goes on if the caller
    /// leaves.
    pub async fn create_container(
        &self,
        request: ContainerRequest,
    ) -> Result<CreatedContainer, Failure> {
        let me = self.me()?;
        let id = request.id.clone();
        let work = tokio::spawn(async move { container::create(&me, request).await });
        work.await
            .unwrap_or_else(|panic| Err(Failure::failed(format!("create container {id}"), panic)))
    }

    /// Lets a created container run, and runs its hooks for that moment: if one fails, the container
    /// is killed. The first one to start finds the pod's network as it is then.
    pub async fn start_container(&self, id: &str) -> Result<(), Failure> {
        network::join(&self.me()?).await?;
        resolver::serve(self, id).await;
        self.agent.start_container(id).await?;
        if let Err(error) = hooks::after_start(self, id).await {
            if let Err(error) = self.agent.signal(id, "", KILL, true).await {
                tracing::warn!("{}", error.one_line());
            }
            return Err(error.during(format!("start container {id}")));
        }
        if tracing::enabled!(tracing::Level::DEBUG) {
            self.vmm.log_figures("the start of a container").await;
        }
        Ok(())
    }

    /// Runs a further process in a container and answers the host pid of its stand-in. Goes on if
    /// the caller leaves.
    pub async fn exec(&self, request: ExecRequest) -> Result<u32, Failure> {
        let me = self.me()?;
        let exec = request.exec.clone();
        let work = tokio::spawn(async move { container::exec(&me, request).await });
        work.await
            .unwrap_or_else(|panic| Err(Failure::failed(format!("exec {exec}"), panic)))
    }

    /// Signals a process, or with `all` every process of the container. `exec` is empty for the
    /// init. A process that has exited is `NotFound`.
    pub async fn signal(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Failure> {
        self.agent.signal(id, exec, signal, all).await
    }

    /// Waits until a process that was killed is gone, for as long as what is to be written back becomes less. The
    /// error is why there is nothing to wait for.
    pub async fn killed(&self, is_gone: impl Fn() -> bool) -> Result<(), String> {
        ending::gone(self, is_gone).await
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(
        &self,
        id: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), Failure> {
        self.agent.resize(id, exec, width, height).await
    }

    /// A container's figures; also after its exit.
    pub async fn stats(&self, id: &str) -> Result<Stats, Failure> {
        self.agent.stats(id).await
    }

    /// Takes a container away: in the guest, its mounts on the host, its stand-ins. Succeeds with a
    /// dead VM, and for a container that was never made.
    pub async fn delete_container(&self, id: &str) -> Result<(), Failure> {
        if !self.inner().containers.contains_key(id) {
            return Ok(());
        }
        let asked = !self.stopping.load(Ordering::SeqCst) && !self.agent.is_stuck();
        if asked && !self.vmm.is_over() {
            let gone = self.agent.delete_container(id, DELETE_IN_GUEST).await;
            if let Err(error) = gone
                && error.kind() != Kind::NotFound
            {
                // The mounts are taken away under it: lazily, so this can't fail.
                tracing::warn!("{}; the host's side goes on", error.one_line());
            }
        }
        let container = self.inner().containers.remove(id);
        self.take_away(id, container).await;
        Ok(())
    }

    /// Ends the stand-in of an exec that has exited.
    pub async fn forget_exec(&self, id: &str, exec: &str) {
        let stand_in = {
            let mut inner = self.inner();
            let container = inner.containers.get_mut(id);
            container
                .and_then(|container| container.execs.remove(exec))
                .and_then(|exec| exec.stand_in)
        };
        if let Some(stand_in) = stand_in {
            stand_in.end().await;
            self.record();
        }
    }

    /// Opens a standard stream in the guest: connects and sends the token.
    pub async fn open_stream(&self, token: [u8; 16]) -> Result<UnixStream, Failure> {
        let what = "open a stream into the guest";
        let path = self.state.short_path(name::STREAMS);
        let work = async {
            let mut stream = UnixStream::connect(path).await?;
            stream.write_all(&token).await?;
            Ok::<_, std::io::Error>(stream)
        };
        tokio::select! {
            opened = tokio::time::timeout(OPEN_STREAM, work) => match opened {
                Ok(opened) => opened.map_err(|cause| Failure::failed(what, cause)),
                Err(_) => Err(Failure::new(
                    Kind::DeadlineExceeded,
                    format!("{what}: the VMM has not taken it within {OPEN_STREAM:?}"),
                )),
            },
            why = self.vmm.over() => {
                Err(Failure::new(Kind::Failed, format!("{what}: {why}")))
            }
        }
    }

    /// Ends the pod: the guest writes back what it has, then VM, file server, stand-ins, mounts, cgroups and state
    /// folder go. Can be called again.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let mut machine = self.machine.lock().await;
        let Some(mut machine) = machine.take() else {
            return;
        };
        if let Some(Err(error)) = machine.network.as_ref().map(NetworkLock::leaving) {
            tracing::warn!("tell that the pod leaves its network namespace: {error}");
        }
        let stuck = self.agent.is_stuck();
        if stuck {
            self.vmm.child().kill();
        } else {
            ending::write_back(self).await;
        }
        machine.stop_processes().await;
        network::leave(self).await;
        machine.network = None; // while the stand-ins keep the namespace
        let (containers, first) = {
            let mut inner = self.inner();
            let containers: Vec<_> = inner.containers.drain().collect();
            (containers, inner.first.take())
        };
        for (id, container) in containers {
            self.take_away(&id, Some(container)).await;
        }
        if let Some((_, stand_in)) = first {
            stand_in.end().await;
        }
        machine.take_down().await;
        tracing::info!(
            sandbox = self.id,
            namespace = self.namespace,
            "sandbox stopped"
        );
    }

    /// The host's part of a container's end.
    async fn take_away(&self, id: &str, container: Option<Container>) {
        let Some(mut container) = container else {
            return;
        };
        for (_, exec) in container.execs.drain() {
            if let Some(stand_in) = exec.stand_in {
                stand_in.end().await;
            }
        }
        if let Some(stand_in) = container.stand_in.take() {
            stand_in.end().await;
        }
        for number in std::mem::take(&mut container.disks) {
            disks::release(self, number).await;
        }
        let cgroup = container.cgroup.take();
        let hooks = container.hooks.take();
        let own = self.id.clone();
        let id = id.to_owned();
        let _ = tokio::task::spawn_blocking(move || drop(container)).await;
        if let Some(hooks) = hooks {
            hooks::after_stop(self, &hooks, cgroup.clone()).await;
        }
        let _ = tokio::task::spawn_blocking(move || {
            // The sandbox's own holds the leaf that the shim lives in: it goes with the pod.
            if let Some(cgroup) = cgroup.filter(|_| id != own) {
                // What a hook has left behind goes with the container.
                for busy in crate::cgroup::remove(cgroup.made(), Duration::from_millis(500)) {
                    crate::cgroup::kill(&busy);
                }
                crate::cgroup::remove(cgroup.made(), Duration::from_millis(500));
            }
        })
        .await;
        self.record();
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it is held, and each change is whole by itself.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn me(&self) -> Result<Arc<Self>, Failure> {
        self.me
            .upgrade()
            .ok_or_else(|| Failure::new(Kind::WrongState, "the sandbox has been stopped"))
    }

    /// Whether an event of the guest is about a process that is there and has not exited yet. An
    /// exit is noted, and so told once; a lack of memory is not told in a flood.
    fn expects(&self, event: &GuestEvent) -> bool {
        let mut inner = self.inner();
        let Some(container) = inner.containers.get_mut(&event.container) else {
            return false;
        };
        let exited = match event.exec.as_str() {
            "" => &mut container.exited,
            exec => match container.execs.get_mut(exec) {
                Some(exec) => &mut exec.exited,
                None => return false,
            },
        };
        if !event.exit {
            let last = container.out_of_memory.replace(Instant::now());
            let told = last.is_none_or(|last| last.elapsed() >= OUT_OF_MEMORY);
            if told {
                let limit = limits::out_of_memory(container.limits.memory, &self.memory);
                tracing::warn!(container = event.container, "out of memory: {limit}");
            }
            return told;
        }
        !std::mem::replace(exited, true)
    }

    /// Watches a stand-in: its death, unless it was ended, is told.
    fn watch_stand_in(&self, container: &str, exec: &str, stand_in: &StandIn) {
        let child = stand_in.child().clone();
        let (me, container, exec) = (self.me.clone(), container.to_owned(), exec.to_owned());
        tokio::spawn(async move {
            let exit = child.exited().await;
            let Some(me) = me.upgrade() else { return };
            if me.stopping.load(Ordering::SeqCst) {
                return;
            }
            let is_ours = {
                let inner = me.inner();
                let found = inner.containers.get(&container);
                let stand_in = found.and_then(|found| match exec.as_str() {
                    "" => found.stand_in.as_ref(),
                    exec => found.execs.get(exec)?.stand_in.as_ref(),
                });
                stand_in.is_some_and(|stand_in| stand_in.pid() == child.pid)
            };
            if is_ours {
                tracing::warn!(container, exec, "the task's stand-in {exit}");
                let _ = me
                    .events
                    .send(SandboxEvent::StandInDied { container, exec });
            }
        });
    }

    /// Writes down what the pod consists of, for whoever cleans up after a dead shim.
    fn record(&self) {
        let inner = self.inner();
        let mut record = inner.record.clone();
        for (id, container) in &inner.containers {
            let execs = container.execs.values().map(|exec| &exec.stand_in);
            let all = std::iter::once(&container.stand_in).chain(execs);
            record.stand_ins.extend(
                all.flatten()
                    .filter_map(|stand_in| bring_up::recorded(id, stand_in)),
            );
            let made = container.cgroup.iter().flat_map(|cgroup| cgroup.made());
            for path in made {
                if !record.cgroups.contains(path) {
                    record.cgroups.insert(0, path.clone());
                }
            }
        }
        // Under the lock: the last one written is the last one true.
        if let Err(error) = self.state.write_record(&record)
            && !self.stopping.load(Ordering::SeqCst)
        {
            tracing::warn!("{}", kata_like_failure::one_line(&error));
        }
    }
}
