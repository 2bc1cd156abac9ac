//! Namespaces that the caller has pinned: made before the pod, and kept by a file and not by a
//! process.
//!
//! CRI-O makes a pod's IPC and UTS namespaces so, and names their paths in the spec of each
//! container. Nobody on the host is in them, so the pod has others in the guest in their place.
//! What the kernel knows the pinned ones by tells which of the pod's a later container means.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use kata_like_failure::{Failure, Kind};
use kata_like_spec::FOREIGN_NAMESPACE;
use oci_spec::runtime::LinuxNamespaceType;
use rustix::fs::{CWD, Mode, OFlags};

use super::parts::{field_of, file_of};
use crate::file_systems;

/// A pinned namespace, known by its kind and the kernel's numbers.
#[derive(Clone, Debug)]
pub struct Pinned {
    kind: LinuxNamespaceType,
    numbers: (u64, u64),
    #[allow(
        dead_code,
        reason = "as long as it is open, no other namespace has its number"
    )]
    open: Arc<OwnedFd>,
}

impl Pinned {
    /// The IPC or UTS namespace at a path of the caller's. The host's own is refused, and whatever
    /// is no namespace.
    pub(super) fn at(kind: LinuxNamespaceType, path: &Path) -> Result<Self, Failure> {
        let field = field_of(kind, path);
        let failed = |cause| Failure::failed(format!("open {field}"), cause);
        // By O_PATH: a FIFO or a device is looked at, not opened.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let open = rustix::fs::openat(CWD, path, flags, Mode::empty());
        let open = open.map_err(|errno| failed(errno.into()))?;
        let found = file_systems::of(&open).map_err(failed)?;
        if found.is_none_or(|found| found.system.name != "nsfs") {
            return Err(Failure::new(
                Kind::BadRequest,
                format!("{field}: there is no namespace"),
            ));
        }
        let numbers = numbers_of(&open).map_err(failed)?;
        let own = File::open(format!("/proc/self/ns/{}", file_of(kind))).and_then(numbers_of);
        if own.map_err(failed)? == numbers {
            let why = "it is the host's own, which can't be given to a guest";
            return Err(FOREIGN_NAMESPACE.because(field, why));
        }
        Ok(Self {
            kind,
            numbers,
            open: Arc::new(open),
        })
    }
}

impl PartialEq for Pinned {
    fn eq(&self, other: &Self) -> bool {
        (self.kind, self.numbers) == (other.kind, other.numbers)
    }
}

impl Eq for Pinned {}

/// The numbers of its file system and of itself there.
fn numbers_of(namespace: impl AsFd) -> std::io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(namespace)?;
    Ok((stat.st_dev, stat.st_ino))
}
