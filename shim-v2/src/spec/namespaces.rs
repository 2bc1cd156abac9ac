//! The spec's namespaces: which of them are new ones, which the guest's own, and which another
//! container's.

use std::collections::HashMap;
use std::path::{Component, Path};

use kata_like_agent_protocol::agent::{Empty, Join, join::Whose};
use kata_like_failure::Failure;
use kata_like_spec::FOREIGN_NAMESPACE;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::parts::{NetworkPart, bad, field_of, file_of};
use super::pinned::Pinned;

/// Whose the namespaces are that a spec names by their paths.
#[derive(Debug, Default)]
pub struct Owners {
    /// The container of each stand-in of the pod, by its pid.
    pub tasks: HashMap<u32, String>,
    /// Pinned namespaces, each with the container that has one in the guest in its place.
    pub pinned: Vec<(Pinned, String)>,
    /// Whether the spec is that of a CRI pod's sandbox, which may bring pinned ones.
    pub of_sandbox: bool,
}

/// What a path of a namespace means.
enum Meant {
    /// The namespace of this container of the pod.
    Container(String),
    /// A new one, in place of one that is pinned.
    New(Pinned),
    Nothing,
}

impl Owners {
    fn find(&self, kind: LinuxNamespaceType, path: &Path) -> Result<Meant, Failure> {
        if let Some(pid) = pid_of(path, kind) {
            let task = self.tasks.get(&pid).cloned();
            return Ok(task.map_or(Meant::Nothing, Meant::Container));
        }
        let may_be_pinned = self.of_sandbox || !self.pinned.is_empty();
        if !may_be_pinned || !matches!(kind, LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts) {
            return Ok(Meant::Nothing);
        }
        let found = Pinned::at(kind, path)?;
        let known = self.pinned.iter().find(|(pinned, _)| *pinned == found);
        Ok(match known {
            Some((_, container)) => Meant::Container(container.clone()),
            None if self.of_sandbox => Meant::New(found),
            None => Meant::Nothing,
        })
    }
}

/// What became of the spec's namespaces.
#[derive(Debug)]
pub(super) struct Parted {
    /// The network that the host gives.
    pub network: NetworkPart,
    /// Whose each namespace is that is no new one.
    pub joins: Vec<Join>,
    /// In whose place new ones are.
    pub pinned: Vec<Pinned>,
}

/// Takes the paths out of the spec's namespaces.
pub(super) fn split_namespaces(spec: &mut Spec, owners: &Owners) -> Result<Parted, Failure> {
    let linux = (spec.linux_mut().as_mut())
        .ok_or_else(|| bad("linux is missing: the spec is not of a Linux container"))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let mut network = NetworkPart::New;
    let (mut joins, mut pinned) = (Vec::new(), Vec::new());
    for (index, namespace) in (0..).zip(&mut namespaces) {
        let (kind, Some(path)) = (namespace.typ(), namespace.path().clone()) else {
            continue;
        };
        namespace.set_path(None);
        let is_network = kind == LinuxNamespaceType::Network;
        let whose = match owners.find(kind, &path)? {
            Meant::Container(task) => {
                if is_network {
                    network = NetworkPart::Pod;
                }
                Whose::Container(task)
            }
            Meant::New(in_place_of) => {
                pinned.push(in_place_of);
                continue;
            }
            Meant::Nothing if is_network => {
                network = NetworkPart::Path(path);
                Whose::Guest(Empty::new())
            }
            Meant::Nothing => return Err(foreign(kind, &path)),
        };
        joins.push(Join {
            namespace: index,
            whose: Some(whose),
            ..Default::default()
        });
    }
    linux.set_namespaces(Some(namespaces));
    Ok(Parted {
        network,
        joins,
        pinned,
    })
}

