//! What the host asks of a container's processes: signals, the size of a terminal.
//!
//! Called by `service.rs`. Each call answers at once, whatever else the container is doing.

use std::os::fd::AsFd;

use kata_like_failure::{Failure, Step};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::container::{Container, SIGKILL};
use crate::process;

impl Container {
    /// Sends a signal to the init, or to an exec.
    pub fn signal(&self, exec: &str, signal: u32) -> Result<(), Failure> {
        if exec.is_empty() && self.end_placeholder(signal) {
            return Ok(());
        }
        let process = self
            .process(exec)
            .filter(|process| !process::exited(process.pidfd()));
        let process = process.ok_or_else(|| self.no_process(exec))?;
        match process.signal(signal)? {
            true => Ok(()),
            false => Err(self.no_process(exec)),
        }
    }

    /// Sends a signal to every process of the container.
    pub fn signal_all(&self, signal: u32) -> Result<(), Failure> {
        if self.end_placeholder(signal) {
            return Ok(());
        }
        let cgroup = self.cgroup()?;
        let pids = cgroup.pids().step(|| "signal all processes")?;
        if pids.is_empty() {
            return Err(self.no_process(""));
        }
        if signal == SIGKILL {
            return cgroup.kill().step(|| "kill all processes");
        }
        for pid in pids {
            let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let Some(pidfd) = raw.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
                continue; // It has gone.
            };
            // Checked with the pidfd open: before, the pid may have become another process's.
            if cgroup.holds(pid) {
                process::send(pidfd.as_fd(), pid, signal)?;
            }
        }
        Ok(())
    }

    /// Sets the size of a terminal.
    pub fn resize(&self, exec: &str, width: u16, height: u16) -> Result<(), Failure> {
        if self.placeholder.is_some() {
            return Ok(());
        }
        let process = self.process(exec).ok_or_else(|| self.no_process(exec))?;
        let resized = process.streams().resize(width, height);
        resized.step(|| format!("resize the terminal of {}", self.named(exec)))
    }

    /// Whether the container has processes, zombies aside.
    pub fn has_processes(&self) -> bool {
        let cgroup = self.cgroup();
        cgroup.is_ok_and(|cgroup| cgroup.pids().is_ok_and(|pids| !pids.is_empty()))
    }
}
