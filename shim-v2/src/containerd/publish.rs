//! containerd's events: one queue, one sender, in order.
//!
//! Called by `pod`, which says what happened in its own words ([`TaskEvent`]). An event is queued
//! at once and sent by a task of its own, over ttrpc to containerd's `TTRPC_ADDRESS`; each try has 5
//! seconds. While containerd is away the first event waits, and those behind it with it, so none
//! overtakes another; one that could not be sent within its time is dropped, for containerd then
//! asks for the state itself. Without an address nothing is published, and nothing fails.
//! (Facts: containerd, `pkg/shim/publisher.go` and `core/runtime/events.go`.)

use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task as proto;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::ttrpc;
use protobuf::well_known_types::any::Any;
use protobuf::{MessageField, MessageFull};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use ttrpc::asynchronous::transport::Socket;

use crate::containerd::convert;
use crate::pod::process::Exit;
use crate::stdio::StdioPaths;
use crate::vm::request::RootfsMount;

/// How many events may wait.
const QUEUE: usize = 2048;
/// How long one try may take.
const TRY: Duration = Duration::from_secs(5);
/// How long an event is tried, from when it was queued.
const LIFETIME: Duration = Duration::from_secs(30);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// Something that happened to a task.
#[derive(Clone, Debug)]
pub enum TaskEvent {
    /// A container has been made.
    Created {
        /// Its id.
        container: String,
        /// Its bundle.
        bundle: String,
        /// Its root file system's mounts.
        rootfs: Vec<RootfsMount>,
        /// Its streams.
        stdio: StdioPaths,
        /// Its init's host pid.
        pid: u32,
    },
    /// A container's init runs.
    Started {
        /// Its id.
        container: String,
        /// Its init's host pid.
        pid: u32,
    },
    /// An exec is known.
    ExecAdded {
        /// Its container.
        container: String,
        /// Its id.
        exec: String,
    },
    /// An exec runs.
    ExecStarted {
        /// Its container.
        container: String,
        /// Its id.
        exec: String,
        /// Its host pid.
        pid: u32,
    },
    /// A process has exited.
    Exited {
        /// Its container.
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
        /// Its id.
        container: String,
        /// Its init's host pid.
        pid: u32,
        /// How and when its init exited.
        exit: Exit,
    },
    /// A container's processes stand still.
    Paused {
        /// Its id.
        container: String,
    },
    /// A container's processes go on.
    Resumed {
        /// Its id.
        container: String,
    },
    /// Processes of a container were killed for its memory limit.
    OutOfMemory {
        /// Its id.
        container: String,
    },
}

impl TaskEvent {
    /// containerd's topic, and its message.
    fn encode(self) -> (&'static str, Result<Any, protobuf::Error>) {
        match self {
            Self::Created {
                container,
                bundle,
                rootfs,
                stdio,
                pid,
            } => (
                "/tasks/create",
                pack(&proto::TaskCreate {
                    container_id: container,
                    bundle,
                    rootfs: rootfs.into_iter().map(convert::event_mount).collect(),
                    io: MessageField::some(proto::TaskIO {
                        stdin: stdio.stdin,
                        stdout: stdio.stdout,
                        stderr: stdio.stderr,
                        terminal: stdio.terminal,
                        ..Default::default()
                    }),
                    pid,
                    ..Default::default()
                }),
            ),
            Self::Started { container, pid } => (
                "/tasks/start",
                pack(&proto::TaskStart {
                    container_id: container,
                    pid,
                    ..Default::default()
                }),
            ),
            Self::ExecAdded { container, exec } => (
                "/tasks/exec-added",
                pack(&proto::TaskExecAdded {
                    container_id: container,
                    exec_id: exec,
                    ..Default::default()
                }),
            ),
            Self::ExecStarted {
                container,
                exec,
                pid,
            } => (
                "/tasks/exec-started",
                pack(&proto::TaskExecStarted {
                    container_id: container,
                    exec_id: exec,
                    pid,
                    ..Default::default()
                }),
            ),
            Self::Exited {
                container,
                exec,
                pid,
                exit,
            } => (
                "/tasks/exit",
                pack(&proto::TaskExit {
                    id: if exec.is_empty() {
                        container.clone()
                    } else {
                        exec
                    },
                    container_id: container,
                    pid,
                    exit_status: exit.status,
                    exited_at: convert::timestamp(exit.at),
                    ..Default::default()
                }),
            ),
            Self::Deleted {
                container,
                pid,
                exit,
            } => (
                "/tasks/delete",
                pack(&proto::TaskDelete {
                    container_id: container,
                    pid,
                    exit_status: exit.status,
                    exited_at: convert::timestamp(exit.at),
                    ..Default::default()
                }),
            ),
            Self::Paused { container } => (
                "/tasks/paused",
                pack(&proto::TaskPaused {
                    container_id: container,
                    ..Default::default()
                }),
            ),
            Self::Resumed { container } => (
                "/tasks/resumed",
                pack(&proto::TaskResumed {
                    container_id: container,
                    ..Default::default()
                }),
            ),
            Self::OutOfMemory { container } => (
                "/tasks/oom",
                pack(&proto::TaskOOM {
                    container_id: container,
                    ..Default::default()
                }),
            ),
        }
    }
}

