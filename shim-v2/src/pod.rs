//! One pod: its sandbox, its containers and their execs, and who waits for whom.
//!
//! Called by `containerd::service`, one method for each of containerd's, and by `serve`, which asks
//! whether anything is left to do. `pod/create`, `pod/start`, `pod/delete` change the pod and
//! `pod/exits` follows what happens in it; this file holds the state and answers questions about
//! it.
//!
//! Words for ends: a process has **exited**, and its exit is **told** once its output was read; a
//! container is **deleted**; a VM has **ended**; a pod whose VM ended under it is **lost**.
//!
//! What must hold:
//! - No lock is held over a wait. What is known is read and changed under it; the guest is asked
//!   without it. So `State`, `Kill` and `Delete` answer whatever another call waits for.
//! - Events leave in containerd's order: a container's creation before all else, a start before its
//!   exit, an init's exit after those of its execs.
//! - A container that is being made is not there yet for anybody but the guest's events.

use std::collections::HashMap;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use kata_like_config::state::NetworkLock;
use tokio::sync::watch;

use crate::stdio::StdioPaths;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use kata_like_proxy::Stats as Figures;

mod bring_up;
pub mod cleanup;
mod container;
pub mod create;
mod delete;
pub mod events;
mod exits;
mod freeze;
mod hooks;
mod host_side;
mod kill;
mod limits;
mod mounts;
mod oom_score;
pub mod process;
mod sandbox;
mod sources;
mod start;
mod stats;
mod uid;
mod update;

use container::{Container, Process};
use events::{Events, TaskEvent};
use process::{Exit, Life, Status};
use sandbox::Sandbox;

/// How long a call may wait for the guest where it must answer within a second.
const AT_ONCE: Duration = Duration::from_millis(900);
/// SIGKILL.
const KILL: u32 = 9;
/// The exit status of what was killed.
const KILLED: u32 = 137;

/// An exec to be known.
#[derive(Debug)]
pub struct ExecRegistration {
    pub container: String,
    pub exec: String,
    /// The OCI `process` object as JSON.
    pub process: Vec<u8>,
    pub stdio: StdioPaths,
}

