//! The calls into the guest, with deadlines, and its events.
//!
//! Called by `machine` with the proxy, which alone reads what the agent sends. What the proxy says
//! is hostile, too, for it may have been taken over: a text is cleaned and cut here again, a number
//! checked against its range, and a name must be one that the shim gave.
//!
//! A call goes on when its caller leaves. It is given up when the VM ends, when the guest shows no
//! progress for [`PATIENCE`], or at its own limit.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kata_like_agent_protocol::{PROTOCOL_VERSION, agent};
use kata_like_proxy::wire::{Answer, Method};
use kata_like_proxy::{Stats, clean};
use protobuf::{Message, MessageField};
use rustix::system::uname;
use tokio::sync::{mpsc, oneshot};

use super::launch::{Proxy, Vmm};
use crate::spec::GuestPart;
use kata_like_failure::{Failure, Kind};

mod control;
mod follow;
mod network;
mod streams;

pub use kata_like_proxy::{Event, NameQuestion};
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
/// How long the VM's own end may come after that of the agent's connection.
const OWN_END: Duration = Duration::from_secs(1);

/// The agent, as the shim's server. Clones share the connection.
#[derive(Clone)]
pub struct Agent {
    proxy: Proxy,
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
    /// The agent that the proxy listens to.
    pub fn new(proxy: Proxy, vmm: Vmm) -> Self {
        Self {
            proxy,
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

    /// Makes a call that has nothing more to say than that it was carried out.
    async fn call(
        &self,
        what: &str,
        limit: Limit,
        method: Method,
        request: &impl Message,
    ) -> Result<(), Failure> {
        match self.ask(what, limit, method, request).await? {
            Answer::Done => Ok(()),
            _ => Err(strange(what)),
        }
    }

    /// Makes a call and waits for its answer.
    async fn ask(
        &self,
        what: &str,
        limit: Limit,
        method: Method,
        request: &impl Message,
    ) -> Result<Answer, Failure> {
        let request = request.write_to_bytes();
        let request = request.map_err(|error| Failure::failed(what, error))?;
        let answer = self.proxy.call(method, limit.of_agent, request);
        match self.answered(what, limit.of_caller, answer).await? {
            Answer::Refused { kind, why } => Err(Failure::new(kind, clean(&why)).during(what)),
            Answer::Offence { why } => Err(gone(what, &clean(&why))),
            Answer::Broken { why } => {
                // A connection that breaks is the VM's end most often, which says more.
                let ended = tokio::time::timeout(OWN_END, self.vmm.ended()).await;
                let why = ended.unwrap_or_else(|_| format!("call the agent: {}", clean(&why)));
                Err(gone(what, &why))
            }
            answer => Ok(answer),
        }
    }

    async fn answered(
        &self,
        what: &str,
        limit: Duration,
        answer: impl Future<Output = Result<Answer, Failure>>,
    ) -> Result<Answer, Failure> {
        tokio::pin!(answer);
        let begin = Instant::now();
        let (mut progress, mut changed) = (None, begin);
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return answer.map_err(|error| error.during(what)),
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

    /// The first call.
    pub async fn start_pod(&self) -> Result<PodStarted, Failure> {
        let request = agent::StartPodRequest {
            version: PROTOCOL_VERSION,
            host_time_ns: host_time_ns(),
            hostname: uname().nodename().to_string_lossy().into_owned(),
            ..Default::default()
        };
        let what = "start the pod in the guest";
        let answer = self.ask(what, Limit::of(MAKE), Method::StartPod, &request);
        match answer.await? {
            Answer::PodStarted {
                kernel_release,
                agent_version,
            } => Ok(PodStarted {
                kernel_release: clean(&kernel_release),
                agent_version: clean(&agent_version),
            }),
            _ => Err(strange(what)),
        }
    }

    /// Follows the agent's events in a task of its own. The answer is why the events have ended,
    /// when they have.
    pub fn follow_events(&self, events: mpsc::Sender<Event>) -> oneshot::Receiver<String> {
        let followed = follow::follow(self.proxy.clone(), events);
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
        let what = format!("create container {container} in the guest");
        self.call(&what, Limit::of(MAKE), Method::CreateContainer, &request)
            .await
    }

    /// Lets a created container run.
    pub async fn start_container(&self, container: &str) -> Result<(), Failure> {
        let request = agent::StartContainerRequest {
            container: container.to_owned(),
            ..Default::default()
        };
        let what = format!("start container {container} in the guest");
        self.call(&what, Limit::of(MAKE), Method::StartContainer, &request)
            .await
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
        let what = format!("exec {exec} in container {container}");
        self.call(&what, Limit::of(MAKE), Method::Exec, &request)
            .await
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
        let what = format!("signal container {container}");
        self.call(&what, Limit::of(ASK), Method::Signal, &request)
            .await
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
        let what = format!("resize the terminal of container {container}");
        self.call(&what, Limit::of(ASK), Method::ResizeTerminal, &request)
            .await
    }

    /// Takes a container away in the guest, which then holds nothing of its mounts.
    pub async fn delete_container(&self, container: &str, limit: Duration) -> Result<(), Failure> {
        let request = request_for(container);
        let what = format!("delete container {container} in the guest");
        self.call(
            &what,
            Limit::within(MAKE, limit),
            Method::DeleteContainer,
            &request,
        )
        .await
    }

    /// A container's stats.
    pub async fn stats(&self, container: &str) -> Result<Stats, Failure> {
        let request = request_for(container);
        let what = format!("read the stats of container {container}");
        let answer = self.ask(&what, Limit::of(ASK), Method::Stats, &request);
        match answer.await? {
            Answer::Stats(stats) => Ok(stats.bounded()),
            _ => Err(strange(&what)),
        }
    }

    /// Has the guest end, and answers what the host does not have yet of what its containers have
    /// written. Nothing: it resets. Called again and again, so that each answer comes soon.
    pub async fn shutdown(&self) -> Result<Option<Unwritten>, Failure> {
        let (done, left) = self.left("shut the guest down", Method::Shutdown).await?;
        Ok((!done).then_some(left))
    }

    /// What the host does not have yet of what containers have written.
    pub async fn unwritten(&self) -> Result<Unwritten, Failure> {
        let what = "ask the guest what is not written back";
        let (_, left) = self.left(what, Method::GetUnwritten).await?;
        Ok(left)
    }

    async fn left(&self, what: &str, method: Method) -> Result<(bool, Unwritten), Failure> {
        let empty = agent::Empty::new();
        match self.ask(what, Limit::of(ASK), method, &empty).await? {
            Answer::Unwritten {
                done,
                dirty_bytes,
                containers,
            } => {
                let left = Unwritten {
                    dirty_bytes,
                    containers,
                };
                Ok((done, left))
            }
            _ => Err(strange(what)),
        }
    }
}

/// How long a call may take.
#[derive(Clone, Copy)]
struct Limit {
    /// What the agent is told.
    of_agent: Duration,
    /// When its caller gives it up.
    of_caller: Duration,
}

impl Limit {
    fn of(both: Duration) -> Self {
        Self::within(both, both)
    }

    fn within(of_agent: Duration, of_caller: Duration) -> Self {
        Self {
            of_agent,
            of_caller,
        }
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

fn strange(what: &str) -> Failure {
    gone(what, "the proxy's answer is of another kind")
}

fn late(what: &str, why: &str) -> Failure {
    Failure::new(Kind::DeadlineExceeded, format!("{what}: {why}"))
}
