//! The pod's network namespace on the host: a new one, or one that the pod is given, and nobody else's from then on.
//!
//! Called by `bring_up`. A new one is the first stand-in's. Either is told to whoever comes later (`NetworkLock`):
//! to containers that are given it by any path, and to the pods of others.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use kata_like_config::state::{NetworkId, Occupied, Record, StateFolder, name};
use rustix::fs::{CWD, Mode, OFlags};

use super::bring_up::{blocking, write_record};
use super::machine::Machine;
use crate::cgroup::Cgroup;
use crate::network::claim;
use crate::spawn::Network;
use crate::spec::NetworkPart;
use crate::stand_in::StandIn;
use crate::vm::request::SandboxRequest;
use kata_like_failure::{Failure, Kind};

/// NSFS_MAGIC of linux/magic.h.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// Makes the first container's stand-in, and with it the namespace, unless that is given.
pub(super) async fn make(
    request: &mut SandboxRequest,
    given: &NetworkPart,
    cgroup: &Cgroup,
    state: &Arc<StateFolder>,
    machine: &mut Machine,
    record: &mut Record,
) -> Result<OwnedFd, Failure> {
    let given = match given {
        NetworkPart::Path(path) => Some(open(path)?),
        NetworkPart::New => None,
        NetworkPart::Pod => {
            return Err(Failure::new(
                Kind::BadRequest,
                "linux.namespaces of type network: a sandbox can't join its own pod",
            ));
        }
    };
    if let Some((_, id)) = given {
        take(id, request, state, machine, record).await?;
    }
    let directory = cgroup
        .as_fd()
        .try_clone_to_owned()
        .map_err(|cause| Failure::failed("copy a descriptor", cause))?;
    let (task, empty) = (request.id.clone(), state.path().join(name::EMPTY));
    let (stand_in, given) = blocking(move || {
        let network = given
            .as_ref()
            .map_or(Network::New, |(fd, _)| Network::Join(fd.as_fd()));
        let stand_in = StandIn::start(&task, directory.as_fd(), network, &empty)
            .map_err(|cause| Failure::failed("make the pod's network namespace", cause))?;
        Ok((stand_in, given))
    })
    .await?;
    let pid = stand_in.pid();
    machine.stand_in = Some(stand_in);
    if let Some((given, _)) = given {
        return Ok(given);
    }
    let (new, id) = open(Path::new(&format!("/proc/{pid}/ns/net")))?;
    take(id, request, state, machine, record).await?;
    Ok(new)
}

/// Makes it the pod's, unless it is already; recorded first, for whoever cleans up.
async fn take(
    network: NetworkId,
    request: &mut SandboxRequest,
    state: &StateFolder,
    machine: &mut Machine,
    record: &mut Record,
) -> Result<(), Failure> {
    record.network_id = Some(network);
    write_record(state, record)?;
    machine.network = request.network.take().filter(|lock| lock.id() == network);
    if machine.network.is_some() {
        return Ok(());
    }
    let (namespace, id) = (request.namespace.clone(), request.id.clone());
    let taken = blocking(move || {
        claim::take(network, &namespace, &id)
            .map_err(|cause| Failure::failed("take the pod's network namespace", cause))
    });
    let why = match taken.await? {
        Occupied::Free(lock) => {
            machine.network = Some(lock);
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
        return Err(Failure::unsupported(
            format_args!(
                "linux.namespaces of type network with path {}",
                path.display()
            ),
            "it is the host's own network (hostNetwork), which a guest can't be given",
        ));
    }
    match is_network {
        true => Ok((fd, id)),
        false => Err(Failure::new(
            Kind::BadRequest,
            format!("open network namespace {}: it is not one", path.display()),
        )),
    }
}