/// What `State` tells.
#[derive(Debug)]
pub struct ProcessState {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// The host pid, or 0.
    pub pid: u32,
    /// Where it is.
    pub status: Status,
    pub stdio: StdioPaths,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// A process of a task, as the host sees it.
#[derive(Debug)]
pub struct TaskProcess {
    /// The host pid.
    pub pid: u32,
    /// The exec; empty: the container's init.
    pub exec: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Making,
    /// Being made, but nobody wants it any more.
    Abandoned,
    Made,
    Deleting,
}

#[derive(Debug)]
struct Entry {
    container: Arc<Container>,
    phase: Phase,
}

#[derive(Debug, Default)]
enum Slot {
    #[default]
    Empty,
    /// Being made, or taken down.
    Changing,
    Up(Arc<Sandbox>),
}

#[derive(Debug, Default)]
struct State {
    sandbox: Slot,
    /// Why the sandbox is gone while containers are left.
    lost: Option<String>,
    containers: HashMap<String, Entry>,
    /// containerd has asked for the end while containers were left.
    shutdown: bool,
}

/// The pod that this process serves.
#[derive(Debug)]
pub struct Pod {
    namespace: String,
    id: String,
    events: Events,
    /// The mount namespace of containerd, where hooks run.
    host_mounts: Option<Arc<OwnedFd>>,
    /// The pod's network namespace, if it was known before there is a sandbox, until there is one.
    network: Mutex<Option<NetworkLock>>,
    state: Mutex<State>,
    /// Told when the sandbox's slot is not changing any more.
    settled: watch::Sender<()>,
    done: watch::Sender<bool>,
}

impl Pod {
    /// A pod without a sandbox, which comes with its first container. Hooks run in the mount
    /// namespace `host_mounts`; none: the shim's own. `network` is its network namespace, if that
    /// is known.
    pub fn new(
        namespace: &str,
        id: &str,
        events: Events,
        host_mounts: Option<OwnedFd>,
        network: Option<NetworkLock>,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            events,
            host_mounts: host_mounts.map(Arc::new),
            network: Mutex::new(network),
            state: Mutex::default(),
            settled: watch::Sender::new(()),
            done: watch::Sender::new(false),
        })
    }

    /// Whether there is neither a container nor a sandbox that is being made or taken down.
    pub fn is_idle(&self) -> bool {
        let state = self.state();
        state.containers.is_empty() && !matches!(state.sandbox, Slot::Changing)
    }

    /// Waits until containerd has no more use for the pod.
    pub async fn done(&self) {
        // The sender lives in `self`: the wait can't fail.
        let _ = self.done.subscribe().wait_for(|done| *done).await;
    }

    /// A process's state.
    pub fn process_state(&self, id: &str, exec: &str) -> Result<ProcessState, Failure> {
        let (container, process) = self.find(id, exec)?;
        let status = container.status_of(&process);
        let life = process.life();
        Ok(ProcessState {
            bundle: container.bundle.clone(),
            pid: life.pid(),
            status,
            stdio: process.paths.clone(),
            exit: life.exit(),
        })
    }

    /// Waits for a process's exit.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<Exit, Failure> {
        let (_, process) = self.find(id, exec)?;
        let mut exit = process.exit.subscribe();
        let exit = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit);
        exit.ok_or_else(|| not_found(id, exec))
    }

    /// The host pid of a container's init; 0 if there is none.
    pub fn init_pid(&self, id: &str) -> u32 {
        self.find(id, "")
            .map_or(0, |(container, _)| container.init.life().pid())
    }

    /// The processes of a container that the host knows: its init, which is named until it is
    /// deleted, and its running execs.
    pub fn pids(&self, id: &str) -> Result<Vec<TaskProcess>, Failure> {
        let (container, _) = self.find(id, "")?;
        let init = TaskProcess {
            pid: container.init.life().pid(),
            exec: String::new(),
        };
        let execs = container.execs().into_iter().filter_map(|process| {
            let life = process.life();
            (life.status() == Status::Running).then(|| TaskProcess {
                pid: life.pid(),
                exec: process.exec.clone(),
            })
        });
        Ok(std::iter::once(init).chain(execs).collect())
    }

    /// A container's stats, until it is deleted: those of now, or the last ones.
    pub async fn stats(&self, id: &str) -> Result<Arc<Figures>, Failure> {
        let (container, _) = self.find(id, "")?;
        let agent = container.sandbox()?.guest.agent.clone();
        let late = |why| {
            let text = format!("read the stats of container {id}: {why}");
            Failure::new(Kind::DeadlineExceeded, text)
        };
        if agent.is_stuck() {
            return Err(late("the guest has shown no progress"));
        }
        let asked = id.to_owned();
        let ask = || async move { agent.stats(&asked).await };
        let answer = container.stats.within(AT_ONCE, ask).await;
        answer.unwrap_or_else(|| Err(late("the guest does not answer, and there are none yet")))
    }

    /// Makes an exec known; it has no process before its start.
    pub fn register_exec(&self, exec: ExecRegistration) -> Result<(), Failure> {
        let (container, init) = self.find(&exec.container, "")?;
        check_name("exec", &exec.exec)?;
        if init.life().has_exited() {
            return Err(Failure::new(
                Kind::Failed,
                "cannot exec in a stopped state".to_owned(),
            ));
        }
        if let Some(word) = container.freeze().word() {
            return Err(Failure::new(
                Kind::Failed,
                format!("cannot exec in a {word} state"),
            ));
        }
        let process = Process::new(
            &exec.container,
            &exec.exec,
            exec.stdio,
            exec.process,
            Life::registered(),
        );
        {
            let mut execs = lock(&container.execs);
            if execs.contains_key(&exec.exec) {
                return Err(Failure::new(
                    Kind::AlreadyExists,
                    format!(
                        "exec {:?} of container {:?} exists already",
                        exec.exec, exec.container
                    ),
                ));
            }
            execs.insert(exec.exec.clone(), Arc::new(process));
        }
        self.events.publish(TaskEvent::ExecAdded {
            container: exec.container,
            exec: exec.exec,
        });
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(
        self: Arc<Self>,
        id: String,
        exec: String,
        width: u32,
        height: u32,
    ) -> Result<(), Failure> {
        let (container, process) = self.find(&id, &exec)?;
        if !process.paths.terminal {
            return Ok(());
        }
        {
            let life = process.life();
            if life.has_exited() {
                return Err(Failure::new(
                    Kind::Failed,
                    "cannot resize a stopped container".to_owned(),
                ));
            }
            *lock(&process.size) = (width, height);
            if !exec.is_empty() && life.status() == Status::Created {
                return Ok(());
            }
        }
        let agent = &container.sandbox()?.guest.agent;
        agent.resize(&id, &exec, width, height).await
    }

    /// Closes our own end of a process's stdin: it ends when the client's end closes too.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Failure> {
        let (_, process) = self.find(id, exec)?;
        process.stdin_closed.store(true, Ordering::SeqCst);
        if let Some(stdio) = process.stdio.get() {
            stdio.close_stdin();
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A process that clients may know of.
    fn find(&self, id: &str, exec: &str) -> Result<(Arc<Container>, Arc<Process>), Failure> {
        let container = match self.state().containers.get(id) {
            Some(entry) if matches!(entry.phase, Phase::Made | Phase::Deleting) => {
                Arc::clone(&entry.container)
            }
            _ => return Err(not_found(id, "")),
        };
        let process = container.process(exec).ok_or_else(|| not_found(id, exec))?;
        Ok((container, process))
    }
}

fn not_found(id: &str, exec: &str) -> Failure {
    Failure::new(
        Kind::NotFound,
        if exec.is_empty() {
            format!("container {id:?} not created")
        } else {
            format!("exec {exec:?} of container {id:?} does not exist")
        },
    )
}

fn finished() -> Failure {
    Failure::new(Kind::NotFound, "process already finished".to_owned())
}

fn check_name(what: &str, name: &str) -> Result<(), Failure> {
    if kata_like_agent_protocol::is_name(name) {
        return Ok(());
    }
    Err(Failure::new(
        Kind::BadRequest,
        format!(
            "{what} {name:?}: a name is 1 to {} letters, digits, '.', '_' and '-', and begins with a letter or a digit",
            kata_like_agent_protocol::MAX_NAME
        ),
    ))
}

/// Starts the work and waits for it, but not for long: it goes on by itself.
async fn at_once<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Option<T> {
    match tokio::time::timeout(AT_ONCE, tokio::spawn(work)).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(_)) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests;
