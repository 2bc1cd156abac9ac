//! The spec's namespaces: which of them are the guest's own, and which another container's.

use std::collections::HashMap;
use std::path::{Component, Path};

use kata_like_agent_protocol::agent::{Empty, Join, join::Whose};
use kata_like_failure::Failure;
use kata_like_spec::FOREIGN_NAMESPACE;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::parts::{NetworkPart, bad};

/// Takes the paths out of the spec's namespaces. Answers the network that the host gives, and whose
/// each namespace is that is no new one.
pub(super) fn split_namespaces(
    spec: &mut Spec,
    tasks: &HashMap<u32, String>,
) -> Result<(NetworkPart, Vec<Join>), Failure> {
    let linux = (spec.linux_mut().as_mut())
        .ok_or_else(|| bad("linux is missing: the spec is not of a Linux container"))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let mut network = NetworkPart::New;
    let mut joins = Vec::new();
    for (index, namespace) in (0..).zip(&mut namespaces) {
        let (kind, Some(path)) = (namespace.typ(), namespace.path().clone()) else {
            continue;
        };
        let task = pid_of(&path, kind).and_then(|pid| tasks.get(&pid));
        let is_network = kind == LinuxNamespaceType::Network;
        let whose = match task {
            Some(task) => {
                if is_network {
                    network = NetworkPart::Pod;
                }
                Whose::Container(task.clone())
            }
            None if is_network => {
                network = NetworkPart::Path(path);
                Whose::Guest(Empty::new())
            }
            None => return Err(foreign(kind, &path)),
        };
        joins.push(Join {
            namespace: index,
            whose: Some(whose),
            ..Default::default()
        });
        namespace.set_path(None);
    }
    linux.set_namespaces(Some(namespaces));
    Ok((network, joins))
}

fn foreign(kind: LinuxNamespaceType, path: &Path) -> Failure {
    let (name, path) = (name_of(kind), path.display());
    let field = format!("linux.namespaces of type {name} with path {path}");
    match kind {
        LinuxNamespaceType::User => {
            let why = format!("{} (hostUsers: false)", FOREIGN_NAMESPACE.why);
            FOREIGN_NAMESPACE.because(field, why)
        }
        _ => FOREIGN_NAMESPACE.of(field),
    }
}

/// The type as the spec has it.
fn name_of(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

/// The pid in `/proc/PID/ns/KIND`, if the file is one of this kind.
fn pid_of(path: &Path, kind: LinuxNamespaceType) -> Option<u32> {
    let mut parts = path.components();
    let mut next = || match parts.next() {
        Some(Component::Normal(part)) => part.to_str(),
        Some(Component::RootDir) => Some("/"),
        _ => None,
    };
    let (root, proc, pid, ns, file) = (next()?, next()?, next()?, next()?, next()?);
    let name = match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Network => "net",
        kind => name_of(kind),
    };
    let is_one = (root, proc, ns) == ("/", "proc", "ns") && file == name;
    is_one.then(|| pid.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_pid_s_namespace_is_one() {
        let pid_of = |path: &str| pid_of(Path::new(path), LinuxNamespaceType::Network);
        assert_eq!(pid_of("/proc/42/ns/net"), Some(42));
        for other in [
            "/proc/self/ns/net",
            "proc/42/ns/net",
            "/proc/42/net",
            "/x/42/ns/net",
            "/proc/42/ns/uts",
            "/proc/../42/ns",
        ] {
            assert_eq!(pid_of(other), None, "{other}");
        }
    }
}
