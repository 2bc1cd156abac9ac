//! Decides which pod a container joins when its spec names an existing network namespace (`--net
//! container:X`, or a named one that several containers share).
//!
//! Called by `bootstrap`, for a container whose annotations name no pod, and by `namespace`. Two
//! VMs can't share a network, so the second container joins the first one's pod. A file lock
//! (`NetworkLock`) settles races. If the owning pod is stopping, we wait for it.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use kata_like_config::state::{NetworkId, NetworkLock, Occupied, Record, StateError, StateFolder};

use super::read;
use kata_like_failure::Failure;

/// How long it may take until it is known whose a namespace is: a pod that leaves is taken down
/// within it.
const CHANGING: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// Where a container goes.
#[derive(Debug)]
pub enum Place {
    /// To the pod that lives in the namespace, whose shim serves here.
    Pod(PathBuf),
    /// To a pod of its own, whose the namespace is now.
    Own(NetworkLock),
    /// To a pod of its own, whose creation will tell what is wrong with the namespace.
    Unknown,
}

/// Finds the place of the container `id`, given the namespace at `path`. `serving` answers the
/// socket of a sandbox of the same containerd's namespace, if somebody serves there.
pub fn find(
    namespace: &str,
    id: &str,
    path: &Path,
    serving: impl Fn(&str) -> Option<PathBuf>,
) -> Result<Place, StateError> {
    let Ok(network) = NetworkId::at(path) else {
        return Ok(Place::Unknown);
    };
    let take = || NetworkLock::take(network, namespace, id);
    find_by(namespace, take, serving)
}

fn find_by(
    own: &str,
    take: impl Fn() -> Result<Occupied, StateError>,
    serving: impl Fn(&str) -> Option<PathBuf>,
) -> Result<Place, StateError> {
    let end = Instant::now() + CHANGING;
    loop {
        match take()? {
            Occupied::Free(lock) => {
                undo_dead(&lock);
                return Ok(Place::Own(lock));
            }
            Occupied::By { namespace, .. } if namespace != own => return Ok(Place::Unknown),
            Occupied::By { sandbox, .. } => {
                // Its shim has just begun, or has done all that it had to.
                if let Some(socket) = serving(&sandbox) {
                    return Ok(Place::Pod(socket));
                }
            }
            Occupied::Changing => {}
        }
        if Instant::now() > end {
            return Ok(Place::Unknown);
        }
        thread::sleep(POLL);
    }
}

/// Claims a namespace for `sandbox`. Answers the owner if another pod keeps it. Blocks while that
/// pod stops.
pub fn take(network: NetworkId, namespace: &str, sandbox: &str) -> Result<Occupied, StateError> {
    let end = Instant::now() + CHANGING;
    loop {
        match NetworkLock::take(network, namespace, sandbox)? {
            Occupied::Changing if Instant::now() < end => thread::sleep(POLL),
            occupied => {
                if let Occupied::Free(lock) = &occupied {
                    undo_dead(lock);
                }
                return Ok(occupied);
            }
        }
    }
}

/// Removes what a crashed pod left in the namespace, so that its own late clean-up cannot touch the
/// new owner's redirections. Failures are ignored: leftovers block nobody.
fn undo_dead(lock: &NetworkLock) {
    let Some((namespace, sandbox)) = lock.dead() else {
        return;
    };
    if let Ok(Some(state)) = StateFolder::open(namespace, sandbox)
        && let Ok(Some(record)) = state.read_record()
        && record.network_id == Some(lock.id())
    {
        let _ = undo(&record);
    }
}

/// Takes from the network namespace that a dead pod was given what the pod had put there.
pub fn undo(record: &Record) -> Result<(), Failure> {
    match &record.network {
        Some(network) => read::undo(&network.path, &network.qdiscs),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::cell::Cell;
    use std::os::fd::AsFd;

    fn network() -> NetworkId {
        NetworkId::at(Path::new("/proc/self/ns/net")).unwrap()
    }

    #[test]
    fn a_namespace_is_the_same_by_every_path() {
        assert_eq!(
            NetworkId::at(Path::new("/proc/thread-self/ns/net")).unwrap(),
            network()
        );
        let open = std::fs::File::open("/proc/self/ns/net").unwrap();
        assert_eq!(NetworkId::of(open.as_fd()).unwrap(), network());
        assert_ne!(
            NetworkId::at(Path::new("/proc/self/ns/uts")).unwrap(),
            network()
        );
        assert!(NetworkId::at(Path::new("/proc/0/ns/net")).is_err());
    }

    /// One that begins, is there, leaves and has left, as the second one finds it.
    #[test]
    fn who_comes_second_goes_to_the_first_ones_pod_unless_that_leaves() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("state");
        let take =
            |namespace: &str, id: &str| NetworkLock::take_under(&root, network(), namespace, id);
        let served = Cell::new(0);
        let serving = |sandbox: &str| {
            assert_eq!(sandbox, "first");
            served.set(served.get() + 1);
            (served.get() > 1).then(|| PathBuf::from("/socket"))
        };
        let find = |namespace: &str| find_by(namespace, || take(namespace, "second"), serving);

        let Ok(Place::Own(first)) = find_by("ns", || take("ns", "first"), serving) else {
            panic!("nobody was there");
        };
        assert!(matches!(find("ns"), Ok(Place::Pod(socket)) if socket == Path::new("/socket")));
        assert_eq!(
            served.get(),
            2,
            "one that does not serve yet is asked again"
        );
        assert!(matches!(find("other"), Ok(Place::Unknown)));

        first.leaving().unwrap();
        let begin = Instant::now();
        let leaves = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            drop(first);
        });
        let Ok(Place::Own(second)) = find("ns") else {
            panic!("the first one has left");
        };
        assert!(begin.elapsed() >= Duration::from_millis(200));
        leaves.join().unwrap();
        drop(second);
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
    }
}
