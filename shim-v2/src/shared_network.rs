//! The pod that lives in the network namespace which a container is given: `--net container:X` of Docker and nerdctl.
//!
//! Called by `bootstrap`, for a container that belongs to no pod by its annotations. Two virtual machines can't share a
//! network, so such a container becomes one of that pod's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kata_like_config::state::{ROOT, StateFolder};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::spec;

/// The sandbox of the pod, if there is one in this namespace of containerd's.
pub fn sandbox_of(namespace: &str, bundle: &Path) -> Option<String> {
    let given = identity(&given(&spec::read(bundle).ok()?)?)?;
    let folders = fs::read_dir(ROOT).ok()?.flatten();
    let pods = folders.filter_map(|folder| {
        let name = folder.file_name().into_string().ok()?;
        let (of, id) = name.split_once(':')?;
        let folder = (of == namespace).then(|| StateFolder::open(namespace, id))?;
        folder.ok()??.read_record().ok()?
    });
    let mut pods = pods.filter(|record| {
        let mut stand_ins = record.stand_ins.iter();
        stand_ins.any(|it| {
            let path = format!("/proc/{}/ns/net", it.process.pid);
            identity(Path::new(&path)) == Some(given)
        })
    });
    pods.next().map(|record| record.sandbox)
}

/// The path of the network namespace that a spec names.
fn given(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let mut namespaces = namespaces.iter();
    let network = namespaces.find(|it| it.typ() == LinuxNamespaceType::Network)?;
    network.path().clone()
}

/// What a namespace is known by, whatever path leads to it.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let about = fs::metadata(path).ok()?;
    Some((about.dev(), about.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_the_same_by_every_path() {
        let own = identity(Path::new("/proc/self/ns/net"));
        assert!(own.is_some());
        assert_eq!(own, identity(Path::new("/proc/thread-self/ns/net")));
        assert_ne!(own, identity(Path::new("/proc/self/ns/uts")));
        assert_eq!(identity(Path::new("/proc/0/ns/net")), None);
    }

    #[test]
    fn only_a_namespace_with_a_path_is_given() {
        let spec = |network: &str| -> Spec {
            let json =
                format!(r#"{{"ociVersion": "1.2.0", "linux": {{"namespaces": [{network}]}}}}"#);
            serde_json::from_str(&json).unwrap()
        };
        let path = given(&spec(r#"{"type": "network", "path": "/run/netns/a"}"#));
        assert_eq!(path, Some("/run/netns/a".into()));
        assert_eq!(given(&spec(r#"{"type": "network"}"#)), None);
        assert_eq!(given(&spec(r#"{"type": "uts", "path": "/run/uts"}"#)), None);
    }
}
