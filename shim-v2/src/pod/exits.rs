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

use super::{Container, KILL, KILLED, Pod, Process, Slot};
use crate::bundle;
use crate::containerd::publish::TaskEvent;
use crate::pod::process::{Exit, Gone};
use crate::vm::{Sandbox, SandboxEvent};

/// How long the execs of an init that is gone may take until their exits are told.
const EXECS_DEADLINE: Duration = Duration::from_secs(10);

impl Pod {
    /// Follows a sandbox's events to the last one.
    pub(super) async fn follow(
        self: Arc<Self>,
        sandbox: Weak<Sandbox>,
        mut happened: mpsc::UnboundedReceiver<SandboxEvent>,
    ) {
        while let Some(event) = happened.recv().await {
            match event {
                SandboxEvent::Exited {
                    container,
                    exec,
                    status,
                    at,
                    stdout_bytes,
                    stderr_bytes,
                } => {
                    let gone = Gone {
                        exit: Exit { status, at },
                        stdout_bytes,
                        stderr_bytes,
                        lost: false,
                    };
                    self.gone(&container, &exec, gone);
                }
                // At once: CRI needs it before or near the exit.
                SandboxEvent::OutOfMemory { container } => {
                    self.note_out_of_memory(&container);
                    self.publisher.publish(TaskEvent::OutOfMemory { container });
                }
                SandboxEvent::StandInDied { container, exec } => {
                    tracing::warn!(
                        container,
                        exec,
                        "a task's stand-in was killed: its task is too"
                    );
                    let Some(sandbox) = sandbox.upgrade() else {
                        return;
                    };
                    tokio::spawn(async move {
                        let all = exec.is_empty();
                        if let Err(error) = sandbox.signal(&container, &exec, KILL, all).await {
                            tracing::warn!(
                                container,
                                exec,
                                error = error.one_line(),
                                "kill a task whose stand-in is gone"
                            );
                        }
                    });
                }
                SandboxEvent::Ended { reason } => {
                    self.all_gone(&sandbox, &reason);
                    return;
                }
            }
        }
    }

    /// For callers that get no events.
    fn note_out_of_memory(&self, container: &str) {
        let bundle = {
            let state = self.state();
            let entry = state.containers.get(container);
            entry.map(|entry| entry.container.bundle.clone())
        };
        let Some(Err(error)) = bundle.map(|bundle| bundle::note_out_of_memory(&bundle)) else {
            return;
        };
        tracing::warn!(container, %error, "note in the bundle that memory ran out");
    }

    /// Gives a sandbox up, and every task in it.
    pub(super) async fn lose(self: &Arc<Self>, sandbox: &Arc<Sandbox>, reason: &str) {
        self.all_gone(&Arc::downgrade(sandbox), reason);
        sandbox.stop().await;
    }

    /// An init that was killed goes: it may have much to write back, and is waited for as long as that becomes less. One
    /// that does not go takes the pod with it.
    pub(super) fn expect_exit(self: &Arc<Self>, sandbox: &Arc<Sandbox>, init: Arc<Process>) {
        let (pod, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        tokio::spawn(async move {
            let is_gone = || init.life().is_gone();
            if let Err(why) = sandbox.killed(is_gone).await {
                let reason = format!("SIGKILL had no effect: {why}");
                pod.lose(&sandbox, &reason).await;
            }
        });
    }

    /// Tells every exit of a sandbox that is gone.
    fn all_gone(self: &Arc<Self>, sandbox: &Weak<Sandbox>, reason: &str) {
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
        self.end_tasks(&containers);
    }

    /// Every process of these containers is gone with the guest.
    pub(super) fn end_tasks(self: &Arc<Self>, containers: &[Arc<Container>]) {
        let gone = Gone {
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
                    self.process_gone(container, &exec, gone);
                }
            }
            self.process_gone(container, &container.init, gone);
        }
    }

    pub(super) fn gone(self: &Arc<Self>, id: &str, exec: &str, gone: Gone) {
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
            Some((container, process)) => self.process_gone(&container, &process, gone),
            None => tracing::debug!(container = id, exec, "an exit of nobody we know"),
        }
    }

    fn process_gone(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        gone: Gone,
    ) {
        let now = process.life().gone(gone);
        if let Some(gone) = now {
            self.finish_later(container, process, gone);
        }
    }

    /// Tells an exit when its time has come.
    pub(super) fn finish_later(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        gone: Gone,
    ) {
        let (pod, container, process) =
            (Arc::clone(self), Arc::clone(container), Arc::clone(process));
        tokio::spawn(async move { pod.finish(&container, &process, gone).await });
    }

    /// Waits for what belongs before an exit, then tells it.
    pub(super) async fn finish(&self, container: &Container, process: &Process, gone: Gone) {
        if let Some(stdio) = process.stdio.get() {
            stdio.end_input();
            if gone.lost {
                stdio.lost().await;
            } else if !stdio.drained(gone.stdout_bytes, gone.stderr_bytes).await {
                tracing::debug!(
                    container = process.container,
                    exec = process.exec,
                    "an exit is told before its output has been read"
                );
            }
        }
        if process.is_init() {
            self.end_execs(container, gone.lost).await;
        }
        self.tell_exit(process, gone.exit);
    }

    fn tell_exit(&self, process: &Process, exit: Exit) {
        {
            let mut life = process.life();
            if life.exit().is_some() {
                return;
            }
            life.exited(exit);
            // Under the lock: whoever sees the exit comes after its event, an init's exit too.
            self.publisher.publish(TaskEvent::Exited {
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

    /// The init is gone: its execs end too, and are told first.
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
                let _ = sandbox.signal(&id, "", KILL, true).await;
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
                self.tell_exit(&exec, exit);
            }
        }
    }
}
