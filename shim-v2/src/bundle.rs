//! What the front of the shim reads of a bundle's `config.json`, and the files `address` and `oom`
//! that it leaves there.
//!
//! Called by `bootstrap` (which pod a container belongs to) and `pod` (whether it is a CRI pod's
//! sandbox). Everything else of the spec is read by `spec`, which also caps the file's length.

use kata_like_failure::Failure;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::spec;

/// The annotation that puts containers into one shim, by any name.
const GROUP: &str = "io.containerd.runc.v2.group";
/// The name of the pod that a container belongs to, the id of its sandbox container: containerd's
/// and CRI-O's.
const SANDBOX_ID: [&str; 2] = [
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];
/// The kind of a container, `sandbox` or `container`: containerd's and CRI-O's.
const CONTAINER_TYPE: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// Why a bundle can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// `config.json` can't be read.
    #[error("read {}", path.display())]
    Read {
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// `config.json` is no JSON of a spec.
    #[error("parse {}", path.display())]
    Parse {
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The file `address` can't be written.
    #[error("write {}", path.display())]
    WriteAddress {
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

impl From<BundleError> for Failure {
    fn from(error: BundleError) -> Self {
        Self::failed(error.to_string(), error)
    }
}

/// What a container is within its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A container of its own (`ctr`, nerdctl).
    Alone,
    /// A CRI pod's sandbox: the pod ends with it.
    CriSandbox,
    /// A container that lives in a CRI pod.
    CriContainer,
}

/// The pod that a container says it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The name that all containers of the pod share.
    pub group: String,
    /// What it is there.
    pub role: Role,
    /// The path of the network namespace that it is given, if it is given one.
    pub network: Option<PathBuf>,
}

#[derive(serde::Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    /// What is wrong with it is told when the container is made.
    #[serde(default)]
    linux: serde_json::Value,
}

impl Spec {
    fn network(&self) -> Option<PathBuf> {
        let mut namespaces = self.linux.get("namespaces")?.as_array()?.iter();
        let network = namespaces.find(|it| it.get("type").is_some_and(|kind| kind == "network"))?;
        Some(network.get("path")?.as_str()?.into()).filter(|path: &PathBuf| path.is_absolute())
    }
}

impl Membership {
    /// Reads it from the bundle of the container `id`.
    pub fn read(bundle: &Path, id: &str) -> Result<Self, BundleError> {
        let path = bundle.join(spec::FILE);
        let document = match spec::document(bundle) {
            Ok(document) => document,
            Err(source) => return Err(BundleError::Read { path, source }),
        };
        match serde_json::from_slice::<Spec>(&document) {
            Ok(spec) => {
                let network = spec.network();
                let annotations = spec.annotations.unwrap_or_default();
                Ok(Self::of(&annotations, id, network))
            }
            Err(source) => Err(BundleError::Parse { path, source }),
        }
    }

    fn of(annotations: &BTreeMap<String, String>, id: &str, network: Option<PathBuf>) -> Self {
        let named = |key| {
            annotations
                .get(key)
                .map(String::as_str)
                .filter(|name| !name.is_empty())
        };
        Self {
            group: named(GROUP)
                .or_else(|| SANDBOX_ID.into_iter().find_map(named))
                .unwrap_or(id)
                .to_owned(),
            role: match CONTAINER_TYPE.into_iter().find_map(named) {
                Some("sandbox") => Role::CriSandbox,
                Some("container") => Role::CriContainer,
                _ => Role::Alone,
            },
            network,
        }
    }
}

/// Leaves the shim's address in the bundle, whole or not at all: containerd 1.7 finds the shim by
/// it after a restart.
pub fn write_address(bundle: &Path, address: &str) -> Result<(), BundleError> {
    let path = bundle.join("address");
    let half = bundle.join(".address");
    let write = || {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(&half)?;
        file.write_all(address.as_bytes())?;
        std::fs::rename(&half, &path)
    };
    write().map_err(|source| BundleError::WriteAddress {
        path: path.clone(),
        source,
    })
}

