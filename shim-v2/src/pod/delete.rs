//! Takes containers and execs away, and with the last container the sandbox.
//!
//! A CRI pod's sandbox container takes the sandbox with it whatever else is left: CNI tears the
//! network down as soon as its deletion has been answered. Other pods end with their last
//! container.

use kata_like_failure::{Failure, Kind};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kata_like_linux::lock;
use tokio::sync::watch;

use super::container::Container;
use super::events::TaskEvent;
use super::process::{Exit, Exited, Status};
use super::sandbox::Sandbox;
use super::{KILL, KILLED, Phase, Pod, Slot, State, at_once, not_found};
use crate::bundle::Role;
use crate::steps::point;

/// How long a deletion waits for output that is under way.
const STREAMS_PATIENCE: Duration = Duration::from_millis(400);
/// How long the shim stays for containerd's own `Shutdown` after the last container.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(3);
/// How long taking everything down may last when the shim is told to end: less than systemd waits
/// for a process that it has told so (DefaultTimeoutStopSec).
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// What a deletion tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// The host pid that it had.
    pub pid: u32,
    /// How and when it ended.
    pub exit: Exit,
}

/// Whose a deletion is.
enum Deletion {
    Ours(Arc<Container>),
    /// Another call's, which tells when it has ended.
    UnderWay(watch::Receiver<()>),
}

impl Pod {
    /// Takes a container (`exec` is empty) or an exec away.
    pub async fn delete(self: Arc<Self>, id: String, exec: String) -> Result<Deleted, Failure> {
        if exec.is_empty() {
            self.delete_container(&id).await
        } else {
            self.delete_exec(&id, &exec).await
        }
    }

    async fn delete_exec(&self, id: &str, exec: &str) -> Result<Deleted, Failure> {
        let (container, process) = self.find(id, exec)?;
        let deleted = {
            let life = process.life();
            if life.is_under_way() {
                return Err(running(None));
            }
            Deleted {
                pid: life.pid(),
                exit: life.exit().unwrap_or(Exit::of_nothing()),
            }
        };
        if let Some(stdio) = process.stdio.get() {
            stdio.close(STREAMS_PATIENCE).await;
        }
        container.end_stand_in(&process).await;
        match lock(&container.execs).remove(exec) {
            Some(_) => Ok(deleted),
            None => Err(not_found(id, exec)),
        }
    }

    async fn delete_container(self: &Arc<Self>, id: &str) -> Result<Deleted, Failure> {
        point("before", "delete").await?;
        let container = loop {
            match self.begin_delete(id)? {
                Deletion::Ours(container) => break container,
                // A caller that lost its patience asks again. The answer is that it is deleted,
                // once it is.
                Deletion::UnderWay(mut ended) => {
                    let _ = ended.changed().await;
                }
            }
        };
        if container.init.life().exit().is_none() {
            self.kill_created(&container).await;
        }
        let execs = container.execs();
        let closes = execs
            .iter()
            .chain([&container.init])
            .filter_map(|process| process.stdio.get())
            .map(|stdio| stdio.close(STREAMS_PATIENCE));
        futures::future::join_all(closes).await;

        if let Some((sandbox, others)) = self.ends_with(&container) {
            // The guest is told first, so that it writes back what it holds of the root file
            // system.
            self.take_down(&sandbox).await;
            self.lose_tasks(&others);
        }
        container.end_host_side().await;
        let _ = point("after", "delete").await; // all is gone: no failure leads back
        let (pid, exit) = {
            let life = container.init.life();
            (life.pid(), life.exit())
        };
        let exit = exit.unwrap_or(Exit {
            status: KILLED,
            at: SystemTime::now(),
        });
        self.events.publish(TaskEvent::Deleted {
            container: id.to_owned(),
            pid,
            exit,
        });
        self.forget(id);
        tracing::info!(container = id, "container deleted");
        Ok(Deleted { pid, exit })
    }

    /// From here on the deletion is ours, or it is somebody's already.
    fn begin_delete(&self, id: &str) -> Result<Deletion, Failure> {
        let mut state = self.state();
        let Some(entry) = state.containers.get_mut(id) else {
            return Err(not_found(id, ""));
        };
        match entry.phase {
            Phase::Made => {}
            Phase::Making => {
                // containerd has given the creation up. It goes on and is then undone.
                entry.phase = Phase::Abandoned;
                return Err(not_found(id, ""));
            }
            Phase::Abandoned => return Err(not_found(id, "")),
            Phase::Deleting => return Ok(Deletion::UnderWay(entry.container.deleted.subscribe())),
        }
        let container = Arc::clone(&entry.container);
        {
            let life = container.init.life();
            if life.status() != Status::Stopped && life.is_under_way() {
                return Err(running(
                    container.freeze().word().filter(|_| !life.has_exited()),
                ));
            }
        }
        entry.phase = Phase::Deleting;
        Ok(Deletion::Ours(container))
    }

