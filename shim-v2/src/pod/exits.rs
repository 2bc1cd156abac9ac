//! What happens in the sandbox, and what follows: who is told, in which order.
//!
//! An exit is told when the output that came before it has reached its reader, or when that reader
//! has taken nothing for a while. An init's exit is told after those of its execs: they are killed
//! with it, and waited for.

use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use futures::future::join_all;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::container::{Container, Process};
use super::events::TaskEvent;
use super::limits;
use super::process::{Exit, Exited};
use super::sandbox::Sandbox;
use super::{KILL, KILLED, Pod, Slot};
use crate::bundle;
use crate::log::Budget;
use crate::vm::agent::Event;

/// How long the execs of an init that has exited may take until their exits are told.
const EXECS_DEADLINE: Duration = Duration::from_secs(10);

impl Pod {
    /// Follows a sandbox's events to the last one.
    pub(super) async fn follow(
        self: Arc<Self>,
        sandbox: Weak<Sandbox>,
        mut happened: mpsc::Receiver<Event>,
    ) {
        while let Some(event) = happened.recv().await {
            match event {
                Event::Exited {
                    container,
                    exec,
                    status,
                    at,
                    stdout_bytes,
                    stderr_bytes,
                } => {
                    let news = Exited {
                        exit: Exit { status, at },
                        stdout_bytes,
                        stderr_bytes,
                        lost: false,
                    };
                    self.exited(&container, &exec, news);
                }
                Event::OutOfMemory { container } => self.ran_out_of_memory(container),
                Event::NameQuestion(question) => {
                    if let Some(sandbox) = sandbox.upgrade() {
                        sandbox.network.answer(&sandbox.guest, question);
                    }
                }
                Event::Ended { reason } => {
                    self.lose_all(&sandbox, &reason);
                    return;
                }
            }
        }
    }

    /// Told at once: CRI needs it before or near the exit. Noted in the bundle for callers that get
    /// no events.
    fn ran_out_of_memory(&self, id: String) {
        let container = {
            let state = self.state();
            let entry = state.containers.get(&id);
            entry.map(|entry| Arc::clone(&entry.container))
        };
        let Some(container) = container else {
            static STRANGE: Budget = Budget::new();
            STRANGE.spend(|left_out| {
                tracing::warn!(left_out, "the guest sent an event of an unknown container");
            });
            return;
        };
        if !container.tells_out_of_memory() {
            return;
        }
        if let Ok(sandbox) = container.sandbox() {
            let limit = container.host_side.limits().memory;
            let limit = limits::out_of_memory(limit, &sandbox.memory);
            static TOLD: Budget = Budget::new();
            TOLD.spend(|left_out| {
                tracing::warn!(container = id, left_out, "out of memory: {limit}");
            });
        }
        if let Err(error) = bundle::note_out_of_memory(&container.bundle) {
            static FAILED: Budget = Budget::new();
            FAILED.spend(|left_out| {
                let what = "note in the bundle that memory ran out";
                tracing::warn!(container = id, %error, left_out, "{what}");
            });
        }
        self.events
            .publish(TaskEvent::OutOfMemory { container: id });
    }

    /// Gives a sandbox up, and every task in it.
    pub(super) async fn give_up(self: &Arc<Self>, sandbox: &Arc<Sandbox>, reason: &str) {
        self.lose_all(&Arc::downgrade(sandbox), reason);
        self.stop_sandbox(sandbox).await;
    }

    /// Tells every exit of a sandbox whose VM has ended.
    fn lose_all(self: &Arc<Self>, sandbox: &Weak<Sandbox>, reason: &str) {
        let containers: Vec<_> = {
            let mut state = self.state();
            // The pod may have been stopped, and made anew, meanwhile.
            if !matches!(&state.sandbox, Slot::Up(current) if std::ptr::eq(Arc::as_ptr(current), sandbox.as_ptr()))
            {
                return;
            }
            state.lost.get_or_insert_with(|| reason.to_owned());
            let entries = state.containers.values();
            entries.map(|entry| Arc::clone(&entry.container)).collect()
        };
        tracing::error!(sandbox = self.id, reason, "the sandbox has ended");
        self.lose_tasks(&containers);
    }

