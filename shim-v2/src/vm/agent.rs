//! The shim's side of the agent's one connection: calls with deadlines, events checked.
//!
//! Called by `machine` with the end of the socket that the VMM joins to the agent's dial. The
//! agent's messages stop here. Whatever comes from the guest is hostile: a text is cleaned and cut,
//! a number checked against its range, a name must be one that the shim gave. How much of it may
//! come is decided by `gate`, how often by `follow`.
//!
//! A call goes on when its caller leaves. It is given up when the VM ends, when the guest shows no
//! progress for [`PATIENCE`], or at its own limit.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kata_like_agent_protocol::PROTOCOL_VERSION;
use kata_like_agent_protocol::agent_ttrpc::AgentClient;
use kata_like_agent_protocol::{agent, status as codes};
use protobuf::MessageField;
use rustix::system::uname;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::with_duration;

use super::launch::Vmm;
use crate::spec::GuestPart;
use kata_like_failure::{Failure, Kind};

mod control;
mod event;
pub mod figures;
mod follow;
mod gate;
mod network;
mod streams;

use event::clean;
pub use event::{Event, NameQuestion};
use gate::{Gate, Offence};
pub use network::{GuestInterface, Interface};
use streams::streams_of;
pub use streams::{StreamTokens, new_token};

/// How long a guest may show no progress while it owes an answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// The limit of calls that make something; a guest that is slow, but moves, has that long.
const MAKE: Duration = Duration::from_secs(300);
/// The limit of calls that only ask or tell.
const ASK: Duration = Duration::from_secs(30);

/// The agent, as the shim's server. Clones share the connection.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    offence: Offence,
    vmm: Vmm,
    /// The guest has shown no progress while it owed an answer.
    stuck: Arc<AtomicBool>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        to.write_str("Agent")
    }
}

impl Agent {
    /// Takes the connection. Needs a runtime of tokio.
    pub fn new(connection: UnixStream, vmm: Vmm) -> Self {
        let (client, offence) = client(connection);
        Self {
            client,
            offence,
            vmm,
            stuck: Arc::default(),
        }
    }

