//! A placeholder: the container that holds a pod's namespaces and runs nothing.
//!
//! Called by the other files of `container/`. Namespaces are open files, so they need no process.
//! Only a PID namespace lives by its first process: that is made when another container first joins
//! it. From then on the placeholder has an init, which is signalled, awaited and killed like any
//! other.

use std::convert::Infallible;
use std::fs::File;
use std::sync::Arc;
use std::time::SystemTime;

use kata_like_failure::{Failure, Step};
use kata_like_linux::lock;
use oci_spec::runtime::LinuxNamespaceType;

use crate::cgroup::Cgroup;
use crate::container::{Container, Phase, SIGKILL};
use crate::deadline::blocking;
use crate::events::Event;
use crate::process::{self, Process};
use crate::reaper;
use crate::runner::{self, Joined, PlaceholderRequest};
use crate::stdio::{Plan, Streams};

const SIGINT: u32 = 2;
const SIGTERM: u32 = 15;

impl Container {
    /// Makes the namespaces of the placeholder. Its cgroup is there already.
    pub(super) async fn hold(
        &self,
        cgroup: &Cgroup,
        joined: Vec<Joined>,
        plan: Plan,
    ) -> Result<(), Failure> {
        let streams = plan.connect(None).step(|| "watch its streams")?;
        if let Some(placeholder) = &self.placeholder {
            let mut place = lock(&placeholder.streams);
            *place = Some(streams);
        }
        let request = self.request(cgroup);
        let namespaces = if runner::has_users(&request.spec) {
            runner::hold_in_users(request, joined).await?
        } else {
            let work = move || Ok::<_, Infallible>(runner::hold(&request, joined));
            blocking("make the namespaces of the pod", work).await??
        };
        let mut state = self.state();
        if !matches!(state.phase, Phase::Creating) {
            return Err(self.wrong_state(&state.phase, "being created"));
        }
        state.namespaces = namespaces;
        state.phase = Phase::Created(None);
        Ok(())
    }

    fn request(&self, cgroup: &Cgroup) -> PlaceholderRequest {
        PlaceholderRequest {
            container: self.name.clone(),
            spec: self.made_of.spec.clone(),
            guest_namespaces: self.made_of.guest_namespaces.clone(),
            cgroup: cgroup.directory().into(),
        }
    }

    /// Does to a placeholder without a process what `signal` would do to its process. Returns
    /// `false` if there is a process to send it to, or no placeholder that lives.
    pub(super) fn end_placeholder(&self, signal: u32) -> bool {
        let mut state = self.state();
        if self.placeholder.is_none() || state.init.is_some() || !state.phase.is_alive() {
            return false;
        }
        let status = match signal {
            SIGKILL => 128 + SIGKILL,
            SIGINT | SIGTERM => 0,
            // The first process of a PID namespace ignores signals that it does not expect.
            _ => return true,
        };
        // The first process may be coming up right now.
        self.kill(&state);
        state.phase = Phase::Stopped;
        self.around.events.push(Event::Exited {
            container: self.name.clone(),
            exec: String::new(),
            status,
            at: SystemTime::now(),
            carried: [0, 0],
        });
        true
    }

    /// Makes the first process of a placeholder's PID namespace, unless it is there. Other
    /// containers have one anyway.
    pub(super) async fn ensure_first_process(self: &Arc<Self>) -> Result<(), Failure> {
        let Some(placeholder) = &self.placeholder else {
            return Ok(());
        };
        let kept = |state: &super::State| {
            let mut namespaces = state.namespaces.iter();
            namespaces.any(|namespace| namespace.0 == LinuxNamespaceType::Pid)
        };
        if kept(&self.state()) {
            return Ok(());
        }
        let first = placeholder
            .first_process
            .get_or_try_init(|| self.make_first_process());
        first.await.copied()
    }

    async fn make_first_process(self: &Arc<Self>) -> Result<(), Failure> {
        let (request, joined) = {
            let state = self.state();
            let (Some(cgroup), true) = (&state.cgroup, state.phase.takes_processes()) else {
                return Err(self.wrong_state(&state.phase, "running"));
            };
            let namespaces = state.namespaces.iter().map(|(kind, namespace)| {
                let kind = *kind;
                let namespace = namespace.try_clone()?;
                Ok(Joined { kind, namespace })
            });
            let joined = namespaces.collect::<std::io::Result<_>>();
            let joined = joined.step(|| "keep the namespaces of the pod")?;
            (self.request(cgroup), joined)
        };
        let born = runner::first_process(request, joined).await?;
        let exit = reaper::exited(born.pid);
        let init = Arc::new(Process::new(born.pid, born.pidfd, Streams::none()));
        let namespace = File::open(format!("/proc/{}/ns/pid", init.pid()));
        let mut state = self.state();
        // If the process has exited, its pid may be another one's.
        let there = state.phase.is_alive() && !process::exited(init.pidfd());
        let (true, Ok(namespace)) = (there, namespace) else {
            init.signal(SIGKILL)?;
            return Err(self.wrong_state(&state.phase, "running"));
        };
        state.init = Some(init.clone());
        state
            .namespaces
            .push((LinuxNamespaceType::Pid, namespace.into()));
        drop(state);
        self.await_init(init, exit);
        Ok(())
    }

    pub(super) fn runs_nothing(&self) -> Failure {
        Failure::wrong_state(
            format!("container {}", self.name),
            "the pod's placeholder",
            "one that runs processes",
        )
    }
}