/// Leaves the file by which CRI-O learns that processes of the container were killed for its memory
/// limit: it looks for it when the container has ended with another status than 0.
pub fn note_out_of_memory(bundle: &Path) -> io::Result<()> {
    std::fs::File::create(bundle.join("oom")).map(drop)
}

/// The address that [`write_address`] has left, if any.
pub fn read_address(bundle: &Path) -> Option<String> {
    std::fs::read_to_string(bundle.join("address")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership(json: &str) -> Result<Membership, BundleError> {
        let bundle = tempfile::tempdir().expect("a directory");
        std::fs::write(bundle.path().join("config.json"), json).expect("a file");
        Membership::read(bundle.path(), "own")
    }

    #[test]
    fn a_container_without_annotations_is_alone() {
        for json in [
            "{}",
            r#"{"annotations":null}"#,
            r#"{"process":{"args":[]}}"#,
        ] {
            let found = membership(json).expect(json);
            assert_eq!((found.group.as_str(), found.role), ("own", Role::Alone));
        }
    }

    #[test]
    fn cri_s_annotations_name_the_pod() {
        let json = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod",
            "io.kubernetes.cri.container-type":"container"}}"#;
        let found = membership(json).expect("annotations");
        assert_eq!(
            (found.group.as_str(), found.role),
            ("pod", Role::CriContainer)
        );
    }

    #[test]
    fn cri_o_s_annotations_name_the_pod() {
        for (kind, role) in [
            ("sandbox", Role::CriSandbox),
            ("container", Role::CriContainer),
        ] {
            let json = format!(
                r#"{{"annotations":{{"io.kubernetes.cri-o.SandboxID":"pod",
                "io.kubernetes.cri-o.ContainerType":"{kind}"}}}}"#
            );
            let found = membership(&json).expect("annotations");
            assert_eq!((found.group.as_str(), found.role), ("pod", role));
        }
    }

    #[test]
    fn the_group_annotation_goes_before_cri_s() {
        let json = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod",
            "io.containerd.runc.v2.group":"group"}}"#;
        assert_eq!(membership(json).expect("annotations").group, "group");
    }

    #[test]
    fn only_a_network_namespace_with_a_path_is_given() {
        let network = |namespace: &str| {
            let json = format!(r#"{{"linux": {{"namespaces": [{namespace}]}}}}"#);
            membership(&json).expect("a spec").network
        };
        let uts = r#"{"type": "uts", "path": "/run/uts"}"#;
        let both = format!(r#"{uts}, {{"type": "network", "path": "/run/netns/a"}}"#);
        assert_eq!(network(&both), Some("/run/netns/a".into()));
        assert_eq!(network(uts), None);
        assert_eq!(network(r#"{"type": "network"}"#), None);
        assert_eq!(network("7"), None);
    }

    #[test]
    fn a_broken_spec_is_named_with_the_place() {
        let error = membership(r#"{"annotations":"#).expect_err("half a document");
        let line = kata_like_failure::one_line(&error);
        assert!(line.contains("config.json: EOF"), "{line}");
    }

    #[test]
    fn what_is_no_object_or_too_long_is_no_spec() {
        let line =
            |json: &str| kata_like_failure::one_line(&membership(json).expect_err("no spec"));
        assert!(line(" []").contains("config.json: it is a JSON array"));
        let long = format!("{{\"annotations\":{{\"a\":\"{}\"}}}}", "x".repeat(4 << 20));
        assert!(line(&long).contains("config.json: it is longer than"));
    }

    #[test]
    fn the_address_is_replaced_whole() {
        let bundle = tempfile::tempdir().expect("a directory");
        write_address(bundle.path(), "unix:///a/long/one").expect("write");
        write_address(bundle.path(), "unix:///b").expect("write again");
        assert_eq!(read_address(bundle.path()).as_deref(), Some("unix:///b"));
        let names = std::fs::read_dir(bundle.path()).expect("list").count();
        assert_eq!(names, 1, "nothing half-written is left");
    }
}
