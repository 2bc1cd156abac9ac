//! What the host asks of a container's processes while it is there: signals, sizes, figures.
//!
//! Called by `service.rs`. Each answers at once, whatever else the container is doing: nothing here
//! waits for a process, and nothing changes the container's state.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cgroup::Stats;
use crate::container::Container;
use crate::error::{PodError, blocking};
use crate::process::{self, Process};

const SIGKILL: u32 = 9;

impl Container {
    /// Sends a signal to its init or an exec.
    pub fn signal(&self, exec: &str, signal: u32) -> Result<(), PodError> {
        let process = self
            .process(exec)
            .filter(|process| !process::exited(process.pidfd()));
        let process = process.ok_or_else(|| self.no_process(exec))?;
        match process.signal(signal)? {
            true => Ok(()),
            false => Err(self.no_process(exec)),
        }
    }

    /// Sends a signal to every process in it.
    pub fn signal_all(&self, signal: u32) -> Result<(), PodError> {
        let cgroup = self.cgroup()?;
        let pids = cgroup
            .pids()
            .map_err(PodError::failed("signal all processes"))?;
        if pids.is_empty() {
            return Err(self.no_process(""));
        }
        if signal == SIGKILL {
            return cgroup
                .kill()
                .map_err(PodError::failed("kill all processes"));
        }
        for pid in pids {
            let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let Some(pidfd) = raw.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
                continue; // It has gone.
            };
            // Only now is it certain whose pid it is.
            if cgroup.holds(pid) {
                process::send(pidfd.as_fd(), pid, signal)?;
            }
        }
        Ok(())
    }

    /// Sets the size of a terminal.
    pub fn resize(&self, exec: &str, width: u16, height: u16) -> Result<(), PodError> {
        let process = self.process(exec).ok_or_else(|| self.no_process(exec))?;
        let resized = process.streams().resize(width, height);
        resized.map_err(PodError::failed(format!(
            "resize the terminal of {}",
            self.named(exec)
        )))
    }

    /// Its processes, the init first, with the names of execs.
    pub fn processes(&self) -> Result<Vec<(u32, String)>, PodError> {
        let mut pids = self
            .cgroup()?
            .pids()
            .map_err(PodError::failed("list its processes"))?;
        let state = self.state();
        let init = state.init.as_ref().map(|init| init.pid());
        pids.sort_by_key(|pid| Some(*pid) != init);
        let exec = |pid| {
            let mut execs = state.execs.iter();
            let process = |process: &Option<Arc<Process>>| process.as_ref().map(|it| it.pid());
            execs
                .find(|exec| process(exec.1) == Some(pid))
                .map_or("", |(name, _)| name)
        };
        Ok(pids
            .into_iter()
            .map(|pid| (pid, exec(pid).to_owned()))
            .collect())
    }

    /// Its figures.
    pub async fn stats(&self) -> Result<Stats, PodError> {
        let cgroup = self.cgroup()?;
        blocking("read the figures", move || {
            Ok::<_, PodError>(cgroup.stats())
        })
        .await
    }
}
