//! One container: its state machine, its processes, and their ends.
//!
//! Called by `pod.rs`. What happens by itself (an exit, an OOM kill) becomes an event. What is
//! asked for never holds a lock over a wait: it looks at the state and changes it in single steps.
//!
//! States, and who moves them: Creating → Created → Starting → Running → Pausing → Paused →
//! Resuming → Running (the host's calls) → Stopped (the init's exit, from any of them) → Deleting
//! (the host's call) → gone. A create that fails goes from Creating to gone by itself.

mod deletion;
mod exec;
mod pause;
mod placeholder;
mod processes;
mod resources;

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use kata_like_failure::{Failure, Kind, Step, one_line};
use kata_like_linux::lock;
use kata_like_spec::JOINED_NAMESPACE;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::Value;
use tokio::sync::{Notify, OnceCell};
use tokio::task::AbortHandle;

use crate::cgroup::Cgroup;
use crate::deadline::blocking;
use crate::events::{Event, Events};
use crate::process::{self, Process};
use crate::reaper::{self, Exit};
use crate::runner::{self, InitRequest, Joined, Start};
use crate::spec::Creation;
use crate::stdio;
use crate::stdio::Streams;
use crate::stdio::port::Tokens;
use crate::storage::{self, MEMORY, ROOTFS, VOLUMES, VolumeHolders};

const SIGKILL: u32 = 9;

/// What all containers of the pod share.
pub struct Surroundings {
    /// Where events for the host go.
    pub events: Events,
    /// Where the host dials streams.
    pub tokens: Arc<Tokens>,
    /// Which container has which volume.
    pub volumes: VolumeHolders,
}

/// One container, from its create to its delete.
pub struct Container {
    name: String,
    made_of: Creation,
    /// The container holds namespaces and runs nothing.
    placeholder: Option<Placeholder>,
    around: Arc<Surroundings>,
    state: Mutex<State>,
    created: Notify,
}

/// What only a placeholder has.
#[derive(Default)]
struct Placeholder {
    /// Nothing is ever written to them.
    streams: Mutex<Option<Streams>>,
    /// Set once the PID namespace has its first process.
    first_process: OnceCell<()>,
}

struct State {
    phase: Phase,
    cgroup: Option<Arc<Cgroup>>,
    init: Option<Arc<Process>>,
    /// `None`: the exec is being set up.
    execs: HashMap<String, Option<Arc<Process>>>,
    /// Execs that have exited, and whose streams still carry data.
    lingering: Vec<Arc<Process>>,
    /// Namespaces that other containers may join, kept from the birth of the init on.
    namespaces: Vec<(LinuxNamespaceType, OwnedFd)>,
    memory_watch: Option<AbortHandle>,
    /// The volumes that the container holds.
    volumes: Vec<String>,
    /// The `linux.resources` that hold now. `None`: they are being updated.
    resources: Option<Value>,
}

enum Phase {
    Creating,
    /// `None`: a placeholder has nothing to start.
    Created(Option<Start>),
    Starting,
    Running,
    Pausing,
    Paused,
    Resuming,
    Stopped,
    Deleting,
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created(_) => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Pausing => "being paused",
            Self::Paused => "paused",
            Self::Resuming => "being resumed",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
        }
    }

    /// The container is made and has not ended.
    fn is_alive(&self) -> bool {
        !matches!(self, Self::Creating | Self::Stopped | Self::Deleting)
    }

    /// The container is alive, and takes new processes.
    fn takes_processes(&self) -> bool {
        matches!(self, Self::Created(_) | Self::Starting | Self::Running)
    }
}

impl Container {
    /// A container that is a name so far, and what it is to be made of.
    pub fn new(name: String, made_of: Creation, around: Arc<Surroundings>) -> Self {
        let state = State {
            phase: Phase::Creating,
            cgroup: None,
            init: None,
            execs: HashMap::new(),
            lingering: Vec::new(),
            namespaces: Vec::new(),
            memory_watch: None,
            volumes: Vec::new(),
            resources: Some(made_of.resources.clone()),
        };
        Self {
            name,
            placeholder: made_of.placeholder.then(Placeholder::default),
            made_of,
            around,
            state: Mutex::new(state),
            created: Notify::new(),
        }
    }

    /// What the container was made of.
    pub fn made_of(&self) -> &Creation {
        &self.made_of
    }

    /// The containers whose namespaces this one wants, by kind.
    pub fn joins(&self) -> &[(LinuxNamespaceType, String)] {
        &self.made_of.joins
    }

    /// Makes the container up to its first instruction. Returns its init's pid, 0 for a
    /// placeholder. A failure leaves nothing behind.
    pub async fn create(self: &Arc<Self>, joined: Vec<Joined>) -> Result<u32, Failure> {
        let result = self.set_up(joined).await;
        if result.is_err() {
            if let Err(error) = self.take_down().await {
                log::error!(
                    "undo the create of container {}: {}",
                    self.name,
                    one_line(&error)
                );
            }
            self.state().phase = Phase::Stopped;
        }
        self.created.notify_waiters();
        result
    }

