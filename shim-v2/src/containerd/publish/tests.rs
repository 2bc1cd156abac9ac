//! A real ttrpc server stands in for containerd's events service.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::shim_async::{Events, create_events};
use protobuf::Message;
use tokio::net::UnixListener;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

use super::*;
use crate::pod::events::Events as Queue;

/// What has arrived, in order.
#[derive(Clone, Default)]
pub(crate) struct Arrived(Arc<Mutex<Vec<Envelope>>>);

impl Arrived {
    pub(crate) fn topics(&self) -> Vec<String> {
        let envelopes = self.0.lock().expect("no panic while it is held");
        envelopes
            .iter()
            .map(|envelope| envelope.topic.clone())
            .collect()
    }

    /// The ids of the exits, in order.
    pub(crate) fn exits(&self) -> Vec<(String, u32)> {
        let envelopes = self.0.lock().expect("no panic while it is held");
        envelopes
            .iter()
            .filter(|envelope| envelope.topic == "/tasks/exit")
            .map(|envelope| {
                let exit = proto::TaskExit::parse_from_bytes(&envelope.event.value)
                    .expect("the message that the topic names");
                (exit.id, exit.exit_status)
            })
            .collect()
    }
}

#[async_trait]
impl Events for Arrived {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        self.0
            .lock()
            .expect("no panic while it is held")
            .push(envelope);
        Ok(Empty::new())
    }
}

/// Serves containerd's events on a socket.
pub(crate) async fn containerd(path: &Path) -> (Server, Arrived) {
    let arrived = Arrived::default();
    let listener = UnixListener::bind(path).expect("bind");
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(create_events(Arc::new(arrived.clone())));
    server.start().await.expect("serve");
    (server, arrived)
}

fn started(number: u32) -> TaskEvent {
    TaskEvent::Started {
        container: format!("c{number}"),
        pid: number,
    }
}

#[tokio::test]
async fn events_arrive_in_order_with_topic_and_type() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("ttrpc");
    let (_server, arrived) = containerd(&socket).await;
    let (queue, happened) = Queue::queue();
    let publisher = Publisher::start(Some(socket.display().to_string()), "ns", happened);
    queue.publish(TaskEvent::ExecAdded {
        container: "c".into(),
        exec: "e".into(),
    });
    queue.publish(TaskEvent::Exited {
        container: "c".into(),
        exec: "e".into(),
        pid: 4,
        exit: Exit {
            status: 7,
            at: SystemTime::now(),
        },
    });
    queue.publish(TaskEvent::OutOfMemory {
        container: "c".into(),
    });
    publisher.flush(Duration::from_secs(5)).await;
    assert_eq!(
        arrived.topics(),
        ["/tasks/exec-added", "/tasks/exit", "/tasks/oom"]
    );
    assert_eq!(arrived.exits(), [("e".to_owned(), 7)]);
    let envelopes = arrived.0.lock().expect("no panic while it is held");
    let types: Vec<_> = envelopes
        .iter()
        .map(|envelope| {
            (
                envelope.namespace.as_str(),
                envelope.event.type_url.as_str(),
            )
        })
        .collect();
    assert_eq!(
        types,
        [
            ("ns", "containerd.events.TaskExecAdded"),
            ("ns", "containerd.events.TaskExit"),
            ("ns", "containerd.events.TaskOOM"),
        ]
    );
}

#[tokio::test]
async fn events_wait_in_order_for_a_containerd_that_comes_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("ttrpc");
    let (queue, happened) = Queue::queue();
    let publisher = Publisher::start(Some(socket.display().to_string()), "ns", happened);
    for number in 0..20 {
        queue.publish(started(number));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (_server, arrived) = containerd(&socket).await;
    publisher.flush(Duration::from_secs(5)).await;
    let envelopes = arrived.0.lock().expect("no panic while it is held");
    let pids: Vec<_> = envelopes
        .iter()
        .map(|envelope| {
            let event = proto::TaskStart::parse_from_bytes(&envelope.event.value);
            event.expect("a start").pid
        })
        .collect();
    assert_eq!(pids, (0..20).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_restarted_containerd_gets_the_next_event() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("ttrpc");
    let (mut server, first) = containerd(&socket).await;
    let (queue, happened) = Queue::queue();
    let publisher = Publisher::start(Some(socket.display().to_string()), "ns", happened);
    queue.publish(started(1));
    publisher.flush(Duration::from_secs(5)).await;
    assert_eq!(first.topics().len(), 1);
    server.shutdown().await.expect("shut down");
    std::fs::remove_file(&socket).expect("the socket's file");
    let (_server, second) = containerd(&socket).await;
    queue.publish(started(2));
    publisher.flush(Duration::from_secs(5)).await;
    assert_eq!(second.topics().len(), 1);
}

#[tokio::test]
async fn without_an_address_nothing_waits() {
    for address in [None, Some(String::new())] {
        let (queue, happened) = Queue::queue();
        let publisher = Publisher::start(address, "ns", happened);
        queue.publish(started(1));
        let begin = Instant::now();
        publisher.flush(Duration::from_secs(5)).await;
        assert!(begin.elapsed() < Duration::from_secs(1));
    }
}