/// A message as an `Any`; containerd's type URL is the bare name.
fn pack<M: MessageFull>(message: &M) -> Result<Any, protobuf::Error> {
    Ok(Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message.write_to_bytes()?,
        ..Any::default()
    })
}

enum Order {
    Send(Box<Envelope>, Instant),
    Flush(oneshot::Sender<()>),
}

/// The queue of events.
#[derive(Debug)]
pub struct Publisher {
    namespace: String,
    queue: Option<mpsc::Sender<Order>>,
}

impl Publisher {
    /// A queue that is sent to `address`, containerd's ttrpc socket; none or empty: nowhere.
    pub fn start(address: Option<String>, namespace: &str) -> Self {
        let queue = address
            .filter(|address| !address.is_empty())
            .map(|address| {
                let (queue, orders) = mpsc::channel(QUEUE);
                tokio::spawn(send_all(address, orders));
                queue
            });
        Self {
            namespace: namespace.to_owned(),
            queue,
        }
    }

    /// Queues an event; never waits.
    pub fn publish(&self, event: TaskEvent) {
        let Some(queue) = &self.queue else {
            return;
        };
        let (topic, event) = event.encode();
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(%error, topic, "encode an event");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: convert::timestamp(SystemTime::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Envelope::default()
        };
        let order = Order::Send(Box::new(envelope), Instant::now() + LIFETIME);
        if queue.try_send(order).is_err() {
            tracing::error!(topic, "drop an event: {QUEUE} are waiting for containerd");
        }
    }

    /// Waits until what is queued has been sent or dropped, at most so long.
    pub async fn flush(&self, patience: Duration) {
        let Some(queue) = &self.queue else {
            return;
        };
        let (done, flushed) = oneshot::channel();
        let flush = async {
            if queue.send(Order::Flush(done)).await.is_ok() {
                let _ = flushed.await;
            }
        };
        if timeout(patience, flush).await.is_err() {
            tracing::warn!("leave with events that containerd did not take");
        }
    }
}

async fn send_all(address: String, mut orders: mpsc::Receiver<Order>) {
    let mut client = None;
    while let Some(order) = orders.recv().await {
        match order {
            Order::Send(envelope, until) => {
                send(&address, &mut client, *envelope, until).await;
            }
            Order::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

/// Sends one event; gives up when its time is over.
async fn send(
    address: &str,
    client: &mut Option<EventsClient>,
    envelope: Envelope,
    until: Instant,
) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest {
        envelope: MessageField::some(envelope),
        ..ForwardRequest::default()
    };
    loop {
        let failure = match try_send(address, client, &request).await {
            Ok(()) => return,
            Err(failure) => failure,
        };
        let was_connected = client.take().is_some();
        if Instant::now() >= until {
            tracing::warn!(topic, failure, "drop an event that containerd did not take");
            return;
        }
        // A connection of before may be that of a containerd which has been restarted since.
        if !was_connected {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn try_send(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> Result<(), String> {
    let client = match client {
        Some(client) => client,
        None => {
            let path = address.strip_prefix("unix://").unwrap_or(address);
            let stream = match timeout(TRY, UnixStream::connect(path)).await {
                Ok(stream) => stream.map_err(|error| format!("connect to {address}: {error}"))?,
                Err(_) => return Err(format!("connect to {address}: no answer in {TRY:?}")),
            };
            let connection = ttrpc::asynchronous::Client::new(Socket::new(stream));
            client.insert(EventsClient::new(connection))
        }
    };
    let nanoseconds = i64::try_from(TRY.as_nanos()).unwrap_or(i64::MAX);
    let context = ttrpc::context::with_timeout(nanoseconds);
    match timeout(TRY, client.forward(context, request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer in {TRY:?}")),
    }
}

#[cfg(test)]
pub(crate) mod tests;
