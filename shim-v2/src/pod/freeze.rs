//! Freezes containers, thaws them, and changes their limits.
//!
//! A refusal is in the words of runc's shim, which clients know. While the guest freezes, the state is
//! "pausing": whoever asks then is answered at once.

use kata_like_failure::{Failure, Kind};
use std::sync::Arc;

use super::{Container, Pod, Process, lock};
use crate::containerd::publish::TaskEvent;
use crate::pod::process::Status;

/// Whether a container's processes may run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Freeze {
    #[default]
    Thawed,
    /// The guest has been asked to freeze them.
    Pausing,
    Paused,
    /// The guest has been asked to let them go on.
    Resuming,
}

impl Freeze {
    /// The word for it in a refusal; none where nothing is to be refused.
    pub(super) fn word(self) -> Option<&'static str> {
        match self {
            Self::Thawed => None,
            Self::Pausing => Some("pausing"),
            Self::Paused | Self::Resuming => Some("paused"),
        }
    }
}

impl Container {
    /// Whether its processes may run.
    pub(super) fn freeze(&self) -> Freeze {
        *lock(&self.freeze)
    }

    /// A process's state as clients see it: while a container is frozen, all that live in it are.
    pub(super) fn status_of(&self, process: &Process) -> Status {
        let own = process.life().status();
        if own == Status::Stopped || self.init.life().is_gone() {
            return own;
        }
        match self.freeze() {
            Freeze::Thawed => own,
            Freeze::Pausing => Status::Pausing,
            Freeze::Paused | Freeze::Resuming => Status::Paused,
        }
    }

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
            Ok(sandbox) => sandbox.pause(&id).await,
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
            self.publisher.publish(TaskEvent::Paused { container: id });
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
            Ok(sandbox) => sandbox.resume(&id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = resumed {
            container.set_freeze(Freeze::Paused);
            return Err(error);
        }
        let life = init.life();
        container.set_freeze(Freeze::Thawed);
        if life.exit().is_none() {
            self.publisher.publish(TaskEvent::Resumed { container: id });
        }
        Ok(())
    }

    /// Changes a container's limits: an OCI `linux.resources` object as JSON.
    pub async fn update(self: Arc<Self>, id: String, resources: Vec<u8>) -> Result<(), Failure> {
        let (container, init) = self.find(&id, "")?;
        if init.life().is_gone() {
            return Err(Failure::new(
                Kind::Failed,
                "cannot update a stopped container".to_owned(),
            ));
        }
        container.sandbox()?.update(&id, &resources).await
    }
}

/// Why a container can't be frozen or thawed.
enum NotRunning {
    Created,
    Stopped,
}

fn running(init: &Process, words: impl Fn(NotRunning) -> &'static str) -> Result<(), Failure> {
    let life = init.life();
    let state = if life.is_gone() {
        NotRunning::Stopped
    } else if life.status() == Status::Running {
        return Ok(());
    } else {
        NotRunning::Created
    };
    Err(Failure::new(Kind::Failed, words(state).to_owned()))
}
