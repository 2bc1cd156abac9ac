//! One pod's microVM, seen from the shim: brought up step by step, taken down in reverse.
//!
//! Called by `pod`. Everything here is in the shim's own types: containerd's messages stop in
//! `service` and `convert`, the agent's in `agent`. What flows back (an exit, a lack of memory, the
//! end of the VM) is a [`SandboxEvent`] on the channel that the caller handed down.
//!
//! Invariants: no lock is held over a call into the guest; every such call has a deadline that is
//! bound to the guest's progress, and goes on if its caller leaves; whatever a step has made, its
//! guard takes down, also when a later step fails.

use std::sync::Arc;

use tokio::net::UnixStream;

pub use crate::error::{SandboxError, SandboxErrorKind};
pub use crate::request::{
    ContainerRequest, CreatedContainer, ExecRequest, GuestProcess, RootfsMount, SandboxEvent,
    SandboxRequest, Stats, StreamTokens,
};

/// A running microVM with its file server. Dropping the last reference takes all of it down.
#[derive(Debug)]
pub struct Sandbox {}

#[allow(clippy::unused_async)]
impl Sandbox {
    /// Brings the VM up, to the agent's answer to its first call.
    pub async fn start(_request: SandboxRequest) -> Result<Arc<Self>, SandboxError> {
        Err(SandboxError::new(
            SandboxErrorKind::Unsupported,
            "start a sandbox",
        ))
    }

    /// Makes a container up to the point before its first instruction.
    pub async fn create_container(
        &self,
        _request: ContainerRequest,
    ) -> Result<CreatedContainer, SandboxError> {
        Err(SandboxError::new(
            SandboxErrorKind::Unsupported,
            "create a container",
        ))
    }

    /// Lets a created container run.
    pub async fn start_container(&self, _id: &str) -> Result<(), SandboxError> {
        Err(SandboxError::new(
            SandboxErrorKind::Unsupported,
            "start a container",
        ))
    }

    /// Runs a further process in a container and answers the host pid of its stand-in.
    pub async fn exec(&self, _request: ExecRequest) -> Result<u32, SandboxError> {
        Err(SandboxError::new(SandboxErrorKind::Unsupported, "exec"))
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
        Err(SandboxError::new(SandboxErrorKind::Unsupported, "signal"))
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(
        &self,
        _id: &str,
        _exec: &str,
        _width: u32,
        _height: u32,
    ) -> Result<(), SandboxError> {
        Err(SandboxError::new(
            SandboxErrorKind::Unsupported,
            "resize a terminal",
        ))
    }

    /// The processes of a container, the init first.
    pub async fn processes(&self, _id: &str) -> Result<Vec<GuestProcess>, SandboxError> {
        Err(SandboxError::new(
            SandboxErrorKind::Unsupported,
            "list processes",
        ))
    }

    /// A container's figures; also after its exit.
    pub async fn stats(&self, _id: &str) -> Result<Stats, SandboxError> {
        Err(SandboxError::new(
            SandboxErrorKind::Unsupported,
            "read figures",
        ))
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
        Err(SandboxError::new(
            SandboxErrorKind::Unsupported,
            "open a stream",
        ))
    }

    /// Ends the pod: the guest is told, then VM, file server, stand-ins, mounts, cgroups and state
    /// folder go. Can be called again.
    pub async fn stop(&self) {}
}
