//! What the readers of a spec's fields have in common.

use std::path::{Path, PathBuf};

use kata_like_failure::{Failure, Kind};
use oci_spec::runtime::LinuxNamespaceType;

/// The network namespace that the spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkPart {
    /// A new one.
    New,
    /// That of this path on the host.
    Path(PathBuf),
    /// The pod's, by the pid of one of its stand-ins.
    Pod,
}

/// A path of the spec, which may be one below its bundle.
pub(super) fn absolute(bundle: &Path, path: &Path) -> PathBuf {
    // `join` with an absolute path is that path.
    bundle.join(path)
}

/// The error of a spec, or of a process, that says what it may not.
pub(super) fn bad(text: &str) -> Failure {
    Failure::new(Kind::BadRequest, text)
}

/// The field of a namespace's path, as errors name it.
pub(super) fn field_of(kind: LinuxNamespaceType, path: &Path) -> String {
    let (name, path) = (name_of(kind), path.display());
    format!("linux.namespaces of type {name} with path {path}")
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

/// Its file in `/proc/PID/ns`.
pub(super) fn file_of(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Network => "net",
        kind => name_of(kind),
    }
}
