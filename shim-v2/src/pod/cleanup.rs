//! Removes what is left of a pod whose shim is gone, from its state folder alone.
//!
//! Called by `bring_up` before a pod of the same name starts, and by `info` for `delete`.
//! containerd runs `delete` after every ordinary deletion too, and for each container of a pod
//! whose shim serves the others. So a container that is not the sandbox has no state folder, and
//! nothing of the pod is touched for it. A pod whose shim lives and has tasks is left alone. A shim
//! that is ending is waited for. Every process is named by pid and start time and signalled through
//! a pidfd, so nobody else is hit. What is gone already is no error, so this can run again and
//! again.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use kata_like_config::state::{
    NetworkId, NetworkLock, Occupied, Process, ROOT, Record, StateError, StateFolder,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::bundle::Membership;
use crate::cgroup;
use crate::hooks;
use crate::network::claim;
use crate::spec;
use kata_like_failure::{Failure, Kind};

/// How long a shim that ends by itself is waited for.
const OWN_END: Duration = Duration::from_millis(1500);
/// How long killed processes may take to be gone; with the rest, less than containerd's 5 s.
const KILLED: Duration = Duration::from_secs(2);
/// How long a cgroup may take to be empty.
const EMPTY: Duration = Duration::from_millis(400);
/// How long all of it may take, hooks with it.
const ALL: Duration = Duration::from_millis(4500);
/// The exit status of what was killed.
const STATUS: u32 = 137;

/// What `delete` tells of a container.
#[derive(Debug)]
pub struct Deleted {
    /// The host pid that it had; 0 if nobody knows.
    pub pid: u32,
    /// Its exit status; 137 if nobody knows.
    pub status: u32,
    /// When it ended.
    pub exited_at: SystemTime,
}

/// Removes what is left of a container. Done within containerd's five seconds.
pub fn delete(namespace: &str, id: &str, bundle: &Path) -> Result<Deleted, Failure> {
    delete_under(Path::new(ROOT), namespace, id, bundle)
}

fn delete_under(root: &Path, namespace: &str, id: &str, bundle: &Path) -> Result<Deleted, Failure> {
    let begin = Instant::now();
    let failed = |cause: StateError| Failure::failed("take the pod down", cause);
    let mut deleted = Deleted {
        pid: 0,
        status: STATUS,
        exited_at: SystemTime::now(),
    };
    let Some(state) = StateFolder::open_under(root, namespace, id).map_err(failed)? else {
        // Its pod's shim has removed all, but for the cgroup that it lived in itself.
        cgroup::remove(&cgroups_by_spec(namespace, id, bundle), OWN_END);
        let mut record = Record::new(namespace, id);
        record.network_id = network_by_spec(root, id, bundle);
        leave_network(root, &record);
        if hooks::owes_poststop(bundle) && pod_is_dead(root, namespace, id, bundle) {
            run_poststop(id, bundle, ALL.saturating_sub(begin.elapsed()));
        }
        return Ok(deleted);
    };
    let mut record = match state.read_record() {
        Ok(record) => record.unwrap_or_else(|| Record::new(namespace, id)),
        Err(error) => {
            // A record that can't be read names nothing; what else there is goes all the same.
            eprint!("{}; ", kata_like_failure::one_line(&error));
            Record::new(namespace, id)
        }
    };
    record.network_id = record
        .network_id
        .or_else(|| network_by_spec(root, id, bundle));
    deleted.pid = record
        .stand_ins
        .iter()
        .find(|stand_in| stand_in.task == id)
        .and_then(|stand_in| u32::try_from(stand_in.process.pid).ok())
        .unwrap_or_default();
    if let Some(shim) = &record.shim
        && let Ok(Some(shim)) = shim.open()
        && !gone(&[shim], OWN_END)
        && let Ok(Some(folder)) = StateFolder::open_under(root, namespace, id)
        && has_tasks(&folder)
    {
        eprint!("the pod's shim serves its other containers: nothing is taken down");
        return Ok(deleted);
    }
    kill_all(&record);
    leave_network(root, &record);
    let mut cgroups = record.cgroups;
    for path in cgroups_by_spec(namespace, id, bundle) {
        if !cgroups.contains(&path) {
            cgroups.insert(0, path);
        }
    }
    remove_cgroups(cgroups);
    state.remove().map_err(failed)?;
    run_poststop(id, bundle, ALL.saturating_sub(begin.elapsed()));
    Ok(deleted)
}

/// Whether the shim that has served a pod's container is gone. A living one runs the hooks itself.
fn pod_is_dead(root: &Path, namespace: &str, id: &str, bundle: &Path) -> bool {
    let Ok(pod) = Membership::read(bundle, id) else {
        return false;
    };
    match StateFolder::open_under(root, namespace, &pod.group) {
        Ok(None) => true,
        Ok(Some(state)) => match state.read_record() {
            Ok(Some(record)) => record.shim.is_none_or(|shim| match shim.open() {
                Ok(Some(shim)) => gone(&[shim], OWN_END),
                Ok(None) => true,
                Err(_) => false,
            }),
            Ok(None) | Err(_) => false,
        },
        Err(_) => false,
    }
}

