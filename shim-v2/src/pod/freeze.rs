//! Freezes containers and thaws them.
//!
//! A refusal is in the words of runc's shim, which clients know. While the guest freezes, the state
//! is "pausing", and a question is answered at once.

use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use std::sync::Arc;

use super::Pod;
use super::container::{Container, Process};
use super::events::TaskEvent;
use super::process::{Freeze, Status};

impl Container {
    /// Goes from one state to the next, or tells the one that stands in the way.
    fn turn(&self, from: Freeze, to: Freeze) -> Result<(), Freeze> {
        let mut freeze = lock(&self.freeze);
        if *freeze != from {
            return Err(*freeze);
        }
        *freeze = to;
        Ok(())
    }

    fn set_freeze(&self, to: Freeze) {
        *lock(&self.freeze) = to;
    }
}

impl Pod {
    /// Freezes a running container; answers when all its processes stand still.
    pub async fn pause(self: Arc<Self>, id: String) -> Result<(), Failure> {
        let (container, init) = self.find(&id, "")?;
        running(&init, |state| match state {
            NotRunning::Created => "cannot pause task in created state",
            NotRunning::Stopped => "cannot pause a stopped container",
        })?;
        container
            .turn(Freeze::Thawed, Freeze::Pausing)
            .map_err(|now| {
                let word = now.word().unwrap_or("running");
                Failure::new(Kind::Failed, format!("cannot pause a {word} container"))
            })?;
        let paused = match container.sandbox() {
            Ok(sandbox) => sandbox.guest.agent.pause(&id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = paused {
            container.set_freeze(Freeze::Thawed);
            return Err(error);
        }
        // An exit that came meanwhile is told by itself, and nothing stands still any more.
        let life = init.life();
        container.set_freeze(Freeze::Paused);
        if life.exit().is_none() {
            self.events.publish(TaskEvent::Paused { container: id });
        }
        Ok(())
    }

    /// Lets a paused container go on.
    pub async fn resume(self: Arc<Self>, id: String) -> Result<(), Failure> {
        let (container, init) = self.find(&id, "")?;
        running(&init, |state| match state {
            NotRunning::Created => "cannot resume task in created state",
            NotRunning::Stopped => "cannot resume a stopped container",
        })?;
        container
            .turn(Freeze::Paused, Freeze::Resuming)
            .map_err(|now| {
                Failure::new(
                    Kind::Failed,
                    match now {
                        Freeze::Thawed => "cannot resume a running process".to_owned(),
                        Freeze::Pausing => "cannot resume a pausing container".to_owned(),
                        Freeze::Paused | Freeze::Resuming => {
                            "cannot resume a container that is being resumed".to_owned()
                        }
                    },
                )
            })?;
        let resumed = match container.sandbox() {
            Ok(sandbox) => sandbox.guest.agent.resume(&id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = resumed {
            container.set_freeze(Freeze::Paused);
            return Err(error);
        }
        let life = init.life();
        container.set_freeze(Freeze::Thawed);
        if life.exit().is_none() {
            self.events.publish(TaskEvent::Resumed { container: id });
        }
        Ok(())
    }
}

/// Why a container can't be frozen or thawed.
enum NotRunning {
    Created,
    Stopped,
}

fn running(init: &Process, words: impl Fn(NotRunning) -> &'static str) -> Result<(), Failure> {
    let life = init.life();
    let state = if life.has_exited() {
        NotRunning::Stopped
    } else if life.status() == Status::Running {
        return Ok(());
    } else {
        NotRunning::Created
    };
    Err(Failure::new(Kind::Failed, words(state).to_owned()))
}
