//! What disks, network, clock and streams need of a running VM: its agent, its VMM, its streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kata_like_config::state::{StateFolder, name};
use kata_like_failure::{Failure, Kind};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::agent::Agent;
use super::launch::Vmm;

/// How long a stream may take to be taken by the VMM.
const OPEN_STREAM: Duration = Duration::from_secs(10);

/// A running guest. Clones refer to the same one.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Makes the calls into the guest.
    pub agent: Agent,
    /// Tells how the VM is, and fills its slots.
    pub vmm: Vmm,
    /// The id of the sandbox, for the log.
    pub sandbox: Arc<str>,
    /// Holds the socket for streams.
    state: Arc<StateFolder>,
    ending: Ending,
}

/// Whether a VM's end is wanted: then it is no event.
#[derive(Clone, Debug, Default)]
pub struct Ending(Arc<AtomicBool>);

impl Ending {
    /// Whether it is.
    pub fn is_wanted(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl Guest {
    /// A guest whose agent has dialled.
    pub fn new(agent: Agent, vmm: Vmm, state: Arc<StateFolder>, sandbox: &str) -> Self {
        Self {
            agent,
            vmm,
            sandbox: sandbox.into(),
            state,
            ending: Ending::default(),
        }
    }

    /// Opens a standard stream in the guest: connects and sends the token.
    pub async fn open_stream(&self, token: [u8; 16]) -> Result<UnixStream, Failure> {
        let what = "open a stream into the guest";
        let path = self.state.short_path(name::STREAMS);
        let work = async {
            let mut stream = UnixStream::connect(path).await?;
            stream.write_all(&token).await?;
            Ok::<_, std::io::Error>(stream)
        };
        tokio::select! {
            opened = tokio::time::timeout(OPEN_STREAM, work) => match opened {
                Ok(opened) => opened.map_err(|cause| Failure::failed(what, cause)),
                Err(_) => Err(Failure::new(
                    Kind::DeadlineExceeded,
                    format!("{what}: the VMM has not taken it within {OPEN_STREAM:?}"),
                )),
            },
            why = self.vmm.ended() => {
                Err(Failure::new(Kind::Failed, format!("{what}: {why}")))
            }
        }
    }

    /// From now on the VM's end is wanted, and no event.
    pub fn begin_end(&self) {
        self.ending.0.store(true, Ordering::SeqCst);
    }

    /// Whether the VM has ended or is to end.
    pub fn is_ending(&self) -> bool {
        self.ending.is_wanted() || self.vmm.has_ended()
    }

    /// Tells whether the VM's end is wanted. Does not keep the guest.
    pub fn ending(&self) -> Ending {
        self.ending.clone()
    }

    /// Whether it makes sense to ask the guest for something.
    pub fn answers(&self) -> bool {
        !self.is_ending() && !self.agent.is_stuck()
    }
}
