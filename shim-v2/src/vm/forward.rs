//! The pod's part of port-forward: whose namespace it is, and how a connection gets into the guest.
//!
//! Called by `network`, as soon as the guest has the pod's network, and when the VM has ended. A pod goes without it
//! where the host's kernel can't or may not steer connections; the log says so, once.

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError, Weak};

use tokio::net::UnixStream;

use super::Sandbox;
use super::bring_up::blocking;
use super::network::copy;
use crate::network::forward::{self, Forward};
use crate::vm::request::new_token;
use kata_like_failure::{Failure, Kind};

/// Begins to forward.
pub(super) async fn start(sandbox: &Arc<Sandbox>) {
    match listen(sandbox).await {
        Ok(forward) => keep(sandbox, Some(forward)),
        Err(error) => tracing::warn!(
            "port-forward is not there, the pod runs without it: {}",
            error.one_line()
        ),
    }
}

/// Ends it: nothing listens any more, and what was open is closed.
pub(super) fn end(sandbox: &Sandbox) {
    keep(sandbox, None);
}

fn keep(sandbox: &Sandbox, forward: Option<Forward>) {
    // Nothing panics while it is held.
    *sandbox
        .forward
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = forward;
}

async fn listen(sandbox: &Arc<Sandbox>) -> Result<Forward, Failure> {
    let namespace = copy(&sandbox.network)?;
    let own = sandbox.network_path.is_none();
    let listener = blocking(move || forward::listen_in(namespace.as_fd(), own)).await?;
    // Weak: connections that are being made don't keep the sandbox.
    let weak = Arc::downgrade(sandbox);
    listener.serve(move |port| connect(weak.clone(), port))
}

/// A connection to a port of the guest's loopback.
async fn connect(sandbox: Weak<Sandbox>, port: u16) -> Result<UnixStream, Failure> {
    let Some(sandbox) = sandbox.upgrade() else {
        let why = "the sandbox has been stopped";
        return Err(Failure::new(Kind::WrongState, why));
    };
    let token = new_token().map_err(|cause| Failure::failed("make a token", cause))?;
    sandbox.agent.connect(port, token).await?;
    sandbox.open_stream(token).await
}
