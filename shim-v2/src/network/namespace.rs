//! A pod's network namespace on the host: a new one, or one that the pod is given, and nobody
//! else's from then on.
//!
//! Called as the pod is brought up. The first stand-in makes a new one. The claim on it
//! (`NetworkLock`) tells whose it is: to containers that are given it by any path, and to other
//! pods.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use kata_like_config::state::{NetworkId, NetworkLock, Occupied};
use rustix::fs::{CWD, Mode, OFlags};

use super::claim;
use crate::steps::blocking;
use crate::vm::ledger::Ledger;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use kata_like_spec::HOST_NETWORK;

/// NSFS_MAGIC of linux/magic.h.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A network namespace.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
    id: NetworkId,
    /// Where it is, if the pod was given it: it outlives the pod.
    given: Option<PathBuf>,
    claim: Mutex<Option<NetworkLock>>,
}

impl Namespace {
    /// Opens the one that the spec names. It must not be the host's own.
    pub fn given(path: &Path) -> Result<Self, Failure> {
        let (fd, id) = open(path)?;
        Ok(Self::of(fd, id, Some(path.to_owned())))
    }

    /// Opens the one that a stand-in was born in.
    pub fn of_stand_in(pid: u32) -> Result<Self, Failure> {
        let (fd, id) = open(Path::new(&format!("/proc/{pid}/ns/net")))?;
        Ok(Self::of(fd, id, None))
    }

    fn of(fd: OwnedFd, id: NetworkId, given: Option<PathBuf>) -> Self {
        Self {
            fd,
            id,
            given,
            claim: Mutex::default(),
        }
    }

    /// Claims it for a pod. `held` is the pod's claim from before, if it has one. The ledger has
    /// the namespace before the claim, for the one who cleans up.
    pub async fn claim(
        &self,
        held: Option<NetworkLock>,
        pod: (&str, &str),
        ledger: &Ledger,
    ) -> Result<(), Failure> {
        let network = self.id;
        ledger.change(|record| record.network_id = Some(network))?;
        if let Some(held) = held.filter(|lock| lock.id() == network) {
            *self.locked() = Some(held);
            return Ok(());
        }
        let (namespace, id) = (pod.0.to_owned(), pod.1.to_owned());
        let taken = blocking(move || {
            claim::take(network, &namespace, &id)
                .map_err(|cause| Failure::failed("take the pod's network namespace", cause))
        });
        let why = match taken.await? {
            Occupied::Free(lock) => {
                *self.locked() = Some(lock);
                return Ok(());
            }
            Occupied::By { namespace, sandbox } => {
                format!("it is that of pod {sandbox} in containerd's namespace {namespace}")
            }
            Occupied::Changing => "a pod that does not end is in it".to_owned(),
        };
        Err(Failure::unsupported(
            "a network namespace that has a virtual machine",
            why,
        ))
    }

    /// Tells containers that come now that the pod is leaving.
    pub fn begin_release(&self) {
        if let Some(Err(error)) = self.locked().as_ref().map(NetworkLock::leaving) {
            tracing::warn!("tell that the pod leaves its network namespace: {error}");
        }
    }

    /// Gives the claim up. Something must still keep the namespace: the next one may have its
    /// number.
    pub fn release(&self) {
        *self.locked() = None;
    }

    /// Where it is, if the pod was given it.
    pub fn path(&self) -> Option<&Path> {
        self.given.as_deref()
    }

    /// Whether `path` leads to it.
    pub fn is_at(&self, path: &Path) -> bool {
        NetworkId::at(path).is_ok_and(|id| id == self.id)
    }

    /// A descriptor of the caller's own.
    pub fn copy(&self) -> Result<OwnedFd, Failure> {
        let copied = self.fd.try_clone();
        copied.map_err(|cause| Failure::failed("copy a descriptor", cause))
    }

    fn locked(&self) -> MutexGuard<'_, Option<NetworkLock>> {
        lock(&self.claim)
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens a network namespace, which must not be the host's own.
fn open(path: &Path) -> Result<(OwnedFd, NetworkId), Failure> {
    let failed = |cause: std::io::Error| {
        Failure::failed(format!("open network namespace {}", path.display()), cause)
    };
    let fd = rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let fd = fd.map_err(|errno| failed(errno.into()))?;
    let id = NetworkId::of(&fd).map_err(failed)?;
    let is_network = rustix::fs::fstatfs(&fd).is_ok_and(|fs| fs.f_type as u64 == NSFS_MAGIC);
    if NetworkId::at(Path::new("/proc/self/ns/net")).is_ok_and(|own| own == id) {
        let field = format!("{} {}", HOST_NETWORK.field, path.display());
        return Err(HOST_NETWORK.of(field));
    }
    if is_network {
        Ok((fd, id))
    } else {
        Err(Failure::new(
            Kind::BadRequest,
            format!("open network namespace {}: it is not one", path.display()),
        ))
    }
}
