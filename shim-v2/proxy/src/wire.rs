//! What passes between the shim and the proxy, on the socket that `kata_like_boot` describes.
//!
//! The shim asks, and each question has a number. The proxy says nothing unasked but that it is
//! ready: so there is never more to be read than there are questions, and one message has a bound
//! ([`MAX_MESSAGE`]). The shim takes a proxy that breaks this for one that was taken over.
//!
//! A request to the agent is handed on as it is. Most are short and lie in the message; a long one
//! lies in a file beside it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use kata_like_boot::{Channel, ChannelError, VERSION};
use kata_like_failure::Kind;
use kata_like_linux::watch::Watched;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use kata_like_boot::MAX_MESSAGE;

use crate::event::Event;
use crate::figures::Stats;

/// How long the proxy waits for its boot request.
const BOOT_DEADLINE: Duration = Duration::from_secs(10);
/// The longest request that lies in its message, in bytes: as JSON each is up to four characters.
const SHORT: usize = 16 << 10;
/// The longest request in bytes: what a ttrpc server takes.
const LONGEST: usize = 4 << 20;

/// The first message. Beside it lies the agent's connection, non-blocking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyBoot {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// The user and group id that the proxy takes; not 0.
    pub uid: u32,
}

impl ProxyBoot {
    /// Sends the request, for the shim.
    ///
    /// # Errors
    /// The socket's.
    pub fn send(&self, agent: BorrowedFd<'_>, to: &Channel) -> Result<(), ChannelError> {
        to.send(self, &[agent])
    }

    /// Receives request and connection, for the proxy.
    ///
    /// # Errors
    /// None within ten seconds, another version, or not one descriptor.
    pub fn receive(from: &Channel) -> Result<(Self, OwnedFd), ChannelError> {
        let (boot, fds): (Self, _) = from.receive_within(BOOT_DEADLINE)?;
        if boot.version != VERSION {
            return Err(ChannelError::Version {
                theirs: boot.version,
                ours: VERSION,
            });
        }
        let got = fds.len();
        match <[OwnedFd; 1]>::try_from(fds) {
            Ok([agent]) => Ok((boot, agent)),
            Err(_) => Err(ChannelError::Descriptors { got, wanted: 1 }),
        }
    }
}

/// A question of the shim's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// Its number, given once.
    pub id: u64,
    /// What is asked.
    pub ask: Ask,
}

/// What the shim may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// To make a call.
    Call {
        /// Which one.
        method: Method,
        /// How long the agent may take, in milliseconds.
        limit_ms: u64,
        /// The request.
        request: Request,
    },
    /// To tell the next events, once there are some: [`Answer::Events`]. One such question at a
    /// time.
    Events,
}

/// The calls of `agent.proto` that the shim may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "agent.proto has what each call does")]
pub enum Method {
    StartPod,
    CreateContainer,
    StartContainer,
    Exec,
    Signal,
    Pause,
    Resume,
    Update,
    SetTime,
    ResizeTerminal,
    Stats,
    DeleteContainer,
    BindDevice,
    UnbindDevice,
    ConfigureNetwork,
    Connect,
    ServeNames,
    Shutdown,
    GetUnwritten,
}

/// The request of a call, as protobuf has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// These bytes.
    Here(Vec<u8>),
    /// So many bytes of the file beside the message, from its beginning.
    Beside(usize),
}

impl Request {
    /// A request of these bytes, and the file that holds them if they are too many for a message.
    ///
    /// # Errors
    /// There is no memory for the file.
    pub fn new(bytes: Vec<u8>) -> io::Result<(Self, Option<OwnedFd>)> {
        if bytes.len() <= SHORT {
            return Ok((Self::Here(bytes), None));
        }
        let mut file = File::from(memfd_create("request", MemfdFlags::CLOEXEC)?);
        file.write_all(&bytes)?;
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
        Ok((Self::Beside(bytes.len()), Some(file.into())))
    }