    /// Kills an init that was never started. Its exit is told like any other.
    async fn kill_created(self: &Arc<Self>, container: &Arc<Container>) {
        if let Ok(sandbox) = container.sandbox() {
            let (sandbox, id) = (Arc::clone(sandbox), container.id.clone());
            at_once(async move {
                let _ = sandbox.guest.agent.signal(&id, "", KILL, true).await;
            })
            .await;
        }
        let news = Exited {
            exit: Exit {
                status: KILLED,
                at: SystemTime::now(),
            },
            stdout_bytes: 0,
            stderr_bytes: 0,
            lost: true,
        };
        let now = container.init.life().exited(news);
        if let Some(news) = now {
            self.tell(container, &container.init, news).await;
        } else {
            // The guest's own news came first, and is being told.
            let mut exit = container.init.exit.subscribe();
            let told = exit.wait_for(Option::is_some);
            let _ = tokio::time::timeout(STREAMS_PATIENCE, told).await;
        }
    }

    /// The sandbox, if it is to end with this container, and the other containers in it.
    fn ends_with(&self, container: &Container) -> Option<(Arc<Sandbox>, Vec<Arc<Container>>)> {
        let mut state = self.state();
        if container.role != Role::CriSandbox && state.containers.len() > 1 {
            return None;
        }
        let others = state
            .containers
            .values()
            .filter(|entry| entry.container.id != container.id)
            .map(|entry| Arc::clone(&entry.container))
            .collect();
        Some((self.take_sandbox(&mut state)?, others))
    }

    /// The sandbox leaves the pod. The caller takes it down.
    pub(super) fn take_sandbox(&self, state: &mut State) -> Option<Arc<Sandbox>> {
        match std::mem::replace(&mut state.sandbox, Slot::Changing) {
            Slot::Up(sandbox) => {
                state.lost = None;
                Some(sandbox)
            }
            other => {
                state.sandbox = other;
                None
            }
        }
    }

    /// Takes down a sandbox that has left the pod. The next container gets a new one.
    pub(super) async fn take_down(&self, sandbox: &Arc<Sandbox>) {
        self.stop_sandbox(sandbox).await;
        self.state().sandbox = Slot::Empty;
        self.settled.send_replace(());
    }

    /// Ends a sandbox: its guest, then what its containers have on the host, then what is its own.
    /// Can be called again.
    pub(super) async fn stop_sandbox(&self, sandbox: &Arc<Sandbox>) {
        let _one = sandbox.stopping.lock().await;
        sandbox.end_guest().await;
        let containers: Vec<_> = {
            let state = self.state();
            let entries = state.containers.values();
            entries.map(|entry| Arc::clone(&entry.container)).collect()
        };
        for container in containers {
            let own = container.sandbox.get();
            if own.is_some_and(|own| Arc::ptr_eq(own, sandbox)) {
                container.end_host_side().await;
            }
        }
        sandbox.remove().await;
    }

    /// The container's name is free. After the last one a remembered end comes true.
    pub(super) fn forget(self: &Arc<Self>, id: &str) {
        let ending = {
            let mut state = self.state();
            if let Some(entry) = state.containers.remove(id) {
                entry.container.deleted.send_replace(());
            }
            state.shutdown && state.containers.is_empty()
        };
        if ending {
            let pod = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep(SHUTDOWN_GRACE).await;
                if pod.is_idle() {
                    pod.done.send_replace(true);
                }
            });
        }
    }

    /// containerd has no more use for the pod; remembered while a container is left.
    pub fn shutdown(&self) {
        let idle = {
            let mut state = self.state();
            state.shutdown = true;
            state.containers.is_empty()
        };
        if idle {
            self.done.send_replace(true);
        }
    }

    /// The shim has to end: whatever is left is taken down.
    pub async fn stop(self: &Arc<Self>) {
        let (sandbox, containers): (_, Vec<_>) = {
            let mut state = self.state();
            let containers = state
                .containers
                .values()
                .map(|entry| Arc::clone(&entry.container))
                .collect();
            (self.take_sandbox(&mut state), containers)
        };
        self.lose_tasks(&containers);
        let Some(sandbox) = sandbox else {
            return;
        };
        let down = async {
            self.take_down(&sandbox).await;
            for container in &containers {
                container.end_host_side().await;
            }
        };
        if tokio::time::timeout(STOP_DEADLINE, down).await.is_err() {
            tracing::error!(
                sandbox = self.id,
                "the sandbox was not down after {STOP_DEADLINE:?}"
            );
        }
    }
}

/// `frozen` is the word for a container that stands still.
fn running(frozen: Option<&str>) -> Failure {
    let word = frozen.unwrap_or("running");
    Failure::new(Kind::Failed, format!("cannot delete a {word} process"))
}
