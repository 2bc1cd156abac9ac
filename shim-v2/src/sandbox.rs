//! One pod's microVM, seen from the shim: brought up step by step, taken down in reverse.
//!
//! Called by `pod`. Everything here is in the shim's own types: containerd's messages stop in
//! `service` and `convert`, the agent's in `agent`. What flows back (an exit, a lack of memory, the
//! end of the VM) is a [`SandboxEvent`] on the channel that the caller handed down.
//!
//! Invariants: no lock is held over a call into the guest; every such call has a deadline that is
//! bound to the guest's progress, and goes on if its caller leaves; whatever a step has made, its
//! guard takes down, also when a later step fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// What a sandbox is made from.
#[derive(Debug)]
pub struct SandboxRequest {
    /// containerd's namespace.
    pub namespace: String,
    /// The id of the sandbox: that of its first container.
    pub id: String,
    /// The first container's bundle.
    pub bundle: PathBuf,
    /// The configuration file named by the runtime's options; none: the installed one.
    pub config_path: Option<PathBuf>,
    /// Where the sandbox tells what happens in it.
    pub events: mpsc::UnboundedSender<SandboxEvent>,
}

/// One mount of the root file system that containerd asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// The file system's type, or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Where below the bundle's `rootfs`; empty: on it.
    pub target: String,
    /// Options as in fstab(5).
    pub options: Vec<String>,
}

/// A container to be made.
#[derive(Debug)]
pub struct ContainerRequest {
    /// containerd's id.
    pub id: String,
    /// The container's bundle, which holds `config.json`.
    pub bundle: PathBuf,
    /// The root file system's mounts; empty: the spec's `root.path` is it.
    pub rootfs: Vec<RootfsMount>,
    /// The init's standard streams.
    pub streams: StreamTokens,
}

/// The standard streams of a process: the token that opens each, or none for `/dev/null`.
#[derive(Clone, Debug, Default)]
pub struct StreamTokens {
    /// Opens the standard input.
    pub stdin: Option<[u8; 16]>,
    /// Opens the standard output; with a terminal, the terminal's.
    pub stdout: Option<[u8; 16]>,
    /// Opens the standard error; none with a terminal.
    pub stderr: Option<[u8; 16]>,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// The terminal's first width in columns; 0: the spec's, if it has one.
    pub width: u32,
    /// The terminal's first height in rows; 0: the spec's, if it has one.
    pub height: u32,
}

/// A further process for a running container.
#[derive(Debug)]
pub struct ExecRequest {
    /// The container's id.
    pub container: String,
    /// The exec's id.
    pub exec: String,
    /// The OCI `process` object as JSON.
    pub process: Vec<u8>,
    /// The process's standard streams.
    pub streams: StreamTokens,
}

/// A container that has been made and waits for its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreatedContainer {
    /// The host pid of the task's stand-in.
    pub pid: u32,
}

/// A process of a container, as the guest lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestProcess {
    /// The host pid of its stand-in for an init or an exec; 0 for a process they have made.
    pub pid: u32,
    /// Its pid in the guest.
    pub guest_pid: u32,
    /// The exec it is the first process of; empty for all others.
    pub exec: String,
}

/// A container's figures, from its cgroup in the guest. Times are in microseconds, memory in bytes,
/// and a limit of `u64::MAX` means none.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub cpu_usage_us: u64,
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_us: u64,
    pub memory_usage: u64,
    pub memory_limit: u64,
    pub memory_peak: u64,
    pub memory_anon: u64,
    pub memory_file: u64,
    pub memory_inactive_file: u64,
    pub memory_active_file: u64,
    pub memory_kernel_stack: u64,
    pub memory_slab: u64,
    pub page_faults: u64,
    pub page_major_faults: u64,
    pub oom_kills: u64,
    pub swap_usage: u64,
    pub swap_limit: u64,
    pub pids_current: u64,
    /// 0: no limit.
    pub pids_limit: u64,
}

