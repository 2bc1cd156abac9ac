//! The pod of each runtime, in which most cases have their containers.

use std::sync::PoisonError;

use containerd_shim_protos::api;
use serde_json::json;

use super::{Oracle, RUNTIMES, write};
use crate::TestResult;
use crate::annotations::{Role, annotate};
use crate::task::Task;
use crate::task_api::done;

/// A pod, and its first process.
#[derive(Clone)]
pub(super) struct OraclePod {
    pub(super) id: String,
    pub(super) pid: u32,
}

impl Oracle<'_> {
    /// The pod of a runtime, made on the first request.
    pub(super) fn pod(&self, runtime: usize) -> TestResult<OraclePod> {
        let mut pod = self.pods[runtime]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(pod) = &*pod {
            return Ok(pod.clone());
        }
        let id = self.host.name("oracle-pod");
        let files = self.directory.path().join(&id);
        let mut spec = self.spec(&id, &files)?;
        spec.json["process"]["args"] = json!(["/probe", "pause"]);
        annotate(&mut spec.json, Role::Sandbox, &id);
        let config = write(&files, &spec.json)?;
        let runtime = RUNTIMES[runtime];
        self.host
            .ctr(["run", "-d", "--runtime", runtime, "--config", &config, &id])
            .ok()?;
        let pid = self.state(&id)?.pid;
        Ok(pod.insert(OraclePod { id, pid }).clone())
    }

    /// Whether it still runs, if it was made.
    pub(super) fn pod_lives(&self, runtime: usize) -> bool {
        let pod = self.pods[runtime]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        // A shim that does not answer has gone with its pod.
        pod.is_none_or(|pod| {
            self.state(&pod.id)
                .is_ok_and(|state| state.status == api::Status::RUNNING.into())
        })
    }

    /// Removes it; the next case gets a new one.
    pub(super) fn remove_pod(&self, runtime: usize) {
        let pod = self.pods[runtime]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(pod) = pod else { return };
        for arguments in [
            ["task", "rm", "--force", &pod.id].as_slice(),
            &["container", "rm", &pod.id],
        ] {
            let _ = self.host.ctr(arguments).output();
        }
    }

    /// The state from its shim, asked directly: `ctr` would take most of a second under emulation.
    fn state(&self, id: &str) -> TestResult<api::StateResponse> {
        done(Task::of(self.host, id)?.state("")?)
    }
}
