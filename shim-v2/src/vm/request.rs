//! What the pod asks of its sandbox, and what it hears from it.
//!
//! Plain values in the shim's own words, imported by `sandbox` and the parts below it; `sandbox`
//! re-exports them for those above.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use kata_like_agent_protocol::TOKEN_LENGTH;
use kata_like_config::state::NetworkLock;
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
    /// The mount namespace of containerd, where hooks run; none: the shim's own.
    pub host_mounts: Option<Arc<OwnedFd>>,
    /// The pod's network namespace, if it is the pod's already.
    pub network: Option<NetworkLock>,
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
    /// It holds the pod's namespaces and runs nothing: CRI's pause container.
    pub placeholder: bool,
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

/// What opens a stream: random bytes.
pub fn new_token() -> io::Result<[u8; TOKEN_LENGTH]> {
    let mut token = [0; TOKEN_LENGTH];
    File::open("/dev/urandom")?.read_exact(&mut token)?;
    Ok(token)
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

/// A container's figures, from its cgroup in the guest. Times are in microseconds, memory in bytes,
/// and a limit of `u64::MAX` means none.
#[allow(missing_docs)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    pub swap_peak: u64,
    /// The file `memory.stat`.
    pub memory_stat: HashMap<String, u64>,
    /// The file `memory.events`.
    pub memory_events: HashMap<String, u64>,
    pub io: Vec<DeviceIo>,
    pub huge_pages: Vec<HugePages>,
}

/// What a container has read from a device and written to it, in bytes and in operations.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    pub major: u64,
    pub minor: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// A container's huge pages of one size, in bytes.
#[allow(missing_docs)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// As in the names of the cgroup's files: "2MB".
    pub size: String,
    pub current: u64,
    pub max: u64,
    pub failures: u64,
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
