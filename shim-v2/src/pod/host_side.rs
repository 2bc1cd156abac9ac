//! What one container has on the host, and the steps by which it gets into the guest.
//!
//! A container owns its [`HostSide`] from its first request on. Each step hands what it has made to
//! it, so a creation that fails, a deletion and the pod's end take the same way back. One that is
//! taken back while it is still being made makes the next step fail.

use std::fmt;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use kata_like_config::state::name;

use super::bring_up::First;
use super::hooks::ContainerHooks;
use super::limits::Limits;
use super::sandbox::Sandbox;
use super::{mounts, oom_score, sources};
use crate::cgroup::{self, Cgroup};
use crate::network::resolver::ResolvConf;
use crate::share::RootfsMount;
use crate::spawn::{Child, Network};
use crate::spec::{self, HostPart, NetworkPart, Owners, Pinned, Split};
use crate::stand_in::{StandIn, StandInError};
use crate::steps::{self, Build, Undo, blocking};
use crate::vm::agent::{GuestContainer, GuestDisk, StreamTokens};
use crate::vm::guest::Guest;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use kata_like_spec::OTHER_NETWORK;

/// How long the agent has to delete a container before the host goes on without it. Nothing is lost
/// then: what the fs server has open it goes on to serve. containerd's CRI plugin gives all of a
/// deletion ten seconds.
const DELETE_IN_GUEST: Duration = Duration::from_secs(5);
/// How long a cgroup may take to be empty.
const EMPTY: Duration = Duration::from_millis(500);

/// A container's side on the host: stand-in, cgroup, mounts, volumes, disks, and the hooks that are
/// owed.
#[derive(Debug, Default)]
pub(super) struct HostSide {
    made: Undo,
    place: OnceLock<Place>,
    /// Its limits, as far as it has them.
    limits: Mutex<Limits>,
    /// The pinned namespaces in whose place it has its own.
    pinned: OnceLock<Vec<Pinned>>,
}

/// Where a container's processes are seen on the host, and what is needed at its start.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) stand_in: Child,
    pub(super) cgroup: Arc<Cgroup>,
    pub(super) hooks: Arc<ContainerHooks>,
    /// What names its name servers.
    pub(super) resolv_conf: ResolvConf,
}

impl HostSide {
    /// Its place, once it is made.
    pub(super) fn place(&self) -> Result<&Place, Failure> {
        self.place.get().ok_or_else(|| {
            Failure::new(Kind::WrongState, "the container is not made yet".to_owned())
        })
    }

    pub(super) fn limits(&self) -> MutexGuard<'_, Limits> {
        lock(&self.limits)
    }

    pub(super) fn pinned(&self) -> &[Pinned] {
        self.pinned.get().map_or(&[], Vec::as_slice)
    }

    /// Whether it is being taken back, or has been.
    pub(super) fn has_ended(&self) -> bool {
        self.made.is_undone()
    }

    /// Takes everything back: in the guest, then here. Succeeds with a dead VM.
    pub(super) async fn end(&self) {
        self.made.run().await;
    }
}

/// What a container is made from.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) id: String,
    /// Holds `config.json`.
    pub(super) bundle: PathBuf,
    /// The root file system's mounts; empty: the spec's `root.path` is it.
    pub(super) rootfs: Vec<RootfsMount>,
    /// It holds the pod's namespaces and runs nothing: CRI's pause container.
    pub(super) placeholder: bool,
    /// The init's standard streams.
    pub(super) streams: StreamTokens,
}

/// The steps of a creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Reads the spec, checks it and splits it.
    Spec,
    /// Stand-in and cgroup; beside them the mounts.
    Place,
    Hooks,
    Disks,
    Guest,
}

const ORDER: [Step; 5] = [
    Step::Spec,
    Step::Place,
    Step::Hooks,
    Step::Disks,
    Step::Guest,
];

