//! Makes containers, and with the first one the pod's sandbox.
//!
//! A creation that fails, or that nobody wants any more when it is done, leaves nothing.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt as _;

use super::bring_up::{self, First};
use super::container::{Container, Process};
use super::events::TaskEvent;
use super::host_side;
use super::process::Life;
use super::sandbox::Sandbox;
use super::{Entry, Phase, Pod, Slot, check_name};
use crate::bundle::{Membership, Role};
use crate::share::RootfsMount;
use crate::spec::Owners;
use crate::stdio::{Stdio, StdioPaths};
use crate::vm::agent::{StreamTokens, new_token};
use crate::vm::guest::Guest;
use kata_like_failure::{Failure, Kind, one_line};
use kata_like_linux::lock;

/// How long a container that joins waits for the one that the shim was started for, where both
/// start at once.
const OWN_CONTAINER: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// A container to be made.
#[derive(Debug)]
pub struct CreateRequest {
    pub id: String,
    pub bundle: PathBuf,
    /// Its root file system's mounts.
    pub rootfs: Vec<RootfsMount>,
    /// Its init's streams.
    pub stdio: StdioPaths,
    /// The configuration file that the runtime's options name.
    pub config_path: Option<PathBuf>,
}

impl Pod {
    /// Makes a container; answers its init's host pid.
    pub async fn create(self: Arc<Self>, request: CreateRequest) -> Result<u32, Failure> {
        check_name("container", &request.id)?;
        let role = Membership::read(&request.bundle, &request.id)?.role;
        let container = self.reserve(&request, role)?;
        let made = self.make(&container, &request).await;
        let pid = match made {
            Ok(pid) => pid,
            Err(error) => {
                let reason = one_line(&error);
                tracing::error!(container = request.id, reason, "container not created");
                self.undo(&container).await;
                return Err(error);
            }
        };
        if !self.enter(&container, pid) {
            self.undo(&container).await;
            return Err(Failure::new(
                Kind::Failed,
                format!(
                    "create container {:?}: it was deleted meanwhile",
                    request.id
                ),
            ));
        }
        let held = container.init.life().created(pid);
        if let Some(news) = held {
            self.tell_later(&container, &container.init, news);
        }
        tracing::info!(container = request.id, pid, "container created");
        Ok(pid)
    }

    /// Takes the name.
    fn reserve(&self, request: &CreateRequest, role: Role) -> Result<Arc<Container>, Failure> {
        let (id, paths) = (&request.id, request.stdio.clone());
        let init = Process::new(id, "", paths, Vec::new(), Life::creating());
        let (bundle, rootfs) = (request.bundle.clone(), request.rootfs.clone());
        let container = Arc::new(Container::new(id, bundle, rootfs, role, init));
        let mut state = self.state();
        if state.containers.contains_key(&request.id) {
            return Err(Failure::new(
                Kind::AlreadyExists,
                format!("container {:?} exists already", request.id),
            ));
        }
        let entry = Entry {
            container: Arc::clone(&container),
            phase: Phase::Making,
        };
        state.containers.insert(request.id.clone(), entry);
        Ok(container)
    }

    async fn make(
        self: &Arc<Self>,
        container: &Arc<Container>,
        request: &CreateRequest,
    ) -> Result<u32, Failure> {
        let process = &container.init;
        let stdio = Stdio::open(&request.stdio, &self.namespace, &request.id).await?;
        let streams = tokens(&stdio, process)?;
        let _ = process.stdio.set(stdio);
        let (sandbox, first) = self.sandbox_for(container, request).await?;
        let _ = container.sandbox.set(Arc::clone(&sandbox));
        let made_from = host_side::Request {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            placeholder: container.role == Role::CriSandbox,
            streams: streams.clone(),
        };
        let owners = self.owners();
        let host_side = &container.host_side;
        let pid = host_side::make(host_side, &sandbox, made_from, first, &owners).await?;
        let stand_in = host_side.place()?.stand_in.clone();
        self.watch_stand_in(container, process, stand_in);
        attach(&sandbox.guest, process, streams).await?;
        Ok(pid)
    }

    /// Whose the namespaces are that a spec may name: a stand-in's pid is its container's, and a
    /// pinned one is that of the container which has one in its place.
    fn owners(&self) -> Owners {
        let mut owners = Owners::default();
        for entry in self.state().containers.values() {
            let (id, host_side) = (&entry.container.id, &entry.container.host_side);
            let Ok(place) = host_side.place() else {
                continue;
            };
            owners.tasks.insert(place.stand_in.pid, id.clone());
            let pinned = host_side.pinned().iter();
            owners
                .pinned
                .extend(pinned.map(|pinned| (pinned.clone(), id.clone())));
        }
        owners
    }

