//! The agent's side: starts a runner, sends it a request, and hears how it went.
//!
//! Called by `container/`. Nothing here waits for an exit: all processes, also the runner, are
//! children of the agent, and its reaper hears of every exit. A caller that goes away in the middle
//! leaves nothing behind: the process is killed, or ends itself when its channel does.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio as ProcessStdio};
use std::time::Duration;

use kata_like_failure::{Failure, Kind, Step};
use kata_like_linux::watch::Watched;
use oci_spec::runtime::LinuxNamespaceType;
use rustix::process::{PidfdFlags, Signal};
use tokio::io::Interest;

use crate::deadline::BLOCKING_DEADLINE;

use super::channel::Channel;
use super::error::Result;
use super::namespaces::Namespaces;
use super::placeholder;
use super::request::{
    ExecRequest, InitRequest, Joined, Message, PlaceholderRequest, Request, START, Size, Stdio,
};

/// A set-up is a few hundred system calls. Only a file system of the host's can make it slow.
const SETUP_DEADLINE: Duration = BLOCKING_DEADLINE;
/// From the start to the command, with the hooks of the spec.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// A container's init, up to the point before its command.
#[derive(Debug)]
pub struct Created {
    /// The pid in the guest.
    pub pid: u32,
    /// The same process as a pidfd.
    pub pidfd: OwnedFd,
    /// The master of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
    /// Lets the init run. Dropped unused, it ends the process.
    pub start: Start,
}

/// A further process of a container, which runs its command.
#[derive(Debug)]
pub struct Executed {
    /// The pid in the guest.
    pub pid: u32,
    /// The same process as a pidfd.
    pub pidfd: OwnedFd,
    /// The master of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
}

/// The right to start a created container, once.
#[derive(Debug)]
pub struct Start(Conversation);

/// Makes a container up to the point before its command. `joined` are namespaces of other
/// containers.
pub async fn create(
    request: InitRequest,
    stdio: Stdio,
    joined: Vec<Joined>,
) -> Result<Created, Failure> {
    let container = request.container.clone();
    let (kinds, namespaces): (Vec<_>, Vec<_>) = joined
        .into_iter()
        .map(|joined| (joined.kind, joined.namespace))
        .unzip();
    let (terminal, streams) = split(stdio);
    let request = Request::Init {
        request: Box::new(request),
        joined: kinds,
        terminal,
    };
    let fds: Vec<_> = namespaces.iter().chain(&streams).map(AsFd::as_fd).collect();
    let mut conversation = Conversation::open(&container, &request, &fds)?;
    drop((namespaces, streams));
    let ready = conversation.until_ready().await?;
    Ok(Created {
        pid: ready.pid,
        pidfd: ready.pidfd,
        terminal: ready.files.into_iter().next(),
        start: Start(conversation),
    })
}

/// Makes the first process of a placeholder's PID namespace. `joined` are its other namespaces.
pub async fn first_process(
    request: PlaceholderRequest,
    joined: Vec<Joined>,
) -> Result<Executed, Failure> {
    let container = request.container.clone();
    let (kinds, namespaces): (Vec<_>, Vec<_>) = joined
        .into_iter()
        .map(|joined| (joined.kind, joined.namespace))
        .unzip();
    let request = Request::Placeholder {
        request: Box::new(request),
        joined: kinds,
    };
    let fds: Vec<_> = namespaces.iter().map(AsFd::as_fd).collect();
    let mut conversation = Conversation::open(&container, &request, &fds)?;
    conversation.executed().await
}

/// Makes a placeholder's namespaces as `hold` does, but in a user namespace. `joined` are
/// namespaces of other containers.
pub async fn hold_in_users(
    request: PlaceholderRequest,
    joined: Vec<Joined>,
) -> Result<Vec<(LinuxNamespaceType, OwnedFd)>, Failure> {
    let container = request.container.clone();
    let (kinds, namespaces): (Vec<_>, Vec<_>) = joined
        .into_iter()
        .map(|joined| (joined.kind, joined.namespace))
        .unzip();
    let wanted = Namespaces::of(&request.spec, &kinds, &request.guest_namespaces)?;
    let kept = placeholder::kept(&request.spec, &wanted);
    let request = Request::Hold {
        request: Box::new(request),
        joined: kinds,
    };
    let fds: Vec<_> = namespaces.iter().map(AsFd::as_fd).collect();
    let mut conversation = Conversation::open(&container, &request, &fds)?;
    let ready = conversation.until_ready().await?;
    if ready.files.len() != kept.len() {
        return Err(conversation.ended("without all of its namespaces"));
    }
    let kinds = kept.into_iter().map(|(kind, _)| kind);
    Ok(kinds.zip(ready.files).collect())
}

/// Runs a further process in the container whose init is `init`.
pub async fn exec(
    request: ExecRequest,
    init: BorrowedFd<'_>,
    stdio: Stdio,
) -> Result<Executed, Failure> {
    let container = request.container.clone();
    let (terminal, streams) = split(stdio);
    let request = Request::Exec {
        request: Box::new(request),
        terminal,
    };
    let mut fds = vec![init];
    fds.extend(streams.iter().map(AsFd::as_fd));
    let mut conversation = Conversation::open(&container, &request, &fds)?;
    drop(streams);
    conversation.executed().await
}

