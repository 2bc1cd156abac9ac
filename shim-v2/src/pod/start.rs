//! Starts what was made: a container's init, or an exec.

use std::sync::Arc;

use super::container::{Container, Process};
use super::create::{attach, tokens};
use super::events::TaskEvent;
use super::host_side::start_stand_in;
use super::process::{Exit, Refusal};
use super::sandbox::Sandbox;
use super::{KILL, Pod};
use crate::spawn::Child;
use crate::spec;
use crate::stdio::Stdio;
use crate::steps::{blocking, point};
use crate::vm::agent::StreamTokens;
use kata_like_failure::{Failure, Kind, one_line};
use kata_like_linux::lock;

impl Pod {
    /// Starts an init (`exec` is empty) or an exec; answers its host pid.
    pub async fn start(self: Arc<Self>, id: String, exec: String) -> Result<u32, Failure> {
        let (container, process) = self.find(&id, &exec)?;
        if !process.is_init() && container.init.life().has_exited() {
            return Err(Failure::new(
                Kind::WrongState,
                format!("cannot start exec {exec:?}: container {id:?} has stopped"),
            ));
        }
        let frozen = container.freeze().word();
        if let (Some(word), false) = (frozen, process.is_init()) {
            return Err(Failure::new(
                Kind::Failed,
                format!("cannot exec in a {word} container"),
            ));
        }
        process.life().begin_start().map_err(|refusal| {
            Failure::new(
                Kind::Failed,
                match (refusal, frozen) {
                    (Refusal::Started, None) => "cannot start a running process".to_owned(),
                    (Refusal::Started, Some(word)) => format!("cannot start a {word} process"),
                    (Refusal::Stopped, _) => "cannot start a stopped process".to_owned(),
                    (Refusal::Failed, _) => {
                        format!("cannot start exec {exec:?}: its start has failed before")
                    }
                },
            )
        })?;
        if process.is_init() {
            self.start_init(&container).await
        } else {
            self.start_exec(&container, &process).await
        }
    }

    async fn start_init(self: &Arc<Self>, container: &Arc<Container>) -> Result<u32, Failure> {
        let init = &container.init;
        let started = match container.sandbox() {
            Ok(sandbox) => run_init(sandbox, container).await,
            Err(error) => Err(error),
        };
        let pid = init.life().pid();
        let held = match &started {
            Ok(()) => {
                self.events.publish(TaskEvent::Started {
                    container: container.id.clone(),
                    pid,
                });
                init.life().started(pid)
            }
            Err(error) => {
                let reason = one_line(error);
                tracing::error!(container = container.id, reason, "container not started");
                init.life().start_failed()
            }
        };
        if let Some(news) = held {
            self.tell_later(container, init, news);
        }
        started.map(|()| pid)
    }

    async fn start_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<u32, Failure> {
        match self.run_exec(container, process).await {
            Ok(pid) => {
                self.events.publish(TaskEvent::ExecStarted {
                    container: container.id.clone(),
                    exec: process.exec.clone(),
                    pid,
                });
                let held = process.life().started(pid);
                if let Some(news) = held {
                    self.tell_later(container, process, news);
                }
                Ok(pid)
            }
            Err(error) => {
                process.life().never_ran();
                process.exit.send_replace(Some(Exit::of_nothing()));
                if let Some(stdio) = process.stdio.get() {
                    stdio.close(std::time::Duration::ZERO).await;
                }
                Err(error)
            }
        }
    }

    async fn run_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<u32, Failure> {
        let sandbox = container.sandbox()?;
        let stdio = Stdio::open(&process.paths, &self.namespace, &container.id).await?;
        let streams = tokens(&stdio, process)?;
        let _ = process.stdio.set(stdio);
        let spec = spec::guest_process(&process.spec)?;
        // The process's exit can be told before the guest's answer: its stand-in is there before
        // both.
        let stand_in = born(sandbox, container, process).await?;
        let pid = stand_in.pid;
        let started = exec(sandbox, container, process, spec, streams).await;
        if let Err(error) = started {
            container.end_stand_in(process).await;
            return Err(error);
        }
        self.watch_stand_in(container, process, stand_in);
        Ok(pid)
    }

