//! Kubernetes' Container Runtime Interface from the kubelet's side, as far as the integration tests
//! need it.
//!
//! `kata-like-tests` calls it. The messages are generated from `cri.proto`; [`Client`] makes one
//! unary gRPC call at a time on a UNIX socket. The answers of Exec, Attach and PortForward lead to
//! [`Stream`] and [`Forward`], each a WebSocket, or to [`Spdy`]. A whole gRPC stack would be some
//! fifty crates, for one POST with a length before the message.

mod client;
mod forward;
mod spdy;
mod stream;
mod upgrade;
mod websocket;

/// The messages of `cri.proto`.
#[allow(warnings, reason = "generated code")]
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/messages/mod.rs"));
    pub use cri::*;
}

pub use client::{Client, Error, Request};
pub use forward::Forward;
pub use spdy::Spdy;
pub use stream::{Channel, Ended, Stream};
