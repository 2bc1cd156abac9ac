//! When a container's hooks run on the host, and what they are told.
//!
//! Called by `host_side` and `start`; `crate::hooks` runs them. As with runc: what fails before the
//! container exists fails its creation, what fails after its start kills it, and what fails after
//! its end is a line in the log. The last kind also runs for a creation that has failed, to undo
//! what the first kind has done.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::cgroup::Cgroup;
use crate::hooks::{DEADLINE, Place, State, owe_poststop, run, take_poststop};
use crate::spec::HostHooks;
use kata_like_failure::Failure;

/// A container's hooks, what they are told, and where they run.
#[derive(Debug)]
pub(super) struct ContainerHooks {
    id: String,
    hooks: HostHooks,
    place: Place,
}

enum Kind {
    Prestart,
    CreateRuntime,
    Poststart,
    Poststop,
}

impl ContainerHooks {
    pub(super) fn new(
        id: &str,
        bundle: PathBuf,
        hooks: HostHooks,
        cgroup: Arc<Cgroup>,
        mounts: Option<Arc<OwnedFd>>,
    ) -> Self {
        Self {
            id: id.to_owned(),
            hooks,
            place: Place {
                cgroup: Some(cgroup),
                mounts,
                directory: bundle,
            },
        }
    }

    /// Before the guest makes the container, whose stand-in is there.
    pub(super) async fn before_create(&self, pid: u32) -> Result<(), Failure> {
        if !self.hooks.poststop.is_empty() {
            owe_poststop(&self.place.directory)?;
        }
        let kinds = [Kind::Prestart, Kind::CreateRuntime];
        self.run(&kinds, "creating", pid).await
    }

    /// After the container's start.
    pub(super) async fn after_start(&self, pid: u32) -> Result<(), Failure> {
        self.run(&[Kind::Poststart], "running", pid).await
    }

    /// After the container's end.
    pub(super) async fn after_stop(&self) {
        if !take_poststop(&self.place.directory) {
            return;
        }
        if let Err(error) = self.run(&[Kind::Poststop], "stopped", 0).await {
            tracing::warn!(container = self.id, "{}", error.one_line());
        }
    }

    async fn run(&self, kinds: &[Kind], status: &'static str, pid: u32) -> Result<(), Failure> {
        let bundle = self.place.directory.display().to_string();
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
            run(name, hooks, &state, &self.place, DEADLINE).await?;
        }
        Ok(())
    }
}
