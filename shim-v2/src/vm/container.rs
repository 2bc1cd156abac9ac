//! A container's way into the pod: its spec, mounts, stand-in, and then the guest.
//!
//! Called by `sandbox`, in tasks of their own. What a step has made is in the container's entry,
//! from where a failure, a deletion or the pod's end takes it away.

use std::collections::hash_map::Entry;
use std::os::fd::AsFd;
use std::sync::Arc;

use kata_like_config::state::{NetworkId, name};

use super::bring_up::blocking;
use super::hooks::ContainerHooks;
use super::limits::Limits;
use super::{Container, Exec, Sandbox, disks, hooks, memory};
use crate::cgroup::{self, Cgroup};
use crate::file_systems;
use crate::network::resolver::ResolvConf;
use crate::share::{SharedVolume, volumes};
use crate::spawn::Network;
use crate::spec::{self, DiskPart, NetworkPart, Split, Volume};
use crate::stand_in::StandIn;
use crate::vm::agent::{GuestContainer, GuestDisk};
use crate::vm::request::{ContainerRequest, CreatedContainer, ExecRequest};
use kata_like_failure::{Failure, Kind};

/// Makes a container; what was made for it is taken away if a step fails.
pub(super) async fn create(
    sandbox: &Arc<Sandbox>,
    request: ContainerRequest,
) -> Result<CreatedContainer, Failure> {
    let id = request.id.clone();
    if !kata_like_agent_protocol::is_name(&id) {
        return Err(Failure::new(
            Kind::BadRequest,
            format!("create container {id:?}: not a name"),
        ));
    }
    match sandbox.inner().containers.entry(id.clone()) {
        Entry::Occupied(_) => {
            return Err(Failure::new(
                Kind::AlreadyExists,
                format!("create container {id}: it exists already"),
            ));
        }
        Entry::Vacant(entry) => {
            entry.insert(Container::default());
        }
    }
    match make(sandbox, request).await {
        Ok(created) => Ok(created),
        Err(error) => {
            let container = sandbox.inner().containers.remove(&id);
            sandbox.take_away(&id, container).await;
            Err(error)
        }
    }
}

