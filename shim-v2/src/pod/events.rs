//! What happens to a pod's tasks, in the shim's own words, and the queue that it leaves by.
//!
//! `containerd::publish` takes it from the queue and tells containerd. The order in the queue is
//! the order in which containerd is told.

use std::time::SystemTime;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::process::Exit;
use crate::share::RootfsMount;
use crate::stdio::StdioPaths;

/// How many events may wait.
const QUEUE: usize = 2048;

/// Something that happened to a task.
#[derive(Clone, Debug)]
pub enum TaskEvent {
    /// A container has been made.
    Created {
        container: String,
        bundle: String,
        /// Its root file system's mounts.
        rootfs: Vec<RootfsMount>,
        stdio: StdioPaths,
        /// Its init's host pid.
        pid: u32,
    },
    /// A container's init runs.
    Started {
        container: String,
        /// Its init's host pid.
        pid: u32,
    },
    /// An exec is known.
    ExecAdded { container: String, exec: String },
    /// An exec runs.
    ExecStarted {
        container: String,
        exec: String,
        /// Its host pid.
        pid: u32,
    },
    /// A process has exited, and what it wrote has been read.
    Exited {
        container: String,
        /// The exec; empty: the container's init.
        exec: String,
        /// Its host pid.
        pid: u32,
        /// How and when.
        exit: Exit,
    },
    /// A container is gone.
    Deleted {
        container: String,
        /// Its init's host pid.
        pid: u32,
        /// How and when its init exited.
        exit: Exit,
    },
    /// A container's processes stand still.
    Paused { container: String },
    /// A container's processes go on.
    Resumed { container: String },
    /// Processes of a container were killed for its memory limit.
    OutOfMemory { container: String },
}

/// An event, and when it happened.
#[derive(Debug)]
pub struct Happened {
    pub event: TaskEvent,
    /// The time of day.
    pub at: SystemTime,
    /// The same for deadlines.
    pub since: Instant,
}

/// The way in of the queue.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Happened>);

impl Events {
    /// A queue: its way in, and its way out.
    pub fn queue() -> (Self, mpsc::Receiver<Happened>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), receiver)
    }

    /// Queues an event; never waits.
    pub fn publish(&self, event: TaskEvent) {
        let happened = Happened {
            event,
            at: SystemTime::now(),
            since: Instant::now(),
        };
        if let Err(mpsc::error::TrySendError::Full(lost)) = self.0.try_send(happened) {
            let event = lost.event;
            tracing::error!(?event, "drop an event: {QUEUE} are waiting for containerd");
        }
    }
}