    /// Every process of these containers is lost with its VM.
    pub(super) fn lose_tasks(self: &Arc<Self>, containers: &[Arc<Container>]) {
        let news = Exited {
            exit: Exit {
                status: KILLED,
                at: SystemTime::now(),
            },
            stdout_bytes: 0,
            stderr_bytes: 0,
            lost: true,
        };
        for container in containers {
            // An exec that was never started has no exit.
            for exec in container.execs() {
                if exec.life().is_under_way() {
                    self.process_exited(container, &exec, news);
                }
            }
            self.process_exited(container, &container.init, news);
        }
    }

    pub(super) fn exited(self: &Arc<Self>, id: &str, exec: &str, news: Exited) {
        let container = {
            let state = self.state();
            state
                .containers
                .get(id)
                .map(|entry| Arc::clone(&entry.container))
        };
        let found = container.and_then(|container| {
            let process = container.process(exec)?;
            Some((container, process))
        });
        match found {
            Some((container, process)) => self.process_exited(&container, &process, news),
            None => tracing::debug!(container = id, exec, "an exit of nobody we know"),
        }
    }

    fn process_exited(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        news: Exited,
    ) {
        let now = process.life().exited(news);
        if let Some(news) = now {
            self.tell_later(container, process, news);
        }
    }

    /// Tells an exit when its time has come.
    pub(super) fn tell_later(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        news: Exited,
    ) {
        let (pod, container, process) =
            (Arc::clone(self), Arc::clone(container), Arc::clone(process));
        tokio::spawn(async move { pod.tell(&container, &process, news).await });
    }

    /// Waits for what belongs before an exit, then tells it.
    pub(super) async fn tell(&self, container: &Container, process: &Process, news: Exited) {
        if let Some(stdio) = process.stdio.get() {
            stdio.end_input();
            if news.lost {
                stdio.lost().await;
            } else if !stdio.drained(news.stdout_bytes, news.stderr_bytes).await {
                tracing::debug!(
                    container = process.container,
                    exec = process.exec,
                    "an exit is told before its output has been read"
                );
            }
        }
        if process.is_init() {
            self.end_execs(container, news.lost).await;
        }
        self.publish_exit(process, news.exit);
    }

    fn publish_exit(&self, process: &Process, exit: Exit) {
        {
            let mut life = process.life();
            if life.exit().is_some() {
                return;
            }
            life.told(exit);
            // Under the lock: a caller that sees the exit comes after its event, an init's exit
            // too.
            self.events.publish(TaskEvent::Exited {
                container: process.container.clone(),
                exec: process.exec.clone(),
                pid: life.pid(),
                exit,
            });
        }
        process.exit.send_replace(Some(exit));
        tracing::info!(
            container = process.container,
            exec = process.exec,
            status = exit.status,
            "process exited"
        );
    }

    /// The init has exited: its execs end too, and are told first.
    async fn end_execs(&self, container: &Container, lost: bool) {
        let left: Vec<_> = container
            .execs()
            .into_iter()
            .filter(|exec| exec.life().is_under_way())
            .collect();
        if left.is_empty() {
            return;
        }
        if !lost && let Ok(sandbox) = container.sandbox() {
            let (sandbox, id) = (Arc::clone(sandbox), container.id.clone());
            // Where init had no PID namespace of its own, the kernel has not killed them.
            tokio::spawn(async move {
                let _ = sandbox.guest.agent.signal(&id, "", KILL, true).await;
            });
        }
        let told = left.iter().map(|exec| async {
            let mut exit = exec.exit.subscribe();
            let _ = exit.wait_for(Option::is_some).await;
        });
        if timeout(EXECS_DEADLINE, join_all(told)).await.is_ok() {
            return;
        }
        for exec in left {
            let exit = Exit {
                status: KILLED,
                at: SystemTime::now(),
            };
            if exec.exit.borrow().is_none() {
                tracing::warn!(
                    container = container.id,
                    exec = exec.exec,
                    "an exec's exit never came: told as killed"
                );
                self.publish_exit(&exec, exit);
            }
        }
    }
}