impl fmt::Display for Step {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        to.write_str(match self {
            Self::Spec => "spec",
            Self::Place => "place",
            Self::Hooks => "hooks",
            Self::Disks => "disks",
            Self::Guest => "guest",
        })
    }
}

/// Makes a container up to the point before its first instruction. `first` is there for the
/// container that the VM was made for. `owners` tells whose namespaces its spec names.
pub(super) async fn make(
    host_side: &HostSide,
    sandbox: &Arc<Sandbox>,
    request: Request,
    first: Option<First>,
    owners: &Owners,
) -> Result<u32, Failure> {
    let id = request.id.clone();
    let (split, born) = match first {
        Some(first) => (Some(first.split), Some((first.cgroup, first.stand_in))),
        None => (None, None),
    };
    let mut making = Making {
        host_side,
        sandbox,
        request,
        is_first: born.is_some(),
        born,
        split,
        root_volume: None,
        disks: Vec::new(),
        owners,
    };
    let (times, built) = steps::build(&mut making, &host_side.made).await;
    built?;
    tracing::debug!(container = id, "made in {:?} ({times})", times.total());
    Ok(host_side.place()?.stand_in.pid)
}

struct Making<'a> {
    host_side: &'a HostSide,
    sandbox: &'a Arc<Sandbox>,
    request: Request,
    /// The VM was made for it: its cgroup is the pod's.
    is_first: bool,
    born: Option<(Cgroup, StandIn)>,
    split: Option<Split>,
    root_volume: Option<String>,
    disks: Vec<GuestDisk>,
    owners: &'a Owners,
}

impl Build for Making<'_> {
    type Step = Step;

    fn order(&self) -> &'static [Step] {
        &ORDER
    }

    async fn make(&mut self, step: Step, undo: &Undo) -> Result<(), Failure> {
        match step {
            Step::Spec => self.read_spec(),
            Step::Place => self.make_place(undo).await,
            Step::Hooks => {
                let place = self.host_side.place()?;
                place.hooks.before_create(place.stand_in.pid).await
            }
            Step::Disks => self.add_disks(undo).await,
            Step::Guest => self.make_in_guest(undo).await,
        }
    }
}

