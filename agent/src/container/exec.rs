//! Further processes of a running container.
//!
//! Called by `service.rs`. An exec's name is taken from the begin of its set-up until it exits. Its
//! streams may carry data for a while longer.

use std::sync::Arc;

use kata_like_failure::{Failure, Kind, Step};
use oci_spec::runtime::Process as OciProcess;

use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::process::Process;
use crate::reaper::{self, Exit};
use crate::runner::{self, ExecRequest};
use crate::stdio::{self, Wanted};

impl Container {
    /// Runs a further process in the container. Returns its pid.
    pub async fn exec(
        self: &Arc<Self>,
        exec: &str,
        process: OciProcess,
        wanted: Wanted,
    ) -> Result<u32, Failure> {
        if self.placeholder.is_some() {
            return Err(self.runs_nothing());
        }
        self.around.events.have_room()?;
        let (init, cgroup) = {
            let mut state = self.state();
            let (Some(init), Some(cgroup), true) = (
                state.init.clone(),
                state.cgroup.clone(),
                state.phase.takes_processes(),
            ) else {
                return Err(self.wrong_state(&state.phase, "running"));
            };
            if state.execs.contains_key(exec) {
                let text = format!("exec {}/{exec} exists already", self.name);
                return Err(Failure::new(Kind::AlreadyExists, text));
            }
            state.execs.insert(exec.into(), None);
            state
                .lingering
                .retain(|process| !process.streams().finished());
            (init, cgroup)
        };
        let result = self
            .set_up_exec(exec, process, wanted, &init, &cgroup)
            .await;
        if result.is_err() {
            self.state().execs.remove(exec);
        }
        result
    }

    async fn set_up_exec(
        self: &Arc<Self>,
        exec: &str,
        process: OciProcess,
        wanted: Wanted,
        init: &Process,
        cgroup: &Cgroup,
    ) -> Result<u32, Failure> {
        let (stdio, plan) = stdio::prepare(&self.around.tokens, &wanted)?;
        let request = ExecRequest {
            container: self.name.clone(),
            spec: self.made_of.spec.clone(),
            process,
            cgroup: cgroup.directory().into(),
            cgroup_of_init: cgroup.of(init.pid()),
        };
        let executed = runner::exec(request, init.pidfd(), stdio).await?;
        let exit = reaper::exited(executed.pid);
        let streams = plan
            .connect(executed.terminal)
            .step(|| "watch its streams")?;
        let process = Arc::new(Process::new(executed.pid, executed.pidfd, streams));
        self.state()
            .execs
            .insert(exec.into(), Some(process.clone()));
        let (container, exec) = (self.clone(), exec.to_owned());
        tokio::spawn(async move {
            let exit = exit.await;
            container.exec_exited(exec, &process, exit);
        });
        Ok(executed.pid)
    }

    fn exec_exited(&self, exec: String, process: &Arc<Process>, exit: Exit) {
        let mut state = self.state();
        state.execs.remove(&exec);
        self.tell_exit(&state, exec, process, exit);
        state.lingering.push(process.clone());
    }
}
