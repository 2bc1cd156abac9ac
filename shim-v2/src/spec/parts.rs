//! What the readers of a spec's fields have in common.

use std::path::{Path, PathBuf};

use kata_like_failure::{Failure, Kind};

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