async fn make(
    sandbox: &Arc<Sandbox>,
    request: ContainerRequest,
) -> Result<CreatedContainer, Failure> {
    let id = request.id.as_str();
    let Split { host, guest } = split(sandbox, &request)
        .map_err(|error| error.during(format!("read the spec of container {id}")))?;
    let is_pod_s = match &host.network {
        NetworkPart::Pod => true,
        NetworkPart::Path(path) => {
            let own = NetworkId::of(&sandbox.network).ok();
            own.is_some() && NetworkId::at(path).ok() == own
        }
        NetworkPart::New => false,
    };
    if id != sandbox.id && !is_pod_s {
        return Err(Failure::unsupported(
            "linux.namespaces of type network",
            "a container of a pod shares the pod's network namespace",
        ));
    }
    if !host.left_out.is_empty() {
        let paths: Vec<_> = host.left_out.iter().map(|path| path.display()).collect();
        tracing::info!(
            container = id,
            "privileged: these devices of the host are left out: {paths:?}"
        );
    }
    let in_root = ResolvConf {
        root: match (&host.root, request.rootfs.is_empty()) {
            (Some(root), true) => root.clone(),
            _ => request.bundle.join("rootfs"),
        },
        path: "/etc/resolv.conf".into(),
    };
    let resolv_conf = host.resolv_conf.map_or(in_root, |path| ResolvConf {
        root: "/".into(),
        path,
    });
    let stand_in = stand_in(sandbox, id, host.cgroups_path.as_deref());
    let mounts = {
        let sandbox = Arc::clone(sandbox);
        let (id, bundle, rootfs) = (
            request.id.clone(),
            request.bundle.clone(),
            request.rootfs.clone(),
        );
        let (mut volumes, root) = (host.volumes, host.root);
        blocking(move || {
            if rootfs.is_empty() {
                let root = volumes::of_root(root)?;
                volumes.push(root.clone());
                return Ok((
                    Vec::new(),
                    add_volumes(&sandbox, &volumes)?,
                    Some(root.name),
                ));
            }
            let mut root = sandbox.share.add_rootfs(&id, &bundle, &rootfs)?;
            let volumes =
                add_volumes(&sandbox, &volumes).inspect_err(|_| while root.pop().is_some() {})?;
            Ok((root, volumes, None))
        })
    };
    let (stand_in, mounts) = tokio::join!(stand_in, mounts);
    // Both are put where the failure of the other finds them.
    let (mut pid, mut failure) = (0, None);
    let mut root_volume = None;
    {
        let mut inner = sandbox.inner();
        let entry = inner.containers.get_mut(id);
        let entry = entry.ok_or_else(|| deleted(id))?;
        match mounts {
            Ok((root, volumes, name)) => {
                (entry.root, entry.volumes) = (root, volumes);
                root_volume = name;
            }
            Err(error) => failure = Some(error.during(format!("mount for container {id}"))),
        }
        match stand_in {
            Ok((cgroup, stand_in)) => {
                pid = stand_in.pid();
                entry.cgroup = Some(Arc::new(cgroup));
                sandbox.watch_stand_in(id, "", &stand_in);
                entry.stand_in = Some(stand_in);
            }
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    sandbox.record();
    let hooks = Arc::new(ContainerHooks::new(id, request.bundle.clone(), host.hooks));
    let cgroup = {
        let mut inner = sandbox.inner();
        let entry = inner.containers.get_mut(id).ok_or_else(|| deleted(id))?;
        entry.hooks = Some(Arc::clone(&hooks));
        entry.resolv_conf = resolv_conf;
        entry.limits = Limits {
            memory: host.memory_limit,
            cpu_quota: host.cpu_quota,
        };
        entry.cgroup.clone()
    };
    hooks::before_create(sandbox, &hooks, pid, cgroup).await?;
    let made_of = GuestContainer {
        spec: guest,
        root_volume,
        placeholder: request.placeholder,
        memory_volumes: host.memory,
        disks: add_disks(sandbox, id, &host.disks).await?,
    };
    sandbox
        .agent
        .create_container(id, made_of, &request.streams)
        .await
        .map_err(|error| sandbox.labels.blame_files(error))?;
    Ok(CreatedContainer { pid })
}

/// Puts the sources of a container's bind mounts into the share.
fn add_volumes(sandbox: &Sandbox, volumes: &[Volume]) -> Result<Vec<SharedVolume>, Failure> {
    let on_memory = |volume: &Volume| {
        !volume.read_only && memory::look(&volume.source).is_ok_and(|found| found.is_some())
    };
    if volumes.iter().any(on_memory) {
        cgroup::limits::lift(&sandbox.limited);
    }
    volumes
        .iter()
        .map(|volume| sandbox.share.add_volume(volume))
        .collect()
}

/// The container's disks, each held by its entry.
async fn add_disks(
    sandbox: &Sandbox,
    id: &str,
    parts: &[DiskPart],
) -> Result<Vec<GuestDisk>, Failure> {
    let mut added = Vec::new();
    for part in parts {
        let disk = disks::acquire(sandbox, part).await?;
        let number = (part.major, part.minor);
        let kept = {
            let mut inner = sandbox.inner();
            let entry = inner.containers.get_mut(id);
            entry.map(|entry| entry.disks.push(number))
        };
        if kept.is_none() {
            disks::release(sandbox, number).await;
            return Err(deleted(id));
        }
        if !added.contains(&disk) {
            added.push(disk);
        }
    }
    Ok(added)
}

fn deleted(id: &str) -> Failure {
    Failure::new(
        Kind::NotFound,
        format!("container {id} was deleted meanwhile"),
    )
}

fn split(sandbox: &Sandbox, request: &ContainerRequest) -> Result<Split, Failure> {
    if request.id == sandbox.id
        && let Some(first) = sandbox.inner().first_split.take()
    {
        return Ok(first);
    }
    let spec = spec::read(&request.bundle)?;
    let task_of = |pid: u32| {
        let inner = sandbox.inner();
        let first = inner
            .first
            .as_ref()
            .filter(|(_, stand_in)| stand_in.pid() == pid);
        if first.is_some() {
            return Some(sandbox.id.clone());
        }
        let is_it = |container: &Container| {
            container
                .stand_in
                .as_ref()
                .is_some_and(|stand_in| stand_in.pid() == pid)
        };
        let mut containers = inner.containers.iter();
        containers
            .find(|(_, container)| is_it(container))
            .map(|(id, _)| id.clone())
    };
    let pod = spec::Pod {
        task_of: &task_of,
        volume_name: &volumes::name,
        memory_of: &mut |source| {
            let found = memory::look(source)?;
            Ok(found.map(|found| sandbox.inner().memory.volume(found)))
        },
        system_of: &file_systems::of_path,
    };
    spec::split(spec, &request.bundle, pod)
}

/// A container's stand-in: the sandbox's own was born with the pod.
async fn stand_in(
    sandbox: &Arc<Sandbox>,
    id: &str,
    cgroups_path: Option<&str>,
) -> Result<(Cgroup, StandIn), Failure> {
    if id == sandbox.id
        && let Some(first) = sandbox.inner().first.take()
    {
        return Ok(first);
    }
    let failed = |cause| Failure::failed(format!("make the cgroup of container {id}"), cause);
    let path = cgroup::path_of(cgroups_path, &sandbox.namespace, id).map_err(failed)?;
    let cgroup = Cgroup::create(&path).map_err(failed)?;
    let (task, sandbox) = (id.to_owned(), Arc::clone(sandbox));
    blocking(move || {
        let network = Network::Join(sandbox.network.as_fd());
        let empty = sandbox.state.path().join(name::EMPTY);
        let stand_in = StandIn::start(&task, cgroup.as_fd(), network, &empty).map_err(|cause| {
            cgroup::remove(cgroup.made(), std::time::Duration::ZERO);
            Failure::failed(format!("make container {task}'s place on the host"), cause)
        })?;
        Ok((cgroup, stand_in))
    })
    .await
}

/// Runs a further process in a container.
pub(super) async fn exec(sandbox: &Arc<Sandbox>, request: ExecRequest) -> Result<u32, Failure> {
    let ExecRequest {
        container,
        exec,
        process,
        streams,
    } = request;
    if !kata_like_agent_protocol::is_name(&exec) {
        return Err(Failure::new(
            Kind::BadRequest,
            format!("exec {exec:?}: not a name"),
        ));
    }
    let process = spec::guest_process(&process)?;
    let cgroup = {
        let mut inner = sandbox.inner();
        let entry = inner.containers.get_mut(&container).ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                format!("exec {exec}: no container {container}"),
            )
        })?;
        let Some(cgroup) = entry.cgroup.clone() else {
            return Err(Failure::new(
                Kind::WrongState,
                format!("exec {exec}: container {container} is not made yet"),
            ));
        };
        match entry.execs.entry(exec.clone()) {
            Entry::Occupied(_) => {
                return Err(Failure::new(
                    Kind::AlreadyExists,
                    format!("exec {exec} of container {container} exists already"),
                ));
            }
            Entry::Vacant(entry) => {
                entry.insert(Exec::default());
            }
        }
        cgroup
    };
    let stand_in = {
        let (task, sandbox) = (container.clone(), Arc::clone(sandbox));
        blocking(move || {
            let network = Network::Join(sandbox.network.as_fd());
            let empty = sandbox.state.path().join(name::EMPTY);
            StandIn::start(&task, cgroup.as_fd(), network, &empty)
                .map_err(|cause| Failure::failed(format!("exec in container {task}"), cause))
        })
    };
    // The process's exit can be told before the guest's answer: its stand-in is there before both.
    let started = match stand_in.await {
        Ok(stand_in) => {
            let pid = stand_in.pid();
            keep(sandbox, &container, &exec, stand_in)?;
            sandbox.record();
            let called = sandbox
                .agent
                .exec(&container, &exec, process, &streams)
                .await;
            called.map(|()| pid)
        }
        Err(error) => Err(error),
    };
    if started.is_err() {
        sandbox.forget_exec(&container, &exec).await;
    }
    started
}

fn keep(sandbox: &Sandbox, container: &str, exec: &str, stand_in: StandIn) -> Result<(), Failure> {
    let mut inner = sandbox.inner();
    let entry = inner.containers.get_mut(container);
    let entry = entry.and_then(|entry| entry.execs.get_mut(exec));
    let entry = entry.ok_or_else(|| deleted(container))?;
    sandbox.watch_stand_in(container, exec, &stand_in);
    entry.stand_in = Some(stand_in);
    Ok(())
}