    /// Whether the guest was found not to move any more: nothing is to be waited for there.
    pub fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::SeqCst)
    }

    /// The guest was found not to move any more.
    pub fn is_found_stuck(&self) {
        self.stuck.store(true, Ordering::SeqCst);
    }

    /// Makes a call and waits for its answer. The work is a task of its own, which ends with a call
    /// that is given up.
    async fn call<T: Send + 'static>(
        &self,
        what: &str,
        limit: Duration,
        work: impl Future<Output = ttrpc::Result<T>> + Send + 'static,
    ) -> Result<T, Failure> {
        let mut work = tokio::spawn(work);
        let answer = self.answer(what, limit, &mut work).await;
        // Of one that was answered nothing is left.
        work.abort();
        answer
    }

    async fn answer<T>(
        &self,
        what: &str,
        limit: Duration,
        mut work: &mut JoinHandle<ttrpc::Result<T>>,
    ) -> Result<T, Failure> {
        let begin = Instant::now();
        let (mut progress, mut changed) = (None, begin);
        loop {
            tokio::select! {
                biased;
                answer = &mut work => return match answer {
                    Ok(Ok(answer)) => Ok(answer),
                    Ok(Err(error)) => Err(self.refused(what, error).await),
                    Err(panic) => Err(Failure::failed(what, panic)),
                },
                why = self.vmm.ended() => return Err(gone(what, &why)),
                () = tokio::time::sleep(LOOK.min(limit)) => {}
            }
            if begin.elapsed() >= limit {
                let why = format!("no answer of the guest within {limit:?}");
                return Err(late(what, &why));
            }
            let now = Some(self.vmm.progress().await);
            if now != progress {
                (progress, changed) = (now, Instant::now());
            } else if changed.elapsed() >= PATIENCE {
                self.is_found_stuck();
                let why = format!("the guest has shown no progress for {PATIENCE:?}");
                return Err(late(what, &self.vmm.with_state(&why).await));
            }
        }
    }

    async fn refused(&self, what: &str, error: ttrpc::Error) -> Failure {
        let status = match error {
            ttrpc::Error::RpcStatus(status) => status,
            other => {
                if let Some(why) = self.offence.get() {
                    return gone(what, why);
                }
                // A connection that breaks is the VM's end most often, which says more.
                if let Ok(why) =
                    tokio::time::timeout(Duration::from_secs(1), self.vmm.ended()).await
                {
                    return gone(what, &why);
                }
                return Failure::failed(format!("{what}: call the agent"), other);
            }
        };
        let kind = codes::kind(status.code.enum_value_or_default());
        Failure::new(kind, clean(&status.message)).during(what)
    }

    /// The first call.
    pub async fn start_pod(&self) -> Result<PodStarted, Failure> {
        let request = agent::StartPodRequest {
            version: PROTOCOL_VERSION,
            host_time_ns: host_time_ns(),
            hostname: uname().nodename().to_string_lossy().into_owned(),
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.start_pod(with_duration(MAKE), &request).await };
        let answer = self.call("start the pod in the guest", MAKE, work).await?;
        Ok(PodStarted {
            kernel_release: clean(&answer.kernel_release),
            agent_version: clean(&answer.agent_version),
        })
    }

    /// Follows the agent's events in a task of its own. The answer is why the events have ended,
    /// when they have.
    pub fn follow_events(&self, events: mpsc::Sender<Event>) -> oneshot::Receiver<String> {
        let followed = follow::follow(self.client.clone(), Arc::clone(&self.offence), events);
        let (tell, ended) = oneshot::channel();
        tokio::spawn(async move {
            let _ = tell.send(followed.await);
        });
        ended
    }

    /// Makes a container.
    pub async fn create_container(
        &self,
        container: &str,
        made_of: GuestContainer,
        streams: &StreamTokens,
    ) -> Result<(), Failure> {
        let disk = |disk: GuestDisk| agent::Disk {
            slot: disk.slot,
            major: disk.major,
            minor: disk.minor,
            ..Default::default()
        };
        let request = agent::CreateContainerRequest {
            container: container.to_owned(),
            spec: made_of.part.spec,
            binds: made_of.part.binds,
            joins: made_of.part.joins,
            root_volume: made_of.root_volume.unwrap_or_default(),
            streams: MessageField::some(streams_of(streams)),
            placeholder: made_of.placeholder,
            disks: made_of.disks.into_iter().map(disk).collect(),
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.create_container(with_duration(MAKE), &request).await };
        let what = format!("create container {container} in the guest");
        self.call(&what, MAKE, work).await.map(drop)
    }

    /// Lets a created container run.
    pub async fn start_container(&self, container: &str) -> Result<(), Failure> {
        let request = agent::StartContainerRequest {
            container: container.to_owned(),
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.start_container(with_duration(MAKE), &request).await };
        let what = format!("start container {container} in the guest");
        self.call(&what, MAKE, work).await.map(drop)
    }

    /// Runs a further process.
    pub async fn exec(
        &self,
        container: &str,
        exec: &str,
        process: Vec<u8>,
        streams: &StreamTokens,
    ) -> Result<(), Failure> {
        let request = agent::ExecRequest {
            container: container.to_owned(),
            exec: exec.to_owned(),
            process,
            streams: MessageField::some(streams_of(streams)),
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.exec(with_duration(MAKE), &request).await };
        let what = format!("exec {exec} in container {container}");
        self.call(&what, MAKE, work).await.map(drop)
    }

    /// Signals a process or all of a container's.
    pub async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Failure> {
        let request = agent::SignalRequest {
            container: container.to_owned(),
            exec: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.signal(with_duration(ASK), &request).await };
        let what = format!("signal container {container}");
        self.call(&what, ASK, work).await.map(drop)
    }

    /// Sets the size of a terminal.
    pub async fn resize(
        &self,
        container: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), Failure> {
        let request = agent::ResizeTerminalRequest {
            container: container.to_owned(),
            exec: exec.to_owned(),
            width,
            height,
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.resize_terminal(with_duration(ASK), &request).await };
        let what = format!("resize the terminal of container {container}");
        self.call(&what, ASK, work).await.map(drop)
    }

    /// Takes a container away in the guest, which then holds nothing of its mounts.
    pub async fn delete_container(&self, container: &str, limit: Duration) -> Result<(), Failure> {
        let request = request_for(container);
        let client = self.client.clone();
        let work = async move { client.delete_container(with_duration(MAKE), &request).await };
        let what = format!("delete container {container} in the guest");
        self.call(&what, limit, work).await.map(drop)
    }

    /// Has the guest end, and answers what the host does not have yet of what its containers have
    /// written. Nothing: it resets. Called again and again, so that each answer comes soon.
    pub async fn shutdown(&self) -> Result<Option<Unwritten>, Failure> {
        let client = self.client.clone();
        let work = async move {
            client
                .shutdown(with_duration(ASK), &agent::Empty::new())
                .await
        };
        let answer = self.call("shut the guest down", ASK, work).await?;
        let left = answer.left.unwrap_or_default();
        Ok((!answer.done).then(|| Unwritten::of(&left)))
    }

    /// What the host does not have yet of what containers have written.
    pub async fn unwritten(&self) -> Result<Unwritten, Failure> {
        let client = self.client.clone();
        let work = async move {
            client
                .get_unwritten(with_duration(ASK), &agent::Empty::new())
                .await
        };
        let what = "ask the guest what is not written back";
        let left = self.call(what, ASK, work).await?;
        Ok(Unwritten::of(&left))
    }
}

