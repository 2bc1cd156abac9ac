//! What the agent asks of the runner, and the messages that they exchange.
//!
//! `container/` makes the requests, `client` sends them, `mod` obeys. A request travels as JSON in
//! a memory file beside the file descriptors, since a spec may be longer than a message. The
//! answers are short messages, each one JSON document in one packet.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use serde::{Deserialize, Serialize};

use super::error::Told;

/// Everything the runner needs for a container's init.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InitRequest {
    /// As the host names the container.
    pub container: String,
    /// The guest part of the OCI spec. `root.path` and `linux.cgroupsPath` are ignored.
    pub spec: Spec,
    /// The container's root directory, as the agent sees it.
    pub rootfs: PathBuf,
    /// Where each bind mount is from, by its index in the spec's list.
    pub binds: BTreeMap<usize, Bind>,
    /// The directory that volumes are looked up in.
    pub volumes: PathBuf,
    /// The directory that volumes in memory are looked up in.
    pub memory: PathBuf,
    /// Those of the spec's namespaces that are the guest's own.
    pub guest_namespaces: Vec<LinuxNamespaceType>,
    /// The container's cgroup, made and limited already. The device filter is attached here.
    pub cgroup: PathBuf,
}

/// Everything the runner needs for a further process in a running container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecRequest {
    /// As the host names the container.
    pub container: String,
    /// The spec that the container was made of.
    pub spec: Spec,
    /// The process to run.
    pub process: Process,
    /// The container's cgroup.
    pub cgroup: PathBuf,
    /// The cgroup of its init, which differs where the container has made cgroups of its own.
    pub cgroup_of_init: PathBuf,
}

/// Everything the runner needs for a placeholder: for its namespaces, and for the first process of
/// its PID namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlaceholderRequest {
    /// As the host names the container.
    pub container: String,
    /// The spec that says who the process is. Its command is ignored.
    pub spec: Spec,
    /// Those of the spec's namespaces that are the guest's own.
    pub guest_namespaces: Vec<LinuxNamespaceType>,
    /// The container's cgroup.
    pub cgroup: PathBuf,
}

/// Where a bind mount is from. Each name is a file or directory of its place, and no path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bind {
    Volume(String),
    /// A tmpfs of the pod's own.
    Memory(String),
}

/// A process's standard streams.
#[derive(Debug)]
pub enum Stdio {
    /// Three open files, which become fds 0, 1 and 2.
    Streams {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A new pseudo-terminal of the container's devpts. 0 by 0 means the size that the spec gives.
    Terminal {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
}

/// A namespace that the container shares with another one.
#[derive(Debug)]
pub struct Joined {
    /// The spec has an entry of this kind.
    pub kind: LinuxNamespaceType,
    /// An open file of the namespace.
    pub namespace: OwnedFd,
}

/// A terminal's first size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Size {
    pub(super) width: u16,
    pub(super) height: u16,
}

/// The first and only message to a runner. File descriptors come with it, in this order: the
/// namespaces to join or the init's pidfd, and then the three standard streams where there is no
/// terminal.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Make a container.
    Init {
        request: Box<InitRequest>,
        joined: Vec<LinuxNamespaceType>,
        terminal: Option<Size>,
    },
    /// Make the first process of a placeholder's PID namespace.
    Placeholder {
        request: Box<PlaceholderRequest>,
        joined: Vec<LinuxNamespaceType>,
    },
    /// Make a placeholder's namespaces, a user namespace among them, and open them.
    Hold {
        request: Box<PlaceholderRequest>,
        joined: Vec<LinuxNamespaceType>,
    },
    /// Run a further process.
    Exec {
        request: Box<ExecRequest>,
        terminal: Option<Size>,
    },
}

/// What the runner and the container's process say, until the process runs its command and so
/// closes the channel.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// From the runner: the process is born. Its pidfd comes along.
    Spawned { pid: u32 },
    /// From the process: something that was left out, for the log.
    Note { text: String },
    /// From the process: all is done but the start. The master of its terminal comes along, or a
    /// placeholder's namespaces.
    Ready,
    /// From either: it ends here.
    Failed { error: Told },
}

/// The byte that lets a created container run.
pub(super) const START: u8 = b's';
