//! What a process of a pod gives up before it meets the guest, in order.
//!
//! Called by vmm and fsd, each once, on their only thread. Every step either succeeds or returns an
//! error that names it; the caller then ends: nothing runs half jailed.

pub mod seccomp;

use std::io;

use rustix::process::{Gid, Uid};

/// Why a process could not be jailed. The step says what was being done.
#[derive(Debug, thiserror::Error)]
#[error("jail the process: {step}")]
pub struct JailError {
    step: &'static str,
    #[source]
    source: io::Error,
}

impl JailError {
    pub(crate) fn new(step: &'static str, source: impl Into<io::Error>) -> Self {
        Self {
            step,
            source: source.into(),
        }
    }
}