/// What happens in a sandbox, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SandboxEvent {
    /// A process is gone. Told once for each.
    Exited {
        /// The container.
        container: String,
        /// The exec; empty: the container's init.
        exec: String,
        /// 0 to 255, or 128 + signal.
        status: u32,
        /// When, by the guest's clock.
        at: SystemTime,
        /// How much standard output must have been read before the exit is told.
        stdout_bytes: u64,
        /// How much standard error must have been read before the exit is told.
        stderr_bytes: u64,
    },
    /// Processes of a container were killed for its memory limit.
    OutOfMemory {
        /// The container.
        container: String,
    },
    /// A task's stand-in was killed by someone: the task is to be killed.
    StandInDied {
        /// The container.
        container: String,
        /// The exec; empty: the container's init.
        exec: String,
    },
    /// The VM, its file server or its agent is gone, and with it every task. The last event.
    Ended {
        /// One line: what ended, and why.
        reason: String,
    },
}

/// What kind of failure it is: the caller maps it to one of containerd's status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxErrorKind {
    /// No such container or process.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// Not in this state.
    WrongState,
    /// The request is malformed.
    BadRequest,
    /// A field asks for what is not supported; the text names it.
    Unsupported,
    /// The guest did not answer in time.
    DeadlineExceeded,
    /// Anything else.
    Failed,
}

/// Why a step of the sandbox failed: `Display` is step and object, the chain of sources the cause.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct SandboxError {
    kind: SandboxErrorKind,
    step: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl SandboxError {
    /// What kind of failure it is.
    pub fn kind(&self) -> SandboxErrorKind {
        self.kind
    }

    /// The whole chain on one line.
    pub fn one_line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        line.replace(['\n', '\r'], " ")
    }

    fn not_yet(step: &str) -> Self {
        Self {
            kind: SandboxErrorKind::Unsupported,
            step: format!("{step}: not written yet"),
            source: None,
        }
    }
}

/// A running microVM with its file server. Dropping the last reference takes all of it down.
#[derive(Debug)]
pub struct Sandbox {}

#[allow(clippy::unused_async)]
impl Sandbox {
    /// Brings the VM up, to the agent's answer to its first call.
    pub async fn start(_request: SandboxRequest) -> Result<Arc<Self>, SandboxError> {
        Err(SandboxError::not_yet("start a sandbox"))
    }

    /// Makes a container up to the point before its first instruction.
    pub async fn create_container(
        &self,
        _request: ContainerRequest,
    ) -> Result<CreatedContainer, SandboxError> {
        Err(SandboxError::not_yet("create a container"))
    }

    /// Lets a created container run.
    pub async fn start_container(&self, _id: &str) -> Result<(), SandboxError> {
        Err(SandboxError::not_yet("start a container"))
    }

    /// Runs a further process in a container and answers the host pid of its stand-in.
    pub async fn exec(&self, _request: ExecRequest) -> Result<u32, SandboxError> {
        Err(SandboxError::not_yet("exec"))
    }

    /// Signals a process, or with `all` every process of the container. `exec` is empty for the
    /// init. A process that has exited is `NotFound`.
    pub async fn signal(
        &self,
        _id: &str,
        _exec: &str,
        _signal: u32,
        _all: bool,
    ) -> Result<(), SandboxError> {
        Err(SandboxError::not_yet("signal"))
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(
        &self,
        _id: &str,
        _exec: &str,
        _width: u32,
        _height: u32,
    ) -> Result<(), SandboxError> {
        Err(SandboxError::not_yet("resize a terminal"))
    }

    /// The processes of a container, the init first.
    pub async fn processes(&self, _id: &str) -> Result<Vec<GuestProcess>, SandboxError> {
        Err(SandboxError::not_yet("list processes"))
    }

    /// A container's figures; also after its exit.
    pub async fn stats(&self, _id: &str) -> Result<Stats, SandboxError> {
        Err(SandboxError::not_yet("read figures"))
    }

    /// Takes a container away: in the guest, its mounts on the host, its stand-ins. Succeeds with a
    /// dead VM, and for a container that was never made.
    pub async fn delete_container(&self, _id: &str) -> Result<(), SandboxError> {
        Ok(())
    }

    /// Ends the stand-in of an exec that has exited.
    pub async fn forget_exec(&self, _id: &str, _exec: &str) {}

    /// Opens a standard stream in the guest: connects and sends the token.
    pub async fn open_stream(&self, _token: [u8; 16]) -> Result<UnixStream, SandboxError> {
        Err(SandboxError::not_yet("open a stream"))
    }

    /// Ends the pod: the guest is told, then VM, file server, stand-ins, mounts, cgroups and state
    /// folder go. Can be called again.
    pub async fn stop(&self) {}
}
