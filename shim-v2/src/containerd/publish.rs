//! Tells containerd what happened, in order.
//!
//! Started by `serve` with the queue that `pod` fills ([`Events`](crate::pod::events::Events)). One
//! task takes an event after the other and sends it over ttrpc to containerd's `TTRPC_ADDRESS`;
//! each try has 5 seconds. While containerd is away the first event waits, and those behind it with
//! it, so none overtakes another. One that could not be sent within its time is dropped: containerd
//! then asks for the state itself. Without an address nothing is published, and nothing fails.
//! (Facts: containerd, `pkg/shim/publisher.go` and `core/runtime/events.go`.)

use std::time::Duration;

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

use super::convert;
use crate::pod::events::{Happened, TaskEvent};
use crate::pod::process::Exit;
use crate::share::RootfsMount;
use crate::stdio::StdioPaths;

/// How long one try may take.
const TRY: Duration = Duration::from_secs(5);
/// How long an event is tried, from when it was queued.
const LIFETIME: Duration = Duration::from_secs(30);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// containerd's topic of an event, and its message.
fn encode(event: TaskEvent) -> (&'static str, Result<Any, protobuf::Error>) {
    match event {
        TaskEvent::Created {
            container,
            bundle,
            rootfs,
            stdio,
            pid,
        } => (
            "/tasks/create",
            pack(&created(container, bundle, rootfs, stdio, pid)),
        ),
        TaskEvent::Started { container, pid } => ("/tasks/start", {
            let mut message = proto::TaskStart::new();
            (message.container_id, message.pid) = (container, pid);
            pack(&message)
        }),
        TaskEvent::ExecAdded { container, exec } => ("/tasks/exec-added", {
            let mut message = proto::TaskExecAdded::new();
            (message.container_id, message.exec_id) = (container, exec);
            pack(&message)
        }),
        TaskEvent::ExecStarted {
            container,
            exec,
            pid,
        } => ("/tasks/exec-started", {
            let mut message = proto::TaskExecStarted::new();
            (message.container_id, message.exec_id) = (container, exec);
            message.pid = pid;
            pack(&message)
        }),
        TaskEvent::Exited {
            container,
            exec,
            pid,
            exit,
        } => ("/tasks/exit", pack(&exited(container, exec, pid, exit))),
        TaskEvent::Deleted {
            container,
            pid,
            exit,
        } => ("/tasks/delete", {
            let mut message = proto::TaskDelete::new();
            (message.container_id, message.pid) = (container, pid);
            message.exit_status = exit.status;
            message.exited_at = convert::timestamp(exit.at);
            pack(&message)
        }),
        TaskEvent::Paused { container } => ("/tasks/paused", {
            let mut message = proto::TaskPaused::new();
            message.container_id = container;
            pack(&message)
        }),
        TaskEvent::Resumed { container } => ("/tasks/resumed", {
            let mut message = proto::TaskResumed::new();
            message.container_id = container;
            pack(&message)
        }),
        TaskEvent::OutOfMemory { container } => ("/tasks/oom", {
            let mut message = proto::TaskOOM::new();
            message.container_id = container;
            pack(&message)
        }),
    }
}

fn created(
    container: String,
    bundle: String,
    rootfs: Vec<RootfsMount>,
    stdio: StdioPaths,
    pid: u32,
) -> proto::TaskCreate {
    proto::TaskCreate {
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
    }
}

fn exited(container: String, exec: String, pid: u32, exit: Exit) -> proto::TaskExit {
    proto::TaskExit {
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

/// The one who tells containerd.
#[derive(Debug)]
pub struct Publisher {
    flush: Option<mpsc::Sender<oneshot::Sender<()>>>,
}

impl Publisher {
    /// Sends what comes from `happened` to `address`, containerd's ttrpc socket; none or empty:
    /// nowhere.
    pub fn start(
        address: Option<String>,
        namespace: &str,
        happened: mpsc::Receiver<Happened>,
    ) -> Self {
        let address = address.filter(|address| !address.is_empty());
        let flush = address.map(|address| {
            let (flush, flushes) = mpsc::channel(1);
            tokio::spawn(send_all(address, namespace.to_owned(), happened, flushes));
            flush
        });
        Self { flush }
    }

    /// Waits until what is queued has been sent or dropped, at most so long.
    pub async fn flush(&self, patience: Duration) {
        let Some(queue) = &self.flush else {
            return;
        };
        let (done, flushed) = oneshot::channel();
        let flush = async {
            if queue.send(done).await.is_ok() {
                let _ = flushed.await;
            }
        };
        if timeout(patience, flush).await.is_err() {
            tracing::warn!("leave with events that containerd did not take");
        }
    }
}

async fn send_all(
    address: String,
    namespace: String,
    mut happened: mpsc::Receiver<Happened>,
    mut flushes: mpsc::Receiver<oneshot::Sender<()>>,
) {
    let mut client = None;
    loop {
        // A flush has its turn when no event waits.
        tokio::select! {
            biased;
            event = happened.recv() => match event {
                Some(event) => publish(&address, &namespace, &mut client, event).await,
                None => return,
            },
            Some(done) = flushes.recv() => {
                let _ = done.send(());
            }
        }
    }
}

async fn publish(
    address: &str,
    namespace: &str,
    client: &mut Option<EventsClient>,
    happened: Happened,
) {
    let (topic, event) = encode(happened.event);
    let event = match event {
        Ok(event) => event,
        Err(error) => {
            tracing::error!(%error, topic, "encode an event");
            return;
        }
    };
    let envelope = Envelope {
        timestamp: convert::timestamp(happened.at),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: MessageField::some(event),
        ..Envelope::default()
    };
    send(address, client, envelope, happened.since + LIFETIME).await;
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