impl Start {
    /// Lets the init run its command. If the command can't be run, the init says so on its stderr
    /// and ends.
    pub async fn start(mut self) -> Result<(), Failure> {
        match self.0.channel.get_ref().send_byte(START) {
            // The init was killed meanwhile, which its exit tells.
            Ok(()) | Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {}
            Err(error) => return Err(error).step(|| "start the container's process"),
        }
        self.0.until_running(START_DEADLINE).await
    }
}

fn split(stdio: Stdio) -> (Option<Size>, Vec<OwnedFd>) {
    match stdio {
        Stdio::Terminal { width, height } => (Some(Size { width, height }), Vec::new()),
        Stdio::Streams {
            stdin,
            stdout,
            stderr,
        } => (None, vec![stdin, stdout, stderr]),
    }
}

/// A process that is ready to run its command.
struct Ready {
    pid: u32,
    pidfd: OwnedFd,
    /// The master of its terminal, or a placeholder's namespaces.
    files: Vec<OwnedFd>,
}

/// The messages over one channel, until it closes.
#[derive(Debug)]
struct Conversation {
    container: String,
    channel: Watched<Channel>,
    /// Killed when this is dropped, unless the command runs.
    unfinished: Vec<OwnedFd>,
}

impl Conversation {
    /// Starts a runner and hands it its request.
    fn open(container: &str, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Self> {
        let (ours, theirs) = Channel::pair()?;
        let runner = Command::new("/proc/self/exe")
            .arg("runner")
            .env_clear()
            .stdin(theirs)
            .stdout(ProcessStdio::null())
            .spawn()
            .step(|| format!("start a runner for container {container}"))?;
        // Without the pidfd a runner that hangs is not killed, no more. It may have been reaped by
        // now.
        let pid = i32::try_from(runner.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let pidfd = pid.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
        let channel = Watched::new(ours, Interest::READABLE | Interest::WRITABLE)
            .step(|| format!("watch the runner of container {container}"))?;
        channel.get_ref().send_request(request, fds)?;
        Ok(Self {
            container: container.to_owned(),
            channel,
            unfinished: pidfd.into_iter().collect(),
        })
    }

    /// Waits until the process runs its command, which nobody has to start.
    async fn executed(&mut self) -> Result<Executed> {
        let ready = self.until_ready().await?;
        self.until_running(SETUP_DEADLINE).await?;
        Ok(Executed {
            pid: ready.pid,
            pidfd: ready.pidfd,
            terminal: ready.files.into_iter().next(),
        })
    }

    /// Waits until the process is there and all is done but its command.
    async fn until_ready(&mut self) -> Result<Ready> {
        let all = async {
            let (mut spawned, mut ready) = (None, None);
            loop {
                match self.next().await? {
                    Some((Message::Spawned { pid }, fds)) => {
                        let pidfd = fds.into_iter().next();
                        let pidfd = pidfd.ok_or_else(|| self.ended("without a pidfd"))?;
                        let kept = pidfd.try_clone().step(|| "keep the process's pidfd")?;
                        self.unfinished.push(kept);
                        spawned = Some((pid, pidfd));
                    }
                    Some((Message::Ready, fds)) => ready = Some(fds),
                    Some(other) => self.handle(other)?,
                    None => return Err(self.ended("before the command was ready")),
                }
                match (spawned.take(), ready.take()) {
                    (Some((pid, pidfd)), Some(files)) => return Ok(Ready { pid, pidfd, files }),
                    (earlier, other) => (spawned, ready) = (earlier, other),
                }
            }
        };
        tokio::time::timeout(SETUP_DEADLINE, all)
            .await
            .unwrap_or_else(|_| {
                Err(Failure::new(
                    Kind::Failed,
                    format!("not done after {SETUP_DEADLINE:?}"),
                ))
            })
    }

    /// Waits until the channel closes: then the process has become its command.
    async fn until_running(&mut self, deadline: Duration) -> Result<()> {
        let closed = async {
            while let Some(message) = self.next().await? {
                self.handle(message)?;
            }
            Ok(())
        };
        let result = tokio::time::timeout(deadline, closed)
            .await
            .unwrap_or_else(|_| {
                Err(Failure::failed(
                    "start the command",
                    format!("not done after {deadline:?}"),
                ))
            });
        if result.is_ok() {
            self.unfinished.clear();
        }
        result
    }

    async fn next(&self) -> Result<Option<(Message, Vec<OwnedFd>)>> {
        let received = self
            .channel
            .async_io(Interest::READABLE, |channel| channel.try_receive())
            .await;
        match received {
            // A killed process may leave its start byte unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            received => {
                received.step(|| format!("hear the runner of container {}", self.container))
            }
        }
    }

    fn handle(&self, (message, _): (Message, Vec<OwnedFd>)) -> Result<()> {
        match message {
            Message::Failed { error } => Err(error.into()),
            Message::Note { text } => {
                log::warn!("container {}: {text}", self.container);
                Ok(())
            }
            Message::Spawned { .. } | Message::Ready => Err(self.ended("out of turn")),
        }
    }

    fn ended(&self, when: &str) -> Failure {
        Failure::failed(
            format!("set up a process of container {}", self.container),
            format!("it ended {when}"),
        )
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        for process in &self.unfinished {
            // A process that has gone already is as good.
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
        }
    }
}
