//! Starts what was made: a container's init, or an exec.

use std::sync::Arc;

use super::create::{attach, tokens};
use super::{Container, KILL, Pod, Process};
use crate::containerd::publish::TaskEvent;
use crate::pod::process::{Exit, Refusal};
use crate::stdio::Stdio;
use crate::vm::ExecRequest;
use kata_like_failure::{Failure, Kind, one_line};

impl Pod {
    /// Starts an init (`exec` is empty) or an exec; answers its host pid.
    pub async fn start(self: Arc<Self>, id: String, exec: String) -> Result<u32, Failure> {
        let (container, process) = self.find(&id, &exec)?;
        if !process.is_init() && container.init.life().is_gone() {
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
            Ok(sandbox) => sandbox.start_container(&container.id).await,
            Err(error) => Err(error),
        };
        let pid = init.life().pid();
        let held = match &started {
            Ok(()) => {
                self.publisher.publish(TaskEvent::Started {
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
        if let Some(gone) = held {
            self.finish_later(container, init, gone);
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
                self.publisher.publish(TaskEvent::ExecStarted {
                    container: container.id.clone(),
                    exec: process.exec.clone(),
                    pid,
                });
                let held = process.life().started(pid);
                if let Some(gone) = held {
                    self.finish_later(container, process, gone);
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

    async fn run_exec(&self, container: &Container, process: &Process) -> Result<u32, Failure> {
        let sandbox = container.sandbox()?;
        let stdio = Stdio::open(&process.paths, &self.namespace, &container.id).await?;
        let streams = tokens(&stdio, process)?;
        let _ = process.stdio.set(stdio);
        let pid = sandbox
            .exec(ExecRequest {
                container: container.id.clone(),
                exec: process.exec.clone(),
                process: process.spec.clone(),
                streams: streams.clone(),
            })
            .await?;
        if let Err(error) = attach(sandbox, process, streams).await {
            let _ = sandbox
                .signal(&container.id, &process.exec, KILL, false)
                .await;
            sandbox.forget_exec(&container.id, &process.exec).await;
            return Err(error);
        }
        Ok(pid)
    }
}