/// What a guest still has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unwritten {
    /// So many bytes that the host has not.
    pub dirty_bytes: u64,
    /// So many containers with processes.
    pub containers: u32,
}

impl Unwritten {
    fn of(message: &agent::Unwritten) -> Self {
        Self {
            dirty_bytes: message.dirty_bytes,
            containers: message.containers,
        }
    }
}

/// What a container is made of in the guest.
#[derive(Debug, Default)]
pub struct GuestContainer {
    /// The guest's part of its spec.
    pub part: GuestPart,
    /// The name of the volume that is its root, if it is one.
    pub root_volume: Option<String>,
    /// It holds the pod's namespaces and runs nothing.
    pub placeholder: bool,
    /// Disks that are bound in the guest.
    pub disks: Vec<GuestDisk>,
}

/// A disk that is bound in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestDisk {
    /// N of `virtio-mmio.N`.
    pub slot: u32,
    /// Its major number on the host.
    pub major: u32,
    /// Its minor number on the host.
    pub minor: u32,
}

/// What the guest said about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStarted {
    /// The guest kernel's release.
    pub kernel_release: String,
    /// The agent's version.
    pub agent_version: String,
}

/// The client of an agent on this connection, and what the guest does to have it ended.
fn client(connection: UnixStream) -> (AgentClient, Offence) {
    let gate = Gate::new(connection);
    let offence = gate.offence();
    let client = ttrpc::asynchronous::Client::new(Socket::new(gate));
    (AgentClient::new(client), offence)
}

/// CLOCK_REALTIME in nanoseconds.
fn host_time_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.ok()
        .and_then(|now| i64::try_from(now.as_nanos()).ok())
        .unwrap_or_default()
}

fn request_for(container: &str) -> agent::ContainerRequest {
    agent::ContainerRequest {
        container: container.to_owned(),
        ..Default::default()
    }
}

fn gone(what: &str, why: &str) -> Failure {
    Failure::new(Kind::Failed, format!("{what}: {why}"))
}

fn late(what: &str, why: &str) -> Failure {
    Failure::new(Kind::DeadlineExceeded, format!("{what}: {why}"))
}