impl Making<'_> {
    fn host(&self) -> Result<&HostPart, Failure> {
        let split = self.split.as_ref();
        let none = || Failure::new(Kind::Failed, "make a container: its spec was not read");
        split.map(|split| &split.host).ok_or_else(none)
    }

    fn read_spec(&mut self) -> Result<(), Failure> {
        let id = self.request.id.as_str();
        if self.split.is_none() {
            let split = split(self.sandbox, &self.request.bundle, self.owners)
                .map_err(|error| error.during(format!("read the spec of container {id}")))?;
            self.split = Some(split);
        }
        let host = self.host()?;
        let is_pod_s = match &host.network {
            NetworkPart::Pod => true,
            NetworkPart::Path(path) => self.sandbox.network.namespace().is_at(path),
            NetworkPart::New => false,
        };
        if !self.is_first && !is_pod_s {
            return Err(OTHER_NETWORK.of(OTHER_NETWORK.field));
        }
        if !host.left_out.is_empty() {
            let paths: Vec<_> = host.left_out.iter().map(|path| path.display()).collect();
            tracing::info!(
                container = id,
                "privileged: these devices of the host are left out: {paths:?}"
            );
        }
        let limits = Limits {
            memory: host.memory_limit,
            cpu_quota: host.cpu_quota,
        };
        let pinned = host.pinned.clone();
        *self.host_side.limits() = limits;
        let _ = self.host_side.pinned.set(pinned);
        Ok(())
    }

    /// Stand-in and mounts are made side by side. Both are handed over before the failure of one is
    /// told.
    async fn make_place(&mut self, undo: &Undo) -> Result<(), Failure> {
        let id = self.request.id.clone();
        let host = self.host()?;
        let resolv_conf = self.resolv_conf(host);
        let (hooks, cgroups_path) = (host.hooks.clone(), host.cgroups_path.clone());
        let (wanted, root) = (host.volumes.clone(), host.root.clone());
        let rootfs = self.request.rootfs.clone();
        let oom_score = self.enter_oom_score(host.oom_score, undo).await?;
        let born = self.born.take();
        let stand_in = async {
            match born {
                Some(born) => Ok(born),
                None => stand_in(self.sandbox, &id, cgroups_path.as_deref(), oom_score).await,
            }
        };
        let mounts = mounts::make(
            self.sandbox,
            &id,
            &self.request.bundle,
            rootfs,
            wanted,
            root,
        );
        let (stand_in, mounts) = tokio::join!(stand_in, mounts);
        let mounts = mounts.map_err(|error| error.during(format!("mount for container {id}")));
        let (cgroup, stand_in) = match stand_in {
            Ok((cgroup, stand_in)) => (Arc::new(cgroup), stand_in),
            Err(error) => {
                mounts?.hand_over(undo).await?;
                return Err(error);
            }
        };
        let ledger = Arc::clone(&self.sandbox.ledger);
        ledger.add(&id, stand_in.pid(), cgroup.made());
        self.sandbox.oom_score.catch_up(oom_score);
        let (task, is_first, own) = (id.clone(), self.is_first, Arc::clone(&cgroup));
        undo.push(async move {
            // The first container's cgroup holds the leaf that the shim lives in: it goes with the
            // pod.
            if !is_first {
                remove_cgroup(own).await;
            }
            ledger.remove(&task);
        })
        .await?;
        let hooks = Arc::new(ContainerHooks::new(
            &id,
            self.request.bundle.clone(),
            hooks,
            Arc::clone(&cgroup),
            self.sandbox.host_mounts.clone(),
        ));
        let owed = Arc::clone(&hooks);
        undo.push(async move { owed.after_stop().await }).await?;
        let child = stand_in.child().clone();
        let mounted = match mounts {
            Ok(mounts) => {
                self.root_volume = mounts.root_volume.clone();
                mounts.hand_over(undo).await
            }
            Err(error) => Err(error),
        };
        let (ledger, task) = (Arc::clone(&self.sandbox.ledger), id);
        undo.push(async move {
            let pid = stand_in.pid();
            stand_in.end().await;
            ledger.remove_stand_in(&task, pid);
        })
        .await?;
        mounted?;
        let place = Place {
            stand_in: child,
            cgroup,
            hooks,
            resolv_conf,
        };
        let _ = self.host_side.place.set(place);
        Ok(())
    }

    /// The pod's score follows the container's from now on; answers what its stand-in is born with,
    /// or was.
    async fn enter_oom_score(&self, wanted: Option<i32>, undo: &Undo) -> Result<i32, Failure> {
        let (pod, placeholder) = (&self.sandbox.oom_score, self.request.placeholder);
        if !placeholder {
            pod.add(&self.request.id, wanted);
            let (pod, task) = (Arc::clone(pod), self.request.id.clone());
            undo.push(async move { pod.remove(&task) }).await?;
        }
        Ok(match self.is_first {
            true => oom_score::at_birth(wanted, placeholder),
            false => pod.now(),
        })
    }

    fn resolv_conf(&self, host: &HostPart) -> ResolvConf {
        if let Some(path) = &host.resolv_conf {
            return ResolvConf {
                root: "/".into(),
                path: path.clone(),
            };
        }
        ResolvConf {
            root: match (&host.root, self.request.rootfs.is_empty()) {
                (Some(root), true) => root.clone(),
                _ => self.request.bundle.join("rootfs"),
            },
            path: "/etc/resolv.conf".into(),
        }
    }

    async fn add_disks(&mut self, undo: &Undo) -> Result<(), Failure> {
        for part in self.host()?.disks.clone() {
            let disk = self.sandbox.disks.acquire(&part).await?;
            let (disks, number) = (Arc::clone(&self.sandbox.disks), (part.major, part.minor));
            undo.push(async move { disks.release(number).await })
                .await?;
            if !self.disks.contains(&disk) {
                self.disks.push(disk);
            }
        }
        Ok(())
    }

    async fn make_in_guest(&mut self, undo: &Undo) -> Result<(), Failure> {
        let none = || Failure::new(Kind::Failed, "make a container: its spec was not read");
        let Split { guest: part, .. } = self.split.take().ok_or_else(none)?;
        let made_of = GuestContainer {
            part,
            root_volume: self.root_volume.take(),
            placeholder: self.request.placeholder,
            disks: std::mem::take(&mut self.disks),
        };
        let (id, guest) = (self.request.id.clone(), self.sandbox.guest.clone());
        let created = guest
            .agent
            .create_container(&id, made_of, &self.request.streams)
            .await;
        created.map_err(|error| self.sandbox.labels.blame_files(error))?;
        undo.push(async move { delete_in_guest(&guest, &id).await })
            .await
    }
}