    async fn set_up(self: &Arc<Self>, joined: Vec<Joined>) -> Result<u32, Failure> {
        let (stdio, plan) = stdio::prepare(&self.around.tokens, &self.made_of.wanted)?;
        let (name, limits) = (self.name.clone(), self.made_of.limits.clone());
        let cgroup = blocking("make the container's cgroup", move || {
            Ok::<_, Infallible>(Cgroup::create(&name, &limits))
        });
        let cgroup = Arc::new(cgroup.await??);
        self.state().cgroup = Some(cgroup.clone());
        if self.placeholder.is_some() {
            self.hold(&cgroup, joined, plan).await?;
            return Ok(0);
        }

        let (root, volumes) = self.root_and_volumes();
        self.around.volumes.add(&volumes);
        self.state().volumes = volumes.clone();
        blocking("look into its volumes", move || {
            storage::look_into(&volumes)
        })
        .await?;
        let request = InitRequest {
            container: self.name.clone(),
            spec: self.made_of.spec.clone(),
            binds: self.made_of.binds.clone(),
            guest_namespaces: self.made_of.guest_namespaces.clone(),
            rootfs: root,
            volumes: PathBuf::from(VOLUMES.target),
            memory: PathBuf::from(MEMORY),
            cgroup: cgroup.directory().into(),
        };
        let created = runner::create(request, stdio, joined).await?;
        // The exit is asked for before any other wait, so the pid cannot be another process's yet.
        let exit = reaper::exited(created.pid);
        let streams = plan
            .connect(created.terminal)
            .step(|| "watch its streams")?;
        let init = Arc::new(Process::new(created.pid, created.pidfd, streams));
        let namespaces = shareable_namespaces(&init, &self.made_of.spec);

        let mut state = self.state();
        state.init = Some(init.clone());
        state.namespaces = namespaces;
        state.phase = Phase::Created(Some(created.start));
        state.memory_watch = Some(self.watch_memory(cgroup));
        drop(state);
        self.await_init(init, exit);
        Ok(created.pid)
    }

    /// The path of the rootfs, and the volumes that the container holds. A rootfs can be one of
    /// them.
    fn root_and_volumes(&self) -> (PathBuf, Vec<String>) {
        let mut volumes = self.made_of.volumes();
        let Some(root) = &self.made_of.root_volume else {
            return (Path::new(ROOTFS.target).join(&self.name), volumes);
        };
        if !volumes.contains(root) {
            volumes.push(root.clone());
        }
        (Path::new(VOLUMES.target).join(root), volumes)
    }

    fn await_init(
        self: &Arc<Self>,
        init: Arc<Process>,
        exit: impl Future<Output = Exit> + Send + 'static,
    ) {
        let container = self.clone();
        tokio::spawn(async move {
            let exit = exit.await;
            container.init_exited(&init, exit);
        });
    }

    fn watch_memory(&self, cgroup: Arc<Cgroup>) -> AbortHandle {
        let (around, container) = (self.around.clone(), self.name.clone());
        let watch = async move {
            let out_of_memory = || {
                let container = container.clone();
                around.events.push(Event::OutOfMemory { container });
            };
            if let Err(error) = cgroup.watch_memory(out_of_memory).await {
                log::warn!(
                    "watch the memory of container {container}: {}",
                    one_line(&error)
                );
            }
        };
        tokio::spawn(watch).abort_handle()
    }

    /// Lets the init run.
    pub async fn start(&self) -> Result<(), Failure> {
        let start = {
            let mut state = self.state();
            match std::mem::replace(&mut state.phase, Phase::Starting) {
                Phase::Created(start) => start,
                other => {
                    let error = self.wrong_state(&other, "created");
                    state.phase = other;
                    return Err(error);
                }
            }
        };
        let started = async {
            self.set_network().await?;
            match start {
                Some(start) => start.start().await,
                None => Ok(()),
            }
        };
        let started = started.await;
        let mut state = self.state();
        // The init may have run and exited meanwhile.
        if matches!(state.phase, Phase::Starting) && started.is_ok() {
            state.phase = Phase::Running;
        }
        if started.is_err() {
            self.kill(&state);
        }
        started
    }

    /// Writes the sysctls of the pod's network, whose interfaces are there by now.
    async fn set_network(&self) -> Result<(), Failure> {
        let (spec, guest) = (&self.made_of.spec, &self.made_of.guest_namespaces);
        let sysctls = spec.linux().as_ref().and_then(|it| it.sysctl().as_ref());
        if sysctls.is_none_or(HashMap::is_empty) {
            return Ok(());
        }
        let joined: Vec<_> = self.joins().iter().map(|(kind, _)| *kind).collect();
        let (spec, guest) = (spec.clone(), guest.clone());
        blocking("set the pod's network", move || {
            runner::apply_to_guest_network(&spec, &joined, &guest)
        })
        .await
    }

