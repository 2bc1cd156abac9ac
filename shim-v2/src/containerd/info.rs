//! Answers `delete` and `-info`: protobuf on stdout, nothing else.
//!
//! Called by `main`. `delete` runs after every ordinary deletion too, while the pod's shim may
//! serve others: what it may touch is `cleanup`'s to know. `-info` needs no KVM, no configuration,
//! and changes nothing; what it claims is what the agent applies.

use std::io::{self, Write};
use std::path::Path;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::bundle;
use crate::containerd::convert;
use crate::containerd::flags::Flags;
use crate::containerd::socket;
use crate::pod::cleanup;
use kata_like_failure::Failure;

/// The runtime's name in containerd's configuration.
const RUNTIME: &str = "io.containerd.kata-like.v2";
/// The type of the OCI runtime's features, as containerd's typeurl names it.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Why `delete` or `-info` failed.
#[derive(Debug, thiserror::Error)]
pub enum InfoError {
    /// What was left of the container.
    #[error("clean up after {id}")]
    CleanUp {
        id: String,
        #[source]
        source: Failure,
    },
    #[error("encode the answer to containerd")]
    Encode(#[source] protobuf::Error),
    #[error("answer containerd")]
    Answer(#[source] io::Error),
}

/// The whole of `delete`.
pub fn delete(flags: &Flags) -> Result<(), InfoError> {
    let here = std::env::current_dir().unwrap_or_default();
    let bundle: &Path = match flags.bundle.as_os_str().is_empty() {
        true => &here,
        false => &flags.bundle,
    };
    let deleted = cleanup::delete(&flags.namespace, &flags.id, bundle).map_err(|source| {
        InfoError::CleanUp {
            id: flags.id.clone(),
            source,
        }
    })?;
    if let Some(address) = bundle::read_address(bundle)
        && let Some(path) = address.strip_prefix("unix://")
    {
        socket::remove_dead(Path::new(path));
    }
    print(&DeleteResponse {
        pid: deleted.pid,
        exit_status: deleted.status,
        exited_at: convert::timestamp(deleted.exited_at),
        ..DeleteResponse::default()
    })
}

/// The whole of `-info`.
pub fn info() -> Result<(), InfoError> {
    print(&runtime_info())
}

fn runtime_info() -> RuntimeInfo {
    RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    }
}

/// The features document of the OCI runtime specification, `features.md`.
fn features() -> serde_json::Value {
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": [],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {
                "v1": false,
                "v2": true,
                "systemd": false,
                "systemdUser": false,
                "rdma": false
            },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } }
        }
    })
}

fn print(message: &impl Message) -> Result<(), InfoError> {
    let bytes = message.write_to_bytes().map_err(InfoError::Encode)?;
    let mut out = io::stdout().lock();
    out.write_all(&bytes)
        .and_then(|()| out.flush())
        .map_err(InfoError::Answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_features_are_typed_as_containerd_expects() {
        let bytes = runtime_info().write_to_bytes().expect("a small message");
        let info = RuntimeInfo::parse_from_bytes(&bytes).expect("our own message");
        assert_eq!(info.name, "io.containerd.kata-like.v2");
        let features = info.features.as_ref().expect("features");
        assert_eq!(features.type_url, FEATURES);
        let json: serde_json::Value = serde_json::from_slice(&features.value).expect("JSON");
        assert_eq!(json["linux"]["cgroup"]["v1"], false);
        // Both, and kubelet would take it that volumes come with mapped ids.
        let namespaces = json["linux"]["namespaces"].as_array();
        assert!(namespaces.is_some_and(|names| names.contains(&"user".into())));
        assert_eq!(json["linux"]["mountExtensions"]["idmap"]["enabled"], false);
    }
}
