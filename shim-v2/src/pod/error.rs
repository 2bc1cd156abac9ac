//! Why the pod can't do what is asked: a kind for each of containerd's codes, which `convert` gives.

use crate::bundle::BundleError;
use crate::sandbox::SandboxError;
use crate::stdio::StdioError;

/// Why the pod can't do what is asked; `convert` gives each its code.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// No such container or process, or one that has exited.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// Not now, by containerd's rules.
    #[error("{0}")]
    WrongState(String),
    /// The request is malformed.
    #[error("{0}")]
    BadRequest(String),
    /// Not supported.
    #[error("{0}")]
    Unsupported(String),
    /// Refused, in the words of runc's shim.
    #[error("{0}")]
    Refused(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
    /// containerd's streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The bundle's files.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}