    /// Watches a stand-in. If it ends and we have not ended it, somebody has killed it: then its
    /// task is killed too.
    pub(super) fn watch_stand_in(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        stand_in: Child,
    ) {
        let pod = Arc::clone(self);
        let (container, process) = (Arc::downgrade(container), Arc::downgrade(process));
        tokio::spawn(async move {
            let exit = stand_in.exited().await;
            let (Some(container), Some(process)) = (container.upgrade(), process.upgrade()) else {
                return;
            };
            let Ok(sandbox) = container.sandbox() else {
                return;
            };
            let ended_by_us = container.host_side.has_ended()
                || (!process.is_init() && lock(&process.stand_in).is_none());
            if ended_by_us || sandbox.guest.is_ending() {
                return;
            }
            let (id, exec) = (&container.id, &process.exec);
            tracing::warn!(
                container = id,
                exec,
                "the task's stand-in {exit}: its task is killed too"
            );
            let all = process.is_init();
            let killed = pod.signal(sandbox, &container, &process, KILL, all);
            if let Err(error) = killed.await {
                let error = error.one_line();
                tracing::warn!(
                    container = id,
                    exec,
                    error,
                    "kill a task whose stand-in was killed"
                );
            }
        });
    }
}

/// Lets a created container run, and runs its hooks for that moment: if one fails, the container is
/// killed. The first one to start finds the pod's network as it is then.
async fn run_init(sandbox: &Arc<Sandbox>, container: &Container) -> Result<(), Failure> {
    let (guest, id) = (&sandbox.guest, container.id.as_str());
    point("before", "start").await?;
    sandbox.network.join(guest).await?;
    let place = container.host_side.place()?;
    sandbox
        .network
        .serve_names(guest, id, &place.resolv_conf)
        .await;
    point("before", "start in the guest").await?;
    guest.agent.start_container(id).await?;
    let _ = point("after", "start in the guest").await; // it runs: no failure leads back
    if let Err(error) = place.hooks.after_start(place.stand_in.pid).await {
        if let Err(error) = guest.agent.signal(id, "", KILL, true).await {
            tracing::warn!("{}", error.one_line());
        }
        return Err(error.during(format!("start container {id}")));
    }
    if tracing::enabled!(tracing::Level::DEBUG) {
        guest.vmm.log_figures("the start of a container").await;
    }
    Ok(())
}

/// Gives an exec its stand-in.
async fn born(
    sandbox: &Arc<Sandbox>,
    container: &Container,
    process: &Process,
) -> Result<Child, Failure> {
    let (task, oom_score) = (container.id.clone(), sandbox.oom_score.now());
    let (shared, cgroup) = (
        Arc::clone(sandbox),
        Arc::clone(&container.host_side.place()?.cgroup),
    );
    let stand_in = blocking(move || {
        start_stand_in(&shared, &task, &cgroup, oom_score)
            .map_err(|cause| Failure::failed(format!("exec in container {task}"), cause))
    });
    let stand_in = stand_in.await?;
    let child = stand_in.child().clone();
    *lock(&process.stand_in) = Some(stand_in);
    sandbox.ledger.add(&container.id, child.pid, &[]);
    sandbox.oom_score.catch_up(oom_score);
    if container.host_side.has_ended() {
        container.end_stand_in(process).await;
        sandbox.ledger.remove(&container.id);
        return Err(Failure::new(
            Kind::NotFound,
            format!("container {} was deleted meanwhile", container.id),
        ));
    }
    Ok(child)
}

/// Runs an exec in the guest and joins its streams.
async fn exec(
    sandbox: &Sandbox,
    container: &Container,
    process: &Process,
    spec: Vec<u8>,
    streams: StreamTokens,
) -> Result<(), Failure> {
    let (agent, id) = (&sandbox.guest.agent, container.id.as_str());
    agent.exec(id, &process.exec, spec, &streams).await?;
    let attached = attach(&sandbox.guest, process, streams).await;
    if attached.is_err() {
        let _ = agent.signal(id, &process.exec, KILL, false).await;
    }
    attached
}
