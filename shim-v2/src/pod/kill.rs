//! Signals, and what a guest owes that has been told to kill: an exit.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::container::{Container, Process};
use super::process::Status;
use super::sandbox::Sandbox;
use super::{KILL, Pod, at_once, finished};
use crate::bundle::Role;
use crate::vm::ending;
use kata_like_failure::{Failure, Kind};

impl Pod {
    /// Signals a process; with `all` every process of the container. Signal 0 asks whether it is
    /// there, as by kill(2): so CRI-O does.
    pub async fn kill(
        self: Arc<Self>,
        id: String,
        exec: String,
        signal: u32,
        all: bool,
    ) -> Result<(), Failure> {
        let (container, process) = self.find(&id, &exec)?;
        // With `all` an exec is named for nothing, as with runc.
        let all = all && exec.is_empty();
        {
            let life = process.life();
            if life.has_exited() {
                return if all { Ok(()) } else { Err(finished()) };
            }
            if !exec.is_empty() && life.status() == Status::Created && !life.is_under_way() {
                return Err(Failure::new(
                    Kind::WrongState,
                    format!("exec {exec:?} of container {id:?} is not started"),
                ));
            }
        }
        if signal == 0 {
            return Ok(());
        }
        let sandbox = Arc::clone(container.sandbox()?);
        let killed = at_once(async move {
            self.signal(&sandbox, &container, &process, signal, all)
                .await
        });
        match killed.await {
            // The signal is on its way; that it has not arrived yet is nothing a caller could see.
            None => Ok(()),
            Some(Err(error)) if error.kind() == Kind::NotFound => {
                if all {
                    Ok(())
                } else {
                    Err(finished())
                }
            }
            Some(killed) => Ok(killed?),
        }
    }

    /// Signals in the guest. SIGKILL is held to: without an answer the pod is given up at once, and
    /// with one it is, if the init does not go. What the answer says does not matter: an honest
    /// guest has sent the exit before it says that there is no such process.
    pub(super) async fn signal(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        container: &Container,
        process: &Arc<Process>,
        signal: u32,
        all: bool,
    ) -> Result<(), Failure> {
        let (id, exec) = (&container.id, &process.exec);
        let signalled = sandbox.guest.agent.signal(id, exec, signal, all).await;
        match &signalled {
            _ if signal != KILL => {}
            Err(error) if error.kind() == Kind::DeadlineExceeded => {
                // A guest that can't even be told to kill holds nothing worth keeping: it is not
                // asked to write anything back.
                sandbox.guest.agent.is_found_stuck();
                let reason = format!("SIGKILL went unanswered: {}", error.one_line());
                self.give_up(sandbox, &reason).await;
            }
            _ if process.is_init() => {
                let patience = match container.role {
                    Role::CriSandbox => ending::PLACEHOLDER_PATIENCE,
                    _ => ending::KILL_PATIENCE,
                };
                self.expect_exit(sandbox, process, patience);
            }
            _ => {}
        }
        signalled
    }

    /// An init that was killed goes: it may have much to write back, and is waited for as long as
    /// that becomes less, and no longer than `patience` otherwise. One that does not go takes the
    /// pod with it.
    fn expect_exit(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        init: &Arc<Process>,
        patience: Duration,
    ) {
        // The first SIGKILL has started the clock.
        if init.kill_expected.swap(true, Ordering::SeqCst) {
            return;
        }
        let (pod, sandbox, init) = (Arc::clone(self), Arc::clone(sandbox), Arc::clone(init));
        tokio::spawn(async move {
            let is_gone = || init.life().has_exited();
            if let Err(why) = ending::killed(&sandbox.guest, patience, is_gone).await {
                let reason = format!("SIGKILL had no effect: {why}");
                pod.give_up(&sandbox, &reason).await;
            }
        });
    }
}
