//! The wire between shim and agent: messages and service generated from `agent.proto`, where each
//! call is documented, and the numbers both sides must agree on.
//!
//! Called by the shim (client) and the agent (server).

/// The messages of `agent.proto`.
#[allow(warnings, clippy::all, reason = "generated code")]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// Client and server of the service of `agent.proto`.
#[allow(warnings, clippy::all, reason = "generated code")]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

pub mod status;

/// Version of `agent.proto` and of what is said about it there.
pub const PROTOCOL_VERSION: u32 = 3;

/// The longest answer of the agent in bytes, its envelope included: what the largest calls come to,
/// `Stats` and `NextEvents`, several times over.
pub const MAX_ANSWER: usize = 64 << 10;

/// The most events in one answer.
pub const MOST_EVENTS: usize = 64;

/// The host's vsock port that the agent dials, once, to be called on that connection.
pub const AGENT_PORT: u32 = 1024;

/// The guest's vsock port where the agent takes the standard streams.
pub const STREAM_PORT: u32 = 1025;

/// Length of the token that opens a stream, in bytes.
pub const TOKEN_LENGTH: usize = 16;

/// The longest name of a container, exec or volume, in bytes.
pub const MAX_NAME: usize = 76;

/// The tag of the virtio-fs share that holds each container's rootfs, by container name.
pub const ROOTFS_TAG: &str = "rootfs";

/// The tag of the virtio-fs share that holds the volumes, by volume name.
pub const VOLUMES_TAG: &str = "volumes";

/// Whether `name` may name a container, an exec or a volume: see the head of `agent.proto`.
pub fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= MAX_NAME
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_never_a_path() {
        for good in ["a", "0", "a.b_c-d", &"x".repeat(MAX_NAME)] {
            assert!(is_name(good), "{good}");
        }
        let long = "x".repeat(MAX_NAME + 1);
        for bad in ["", ".", "..", "-a", "a/b", "a\0", "ä", &long] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }
}
