//! A container that `ctr` runs in the background. With kata-like it is a pod by itself, and has the
//! pod's processes on the host.
//!
//! It is deleted when it goes out of scope, also after a failed test.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::ctr::{Call, Output};
use crate::host::{Host, NAMESPACE};
use crate::process::{Process, until};
use crate::{TestResult, failure, is_oracle};

/// A container in the background; with kata-like, a pod by itself.
pub struct CtrContainer<'host> {
    host: &'host Host,
    id: String,
    deleted: bool,
}

impl<'host> CtrContainer<'host> {
    /// A container with this id, which the caller makes. It is cleaned up in any case.
    pub fn new(host: &'host Host, id: String) -> Self {
        Self {
            host,
            id,
            deleted: false,
        }
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `ctr task exec` of a command, to which the caller may give input or a deadline.
    pub fn exec_call(&self, options: &[&str], command: &[&str]) -> Call {
        let exec = self.host.name("exec");
        let mut arguments = vec!["task", "exec", "--exec-id", &exec];
        arguments.extend(options);
        arguments.push(&self.id);
        arguments.extend(command);
        self.host.ctr(arguments)
    }

    /// Runs a command in the container.
    pub fn exec(&self, command: &[&str]) -> TestResult<Output> {
        self.exec_call(&[], command).output()
    }

    /// `ctr task kill -s SIGNAL`.
    pub fn kill(&self, signal: &str) -> TestResult<Output> {
        self.host
            .ctr(["task", "kill", "--signal", signal, &self.id])
            .output()
    }

    /// The status column of `ctr task ls`, and the pid.
    pub fn status(&self) -> TestResult<(String, i32)> {
        let list = self.host.ctr(["task", "ls"]).ok()?.text();
        for line in list.lines() {
            if let [id, pid, status] = line.split_whitespace().collect::<Vec<_>>()[..]
                && id == self.id
            {
                return Ok((status.to_owned(), pid.parse()?));
            }
        }
        Err(failure(format!("no {} in: {list}", self.id)))
    }

    /// Waits until `ctr task ls` shows this status.
    pub fn wait_status(&self, wanted: &str, deadline: Duration) -> TestResult {
        let mut last = String::new();
        until("a status", deadline, || {
            last = match self.status() {
                Ok((status, _)) => status,
                Err(error) => error.to_string(),
            };
            last == wanted
        })
        .map_err(|error| failure(format!("{error}: {wanted}, last {last}")))
    }

    /// `ctr task rm`, then `ctr container rm`; returns the container's exit status.
    pub fn delete(mut self) -> TestResult<i32> {
        self.deleted = true;
        let task = self.host.ctr(["task", "rm", &self.id]).ok()?;
        self.delete_container()?;
        // ctr prints the status only if it is not 0, as a warning.
        match task.error_text().split_once("non-zero exit code ") {
            None => Ok(0),
            Some((_, rest)) => Ok(rest.trim_end_matches('"').parse()?),
        }
    }

    /// Kills and deletes.
    pub fn remove(mut self) -> TestResult {
        self.deleted = true;
        self.host.ctr(["task", "rm", "--force", &self.id]).ok()?;
        self.delete_container()
    }

    /// `ctr container rm`, for a pod whose task is already deleted.
    pub fn remove_container(mut self) -> TestResult {
        self.deleted = true;
        self.delete_container()
    }

    fn delete_container(&self) -> TestResult {
        self.host.ctr(["container", "rm", &self.id]).ok().map(drop)
    }

    /// The pod's state folder.
    pub fn state_folder(&self) -> PathBuf {
        PathBuf::from("/run/kata-like").join(format!("{NAMESPACE}:{}", self.id))
    }

    /// One of the pod's processes on the host, by its name in the record: `vmm`, `fsd`, `proxy` or
    /// `shim`.
    pub fn process(&self, role: &str) -> TestResult<Process> {
        if is_oracle() {
            // runc's shim keeps no record; its arguments name the pod.
            return Process::all()
                .into_iter()
                .find(|process| process.is(role) && process.arguments.contains(&self.id))
                .ok_or_else(|| failure(format!("no {role} of {}", self.id)));
        }
        let path = self.state_folder().join("shim.json");
        let text = fs::read(&path)
            .map_err(|error| failure(format!("read {}: {error}", path.display())))?;
        let record: Value = serde_json::from_slice(&text)?;
        let pid = record[role]["pid"]
            .as_i64()
            .ok_or_else(|| failure(format!("no pid of {role} in {record}")))?;
        Process::find(i32::try_from(pid)?)
            .ok_or_else(|| failure(format!("{role} of {} (pid {pid}) is not there", self.id)))
    }
}

impl Drop for CtrContainer<'_> {
    fn drop(&mut self) {
        if !self.deleted {
            let short = Duration::from_secs(30);
            let _ = self
                .host
                .ctr(["task", "rm", "--force", &self.id])
                .deadline(short)
                .output();
            let _ = self
                .host
                .ctr(["container", "rm", &self.id])
                .deadline(short)
                .output();
        }
    }
}
