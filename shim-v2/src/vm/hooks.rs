//! When a container's hooks run, and what they are told.
//!
//! Called by `container` and `sandbox`; `crate::hooks` runs them. As with runc: what fails before the
//! container exists fails its creation, what fails after its start kills it, and what fails after
//! its end is a line in the log. The last kind also runs for a creation that has failed, to undo what the
//! first kind has done.

use std::path::PathBuf;
use std::sync::Arc;

use super::Sandbox;
use crate::cgroup::Cgroup;
use crate::hooks::{DEADLINE, Place, State, owe_poststop, run, take_poststop};
use crate::spec::HostHooks;
use kata_like_failure::Failure;

/// A container's hooks, and what of their state does not change.
#[derive(Debug)]
pub(super) struct ContainerHooks {
    id: String,
    bundle: PathBuf,
    hooks: HostHooks,
}

impl ContainerHooks {
    pub(super) fn new(id: &str, bundle: PathBuf, hooks: HostHooks) -> Self {
        Self {
            id: id.to_owned(),
            bundle,
            hooks,
        }
    }

    async fn run(
        &self,
        kinds: &[Kind],
        status: &'static str,
        pid: u32,
        place: &Place,
    ) -> Result<(), Failure> {
        let bundle = self.bundle.display().to_string();
        let state = State {
            oci_version: &self.hooks.version,
            id: &self.id,
            status,
            pid,
            bundle: &bundle,
            annotations: &self.hooks.annotations,
        };
        for kind in kinds {
            let (name, hooks) = match kind {
                Kind::Prestart => ("prestart", &self.hooks.prestart),
                Kind::CreateRuntime => ("createRuntime", &self.hooks.create_runtime),
                Kind::Poststart => ("poststart", &self.hooks.poststart),
                Kind::Poststop => ("poststop", &self.hooks.poststop),
            };
            run(name, hooks, &state, place, DEADLINE).await?;
        }
        Ok(())
    }

    fn place(&self, sandbox: &Sandbox, cgroup: Option<Arc<Cgroup>>) -> Place {
        Place {
            cgroup,
            mounts: sandbox.host_mounts.clone(),
            directory: self.bundle.clone(),
        }
    }
}

enum Kind {
    Prestart,
    CreateRuntime,
    Poststart,
    Poststop,
}

/// Before the guest makes the container, whose stand-in is there.
pub(super) async fn before_create(
    sandbox: &Sandbox,
    hooks: &ContainerHooks,
    pid: u32,
    cgroup: Option<Arc<Cgroup>>,
) -> Result<(), Failure> {
    if !hooks.hooks.poststop.is_empty() {
        owe_poststop(&hooks.bundle)?;
    }
    let place = hooks.place(sandbox, cgroup);
    let kinds = [Kind::Prestart, Kind::CreateRuntime];
    hooks.run(&kinds, "creating", pid, &place).await
}

/// After the container's start.
pub(super) async fn after_start(sandbox: &Sandbox, id: &str) -> Result<(), Failure> {
    let (hooks, pid, cgroup) = {
        let inner = sandbox.inner();
        let Some(container) = inner.containers.get(id) else {
            return Ok(());
        };
        let Some(hooks) = container.hooks.clone() else {
            return Ok(());
        };
        let pid = container.stand_in.as_ref().map_or(0, |it| it.pid());
        (hooks, pid, container.cgroup.clone())
    };
    let place = hooks.place(sandbox, cgroup);
    hooks.run(&[Kind::Poststart], "running", pid, &place).await
}

/// After the container's end.
pub(super) async fn after_stop(
    sandbox: &Sandbox,
    hooks: &ContainerHooks,
    cgroup: Option<Arc<Cgroup>>,
) {
    if !take_poststop(&hooks.bundle) {
        return;
    }
    let place = hooks.place(sandbox, cgroup);
    if let Err(error) = hooks.run(&[Kind::Poststop], "stopped", 0, &place).await {
        tracing::warn!(container = hooks.id, "{}", error.one_line());
    }
}