    /// The pod's sandbox, made if this is its first container, which then gets what it was made
    /// with. One that is being made is waited for, and the end of one that is taken down.
    async fn sandbox_for(
        self: &Arc<Self>,
        container: &Container,
        request: &CreateRequest,
    ) -> Result<(Arc<Sandbox>, Option<First>), Failure> {
        let begin = Instant::now();
        loop {
            let settled = {
                let mut state = self.state();
                if let Some(reason) = &state.lost {
                    return Err(Failure::new(
                        Kind::Failed,
                        format!(
                            "create container {:?}: sandbox {:?} has ended: {reason}",
                            request.id, self.id
                        ),
                    ));
                }
                match &state.sandbox {
                    Slot::Up(sandbox) => return Ok((Arc::clone(sandbox), None)),
                    Slot::Changing => Some(self.settled.subscribe()),
                    // The VM, the cgroup and the stand-in are made by what its own container asks
                    // for.
                    Slot::Empty
                        if request.id != self.id
                            && lock(&self.network).is_some()
                            && begin.elapsed() < OWN_CONTAINER =>
                    {
                        None
                    }
                    Slot::Empty if container.role == Role::CriContainer => {
                        return Err(Failure::new(
                            Kind::WrongState,
                            format!(
                                "create container {:?}: its pod's sandbox is not running",
                                request.id
                            ),
                        ));
                    }
                    Slot::Empty => {
                        state.sandbox = Slot::Changing;
                        break;
                    }
                }
            };
            match settled {
                // The sender lives in `self`: the wait can't fail. It ends when the boot or
                // tear-down in progress ends; both run detached, and each of their steps has a
                // deadline.
                Some(mut settled) => drop(settled.changed().await),
                None => tokio::time::sleep(POLL).await,
            }
        }
        self.bring_up(container, request).await
    }

    /// Makes the sandbox for its first container. The slot is `Changing` before and settled after.
    async fn bring_up(
        self: &Arc<Self>,
        container: &Container,
        request: &CreateRequest,
    ) -> Result<(Arc<Sandbox>, Option<First>), Failure> {
        let network = lock(&self.network).take();
        let work = bring_up::start(bring_up::Request {
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            first: request.id.clone(),
            placeholder: container.role == Role::CriSandbox,
            bundle: request.bundle.clone(),
            config_path: request.config_path.clone(),
            host_mounts: self.host_mounts.clone(),
            network,
        });
        // A panic must not leave the slot `Changing`: every later creation would wait for ever.
        let started = AssertUnwindSafe(work).catch_unwind().await;
        let started = started.unwrap_or_else(|_| {
            let what = format!("start sandbox {:?}: a step panicked", self.id);
            Err(Failure::new(Kind::Failed, what))
        });
        let mut state = self.state();
        self.settled.send_replace(());
        match started {
            Ok((sandbox, happened, first)) => {
                state.sandbox = Slot::Up(Arc::clone(&sandbox));
                drop(state);
                tokio::spawn(Arc::clone(self).follow(Arc::downgrade(&sandbox), happened));
                Ok((sandbox, Some(first)))
            }
            Err(error) => {
                state.sandbox = Slot::Empty;
                Err(error)
            }
        }
    }

    /// From here on clients find the container, unless it was given up.
    fn enter(&self, container: &Container, pid: u32) -> bool {
        let mut state = self.state();
        match state.containers.get_mut(&container.id) {
            Some(entry) if entry.phase == Phase::Making => entry.phase = Phase::Made,
            _ => return false,
        }
        // Under the lock: a caller that finds the container comes after its event.
        self.events.publish(TaskEvent::Created {
            container: container.id.clone(),
            bundle: container.bundle.display().to_string(),
            rootfs: container.rootfs.clone(),
            stdio: container.init.paths.clone(),
            pid,
        });
        true
    }

    /// Takes back whatever of a container has been made.
    async fn undo(self: &Arc<Self>, container: &Container) {
        let last = {
            let mut state = self.state();
            if let Some(entry) = state.containers.get_mut(&container.id) {
                entry.phase = Phase::Abandoned;
            }
            if state.containers.len() == 1 {
                self.take_sandbox(&mut state)
            } else {
                None
            }
        };
        container.end_host_side().await;
        if let Some(sandbox) = last {
            self.take_down(&sandbox).await;
        }
        if let Some(stdio) = container.init.stdio.get() {
            stdio.close(std::time::Duration::ZERO).await;
        }
        self.forget(&container.id);
    }
}

/// Random tokens for the streams that somebody wants.
pub(super) fn tokens(stdio: &Stdio, process: &Process) -> Result<StreamTokens, Failure> {
    let token = |wanted: bool| {
        let token = wanted.then(new_token).transpose();
        token.map_err(|error| Failure::new(Kind::Failed, format!("read /dev/urandom: {error}")))
    };
    let (width, height) = *lock(&process.size);
    Ok(StreamTokens {
        stdin: token(stdio.has_stdin())?,
        stdout: token(stdio.has_stdout())?,
        stderr: token(stdio.has_stderr())?,
        terminal: process.paths.terminal,
        width,
        height,
    })
}

/// Joins the guest's streams to containerd's.
pub(super) async fn attach(
    guest: &Guest,
    process: &Process,
    streams: StreamTokens,
) -> Result<(), Failure> {
    let open = async |token: Option<[u8; 16]>| match token {
        Some(token) => guest.open_stream(token).await.map(Some),
        None => Ok(None),
    };
    let (stdin, stdout, stderr) = tokio::try_join!(
        open(streams.stdin),
        open(streams.stdout),
        open(streams.stderr)
    )?;
    if let Some(stdio) = process.stdio.get() {
        stdio.attach(stdin, stdout, stderr);
        if process
            .stdin_closed
            .load(std::sync::atomic::Ordering::SeqCst)
        {
            stdio.close_stdin();
        }
    }
    Ok(())
}