fn foreign(kind: LinuxNamespaceType, path: &Path) -> Failure {
    let (field, why) = (field_of(kind, path), FOREIGN_NAMESPACE.why);
    match kind {
        LinuxNamespaceType::User => {
            FOREIGN_NAMESPACE.because(field, format!("{why} (hostUsers: false)"))
        }
        _ if pid_of(path, kind).is_some() => {
            let how = "a container that shares another one's network (--network container:NAME) is in its pod";
            FOREIGN_NAMESPACE.because(field, format!("{why}; {how}"))
        }
        _ => FOREIGN_NAMESPACE.of(field),
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
    let is_one = (root, proc, ns) == ("/", "proc", "ns") && file == file_of(kind);
    is_one.then(|| pid.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::symlink;
    use std::process::{Child, Command};
    use std::time::Duration;

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

    /// A process in IPC and UTS namespaces of its own, to which links in a folder lead.
    struct Apart(Child, tempfile::TempDir);

    impl Apart {
        fn new() -> Self {
            let mut command = Command::new("unshare");
            let child = command.args(["--ipc", "--uts", "sleep", "60"]).spawn();
            let (child, folder) = (child.unwrap(), tempfile::tempdir().unwrap());
            for kind in ["ipc", "uts"] {
                let (theirs, own) = (
                    Self::file(child.id(), kind),
                    format!("/proc/self/ns/{kind}"),
                );
                let is_apart = || std::fs::read_link(&theirs).ok() != std::fs::read_link(&own).ok();
                for _ in (0..500).take_while(|_| !is_apart()) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                assert!(is_apart(), "unshare(1) makes no {kind} namespace");
                symlink(&theirs, folder.path().join(kind)).unwrap();
                symlink(&own, folder.path().join(format!("own-{kind}"))).unwrap();
            }
            std::fs::write(folder.path().join("file"), "").unwrap();
            Self(child, folder)
        }

        fn file(pid: u32, kind: &str) -> String {
            format!("/proc/{pid}/ns/{kind}")
        }

        fn split(&self, owners: &Owners, ipc: &str, uts: &str) -> Result<Parted, Failure> {
            let path = |name: &str| self.1.path().join(name);
            let namespaces = serde_json::json!([{"type": "mount"}, {"type": "ipc", "path": path(ipc)},
                {"type": "uts", "path": path(uts)}]);
            let spec =
                serde_json::json!({"ociVersion": "1.2.0", "linux": {"namespaces": namespaces}});
            split_namespaces(&mut serde_json::from_value(spec).unwrap(), owners)
        }
    }

    impl Drop for Apart {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_sandbox_has_its_own_in_place_of_pinned_ones_and_its_containers_share_them() {
        if !rustix::process::geteuid().is_root() {
            return; // unshare(2) needs it.
        }
        let (apart, other) = (Apart::new(), Apart::new());
        let of_sandbox = Owners {
            of_sandbox: true,
            ..Owners::default()
        };
        let sandbox = apart.split(&of_sandbox, "ipc", "uts").unwrap();
        assert_eq!((sandbox.joins.len(), sandbox.pinned.len()), (0, 2));
        let named = |pinned: &Pinned| (pinned.clone(), "sandbox".to_owned());
        let later = Owners {
            pinned: sandbox.pinned.iter().map(named).collect(),
            ..Owners::default()
        };
        let container = apart.split(&later, "ipc", "uts").unwrap();
        assert!(container.pinned.is_empty());
        let joins = container.joins.iter();
        let joined: Vec<_> = joins.map(|join| (join.namespace, &join.whose)).collect();
        let whose = Some(Whose::Container("sandbox".into()));
        assert_eq!(joined, [(1, &whose), (2, &whose)]);
        // One of another pod, of another kind or of the host, and what is none at all.
        let none = Owners::default();
        for (owners, split, text) in [
            (
                &later,
                other.split(&later, "ipc", "uts"),
                "/ipc is not supported: it is not that of",
            ),
            (
                &later,
                apart.split(&later, "ipc", "ipc"),
                "/ipc is not supported: it is not that of",
            ),
            (
                &of_sandbox,
                apart.split(&of_sandbox, "own-ipc", "uts"),
                "own-ipc is not supported: it is the host's own",
            ),
            (
                &of_sandbox,
                apart.split(&of_sandbox, "ipc", "own-uts"),
                "own-uts is not supported: it is the host's own",
            ),
            (
                &of_sandbox,
                apart.split(&of_sandbox, "ipc", "file"),
                "file: there is no namespace",
            ),
            (
                &of_sandbox,
                apart.split(&of_sandbox, "none", "uts"),
                "none: No such file",
            ),
            (
                &none,
                apart.split(&none, "ipc", "uts"),
                "/ipc is not supported: it is not that of",
            ),
        ] {
            let line = split.expect_err(text).one_line();
            assert!(line.contains(text), "{line}, by {owners:?}");
        }
    }
}