fn split(sandbox: &Sandbox, bundle: &std::path::Path, owners: &Owners) -> Result<Split, Failure> {
    let spec = spec::read(bundle)?;
    let halves = spec::split(spec, bundle, owners)?;
    let found = sources::look_up(&halves.binds, |found| sandbox.memory_names().volume(found))?;
    halves.with(found)
}

/// Makes a container's cgroup, and its stand-in in it.
async fn stand_in(
    sandbox: &Arc<Sandbox>,
    id: &str,
    cgroups_path: Option<&str>,
    oom_score: i32,
) -> Result<(Cgroup, StandIn), Failure> {
    let failed = |cause| Failure::failed(format!("make the cgroup of container {id}"), cause);
    let path = cgroup::path_of(cgroups_path, &sandbox.namespace, id).map_err(failed)?;
    let cgroup = Cgroup::create(&path).map_err(failed)?;
    let (task, sandbox) = (id.to_owned(), Arc::clone(sandbox));
    blocking(move || {
        let stand_in = start_stand_in(&sandbox, &task, &cgroup, oom_score).map_err(|cause| {
            cgroup::remove(cgroup.made(), Duration::ZERO);
            Failure::failed(format!("make container {task}'s place on the host"), cause)
        })?;
        Ok((cgroup, stand_in))
    })
    .await
}

/// Starts a stand-in in the pod's network namespace. Blocks.
pub(super) fn start_stand_in(
    sandbox: &Sandbox,
    task: &str,
    cgroup: &Cgroup,
    oom_score: i32,
) -> Result<StandIn, StandInError> {
    let network = Network::Join(sandbox.network.namespace().as_fd());
    let empty = sandbox.state.path().join(name::EMPTY);
    StandIn::start(task, cgroup.as_fd(), network, &empty, oom_score)
}

/// Removes a container's cgroup, with what a hook has left behind in it.
async fn remove_cgroup(cgroup: Arc<Cgroup>) {
    let remove = move || {
        for busy in cgroup::remove(cgroup.made(), EMPTY) {
            cgroup::kill(&busy);
        }
        cgroup::remove(cgroup.made(), EMPTY);
    };
    let _ = tokio::task::spawn_blocking(remove).await;
}

async fn delete_in_guest(guest: &Guest, id: &str) {
    if !guest.answers() {
        return;
    }
    if let Err(error) = guest.agent.delete_container(id, DELETE_IN_GUEST).await
        && error.kind() != Kind::NotFound
    {
        // The mounts are taken away under it: lazily, so this can't fail.
        tracing::warn!("{}; the host's side goes on", error.one_line());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_step_that_fails_undoes_those_before_it_in_reverse() {
        let wanted = ["spec", "place", "hooks", "disks", "guest"];
        steps::tests::check(&ORDER, &wanted).await;
    }
}