/// The hooks that undo what others have done for the container, as runc's `delete` runs them. The
/// caller is in containerd's own namespaces.
fn run_poststop(id: &str, bundle: &Path, limit: Duration) {
    if !hooks::take_poststop(bundle) {
        return;
    }
    let read = spec::read(bundle).and_then(|spec| spec::HostHooks::of(&spec));
    let hooks = match read {
        Ok(hooks) if !hooks.poststop.is_empty() => hooks,
        _ => return,
    };
    let directory = bundle.display().to_string();
    let state = hooks::State {
        oci_version: &hooks.version,
        id,
        status: "stopped",
        pid: 0,
        bundle: &directory,
        annotations: &hooks.annotations,
    };
    let place = hooks::Place {
        cgroup: None,
        mounts: None,
        directory: bundle.to_owned(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ran = match runtime {
        Ok(runtime) => runtime
            .block_on(hooks::run(
                "poststop",
                &hooks.poststop,
                &state,
                &place,
                limit,
            ))
            .map_err(|error| error.one_line()),
        Err(error) => Err(format!("start a runtime for the poststop hooks: {error}")),
    };
    if let Err(line) = ran {
        eprint!("{line}; ");
    }
}

/// Removes what a dead shim has left of a pod of this name, before a new one of that name starts.
/// `false` if its shim lives. The cgroups stay: the new pod's shim was born in them.
pub fn remove_dead(namespace: &str, id: &str) -> Result<bool, StateError> {
    remove_dead_under(Path::new(ROOT), namespace, id)
}

fn remove_dead_under(root: &Path, namespace: &str, id: &str) -> Result<bool, StateError> {
    let Some(state) = StateFolder::open_under(root, namespace, id)? else {
        return Ok(true);
    };
    // Without a record there is a shim that has just begun, or one that died as it did.
    let record = match state.read_record() {
        Ok(Some(record)) => record,
        _ => Record::new(namespace, id),
    };
    let Some(_lock) = state.try_lock()? else {
        return Ok(false);
    };
    kill_all(&record);
    leave_network(root, &record);
    state.remove()?;
    Ok(true)
}

/// Whether the record that is there now names a task.
fn has_tasks(state: &StateFolder) -> bool {
    let record = state.read_record().ok().flatten();
    record.is_some_and(|record| !record.stand_ins.is_empty())
}

/// The marked cgroups that the container's spec leads to.
fn cgroups_by_spec(namespace: &str, id: &str, bundle: &Path) -> Vec<PathBuf> {
    let path = spec::read(bundle)
        .and_then(|spec| spec::cgroups_path(&spec))
        .ok()
        .and_then(|given| cgroup::path_of(given.as_deref(), namespace, id).ok());
    path.map(|path| cgroup::marked(&path.join(cgroup::LEAF)))
        .unwrap_or_default()
}

/// The network namespace that the container's spec names, if it is some pod's.
fn network_by_spec(root: &Path, id: &str, bundle: &Path) -> Option<NetworkId> {
    let path = Membership::read(bundle, id).ok()?.network?;
    let network = NetworkId::at(&path).ok()?;
    NetworkLock::is_there(root, network).then_some(network)
}

/// Kills every process of the record and waits until all are gone.
fn kill_all(record: &Record) {
    let stand_ins = record.stand_ins.iter().map(|stand_in| &stand_in.process);
    // The shim first: it must not report what is done to the others.
    let all = [&record.shim, &record.vmm, &record.fsd, &record.proxy]
        .into_iter()
        .flatten();
    let living: Vec<OwnedFd> = all
        .chain(stand_ins)
        .filter_map(|process: &Process| process.open().ok().flatten())
        .collect();
    for process in &living {
        let _ = pidfd_send_signal(process, Signal::KILL);
    }
    if !gone(&living, KILLED) {
        eprint!("a process of the pod does not end; ");
    }
}

/// Leaves the network namespace that the pod had as it was before, and to others. Whoever is there
/// already has seen to it (`claim`).
fn leave_network(root: &Path, record: &Record) {
    let (namespace, sandbox) = (&record.namespace, &record.sandbox);
    let taken = match record.network_id {
        Some(network) => NetworkLock::take_under(root, network, namespace, sandbox).map(Some),
        None => Ok(None),
    };
    let undone = match &taken {
        Ok(None | Some(Occupied::Free(_))) => claim::undo(record),
        Ok(Some(_)) => Ok(()),
        Err(error) => Err(Failure::new(
            Kind::Failed,
            kata_like_failure::one_line(error),
        )),
    };
    if let Err(error) = undone {
        eprint!("{}; ", error.one_line());
    }
}

/// Whether all these processes end in time.
fn gone(processes: &[OwnedFd], limit: Duration) -> bool {
    let end = Instant::now() + limit;
    processes.iter().all(|process| {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(timeout) = Timespec::try_from(left) else {
                return false;
            };
            let mut waiting = [PollFd::new(process, PollFlags::IN)];
            match poll(&mut waiting, Some(&timeout)) {
                Ok(count) => return count > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    })
}

/// Removes cgroups, a child before its parent. What still lives in one that is the pod's alone was
/// born after the record was written, and is killed.
fn remove_cgroups(mut cgroups: Vec<PathBuf>) {
    cgroups.retain(|path| path.starts_with(cgroup::ROOT));
    cgroups.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    let leaf = cgroups
        .iter()
        .find(|path| path.file_name().is_some_and(|name| name == cgroup::LEAF));
    if let Some(leaf) = leaf {
        if let Some(line) = leaf.parent().and_then(cgroup::limits::killed) {
            eprint!("{line}; ");
        }
        cgroup::kill(leaf);
    }
    let busy = cgroup::remove(&cgroups, EMPTY);
    // A hook that was at work when the shim died, for example.
    busy.iter().for_each(|path| cgroup::kill(path));
    let busy = cgroup::remove(&busy, EMPTY);
    for path in &busy {
        eprint!("cgroup {} is not empty; ", path.display());
    }
}

#[cfg(test)]
mod tests;