    /// Its bytes. `beside` is what came with the message.
    ///
    /// # Errors
    /// Not as many bytes as it says, or more than any request has.
    pub fn bytes(self, beside: Vec<OwnedFd>) -> io::Result<Vec<u8>> {
        match (self, <[OwnedFd; 1]>::try_from(beside)) {
            (Self::Here(bytes), Err(none)) if none.is_empty() => Ok(bytes),
            (Self::Beside(length), Ok([file])) if length <= LONGEST => {
                let mut bytes = vec![0; length];
                File::from(file).read_exact(&mut bytes)?;
                Ok(bytes)
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// What the proxy says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// Its jail is closed, and it waits for questions. The first message.
    Ready,
    /// The answer to a question.
    Answer {
        /// The question's number.
        id: u64,
        /// What it is.
        answer: Answer,
    },
    /// Why it ends. The last message.
    Failed {
        /// One line.
        why: String,
    },
}

/// The answer to a question. Each text is the guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The call was carried out, and has nothing more to say.
    Done,
    /// That of StartPod.
    PodStarted {
        /// The guest kernel's release.
        kernel_release: String,
        /// The agent's version.
        agent_version: String,
    },
    /// That of Stats.
    Stats(Box<Stats>),
    /// That of Shutdown and GetUnwritten.
    Unwritten {
        /// The guest ends.
        done: bool,
        /// So many bytes that the host has not.
        dirty_bytes: u64,
        /// So many containers with processes.
        containers: u32,
    },
    /// That of [`Ask::Events`]: one to 64, each of which can be.
    Events(Vec<Event>),
    /// The agent did not carry the call out.
    Refused {
        /// The kind of its error.
        kind: Kind,
        /// Its text.
        why: String,
    },
    /// The agent did what it may not, and nobody listens to it any more.
    Offence {
        /// What it did.
        why: String,
    },
    /// There was no answer, for another reason.
    Broken {
        /// Which.
        why: String,
    },
}

/// Sends a message as soon as there is room for it. The socket is non-blocking.
///
/// # Errors
/// The socket's.
pub async fn send(
    to: &Watched<Channel>,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> Result<(), ChannelError> {
    loop {
        let mut ready = to.writable().await.map_err(waiting)?;
        match to.get_ref().send(message, fds) {
            Err(ChannelError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                ready.clear_ready();
            }
            sent => return sent,
        }
    }
}

/// The next message and the descriptors beside it, whenever it comes.
///
/// # Errors
/// The socket's, and messages that are none.
pub async fn receive<M: DeserializeOwned>(
    from: &Watched<Channel>,
) -> Result<(M, Vec<OwnedFd>), ChannelError> {
    loop {
        let mut ready = from.readable().await.map_err(waiting)?;
        match from.get_ref().receive_within(Duration::ZERO) {
            // Somebody else's readiness, or a stale one.
            Err(ChannelError::TimedOut(_)) => ready.clear_ready(),
            received => return received,
        }
    }
}

fn waiting(source: io::Error) -> ChannelError {
    ChannelError::Io {
        step: "wait",
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_request_of_any_length_arrives_whole() {
        for length in [0, 1, SHORT, SHORT + 1, LONGEST] {
            let bytes: Vec<u8> = (0..length).map(|it| (it % 251) as u8).collect();
            let (ours, theirs) = Channel::pair().unwrap();
            let (request, file) = Request::new(bytes.clone()).unwrap();
            let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
            ours.send(&request, &fds).unwrap();
            let (request, fds): (Request, _) = theirs.receive().unwrap();
            assert!(request.bytes(fds).unwrap() == bytes, "{length}");
        }
    }

    #[test]
    fn a_request_is_no_longer_than_its_file() {
        let (_, file) = Request::new(vec![7; SHORT + 1]).unwrap();
        assert!(
            Request::Beside(SHORT + 2)
                .bytes(file.into_iter().collect())
                .is_err()
        );
        assert!(Request::Beside(1).bytes(Vec::new()).is_err());
        let (_, file) = Request::new(vec![7; SHORT + 1]).unwrap();
        assert!(
            Request::Here(vec![1])
                .bytes(file.into_iter().collect())
                .is_err()
        );
    }
}