    fn init_exited(&self, init: &Process, exit: Exit) {
        let mut state = self.state();
        // A process that shared the PID namespace of others has outlived the init. It ends now.
        self.kill(&state);
        if !matches!(state.phase, Phase::Deleting) {
            state.phase = Phase::Stopped;
        }
        self.tell_exit(&state, String::new(), init, exit);
    }

    /// Publishes the OOM kill before the exit that it caused.
    fn tell_exit(&self, state: &State, exec: String, process: &Process, exit: Exit) {
        let container = self.name.clone();
        if state
            .cgroup
            .as_ref()
            .is_some_and(|cgroup| cgroup.killed_for_memory())
        {
            self.around.events.push(Event::OutOfMemory {
                container: container.clone(),
            });
        }
        self.around.events.push(Event::Exited {
            container,
            exec,
            status: exit.end.status(),
            at: exit.at,
            carried: process.streams().exited(),
        });
        process.set_gone();
    }

    /// Opens a namespace of this container for another one.
    pub async fn namespace(self: &Arc<Self>, kind: LinuxNamespaceType) -> Result<OwnedFd, Failure> {
        if kind == LinuxNamespaceType::Pid {
            self.ensure_first_process().await?;
        }
        let state = self.state();
        if !state.phase.is_alive() {
            return Err(self.wrong_state(&state.phase, "running"));
        }
        let step = format!("join the {kind} namespace of container {}", self.name);
        let mut namespaces = state.namespaces.iter();
        if let Some((_, fd)) = namespaces.find(|namespace| namespace.0 == kind) {
            return fd.try_clone().step(|| step);
        }
        // The mount namespace is not kept: an open one would hold the mounts beyond the container's
        // end.
        match &state.init {
            Some(init) if kind == LinuxNamespaceType::Mount && self.placeholder.is_none() => {
                let opened = open_namespace(init, "mnt");
                opened.ok_or_else(|| self.wrong_state(&Phase::Stopped, "running"))
            }
            _ => Err(JOINED_NAMESPACE.because(
                format_args!("linux.namespaces[{kind}].path"),
                format_args!("container {} has no namespace of this kind", self.name),
            )),
        }
    }

    /// Kills all processes of the container, if it has a cgroup yet.
    fn kill(&self, state: &State) {
        let Some(cgroup) = &state.cgroup else {
            return;
        };
        if let Err(error) = cgroup.kill() {
            log::warn!("kill container {}: {}", self.name, one_line(&error));
        }
    }

    fn process(&self, exec: &str) -> Option<Arc<Process>> {
        let state = self.state();
        match exec {
            "" => state.init.clone(),
            exec => state.execs.get(exec).cloned().flatten(),
        }
    }

    fn cgroup(&self) -> Result<Arc<Cgroup>, Failure> {
        let state = self.state();
        let cgroup = state.cgroup.clone();
        cgroup.ok_or_else(|| self.wrong_state(&state.phase, "created"))
    }

    fn named(&self, exec: &str) -> String {
        match exec {
            "" => self.name.clone(),
            exec => format!("{}/{exec}", self.name),
        }
    }

    fn no_process(&self, exec: &str) -> Failure {
        let text = format!("no running process {}", self.named(exec));
        Failure::new(Kind::NotFound, text)
    }

    fn wrong_state(&self, phase: &Phase, wanted: &'static str) -> Failure {
        Failure::wrong_state(format!("container {}", self.name), phase.name(), wanted)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held, and a panic would end the machine.
        lock(&self.state)
    }
}

/// Opens the namespaces that others may join.
fn shareable_namespaces(init: &Process, spec: &Spec) -> Vec<(LinuxNamespaceType, OwnedFd)> {
    use LinuxNamespaceType::{Cgroup, Ipc, Network, Pid, Time, User, Uts};
    let mut kinds = vec![
        (Cgroup, "cgroup"),
        (Ipc, "ipc"),
        (Uts, "uts"),
        (Pid, "pid"),
        (Network, "net"),
        (Time, "time"),
    ];
    if runner::has_users(spec) {
        kinds.push((User, "user"));
    }
    let open = |(kind, name)| Some((kind, open_namespace(init, name)?));
    kinds.into_iter().filter_map(open).collect()
}

/// Opens a namespace of an init. `None`: the init has exited meanwhile. Its pid may be another
/// process's, and there is nothing to join any more.
fn open_namespace(init: &Process, name: &str) -> Option<OwnedFd> {
    let file = File::open(format!("/proc/{}/ns/{name}", init.pid())).ok()?;
    (!process::exited(init.pidfd())).then(|| file.into())
}

#[cfg(test)]
mod tests;
