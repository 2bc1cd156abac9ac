//! The container of a case in the pod, or the exec in one, by the task API of the pod's shim.
//!
//! `ctr` would do, too, but takes most of a second per call under emulation.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::{Kind, Oracle, Outcome, Spec, ended};
use crate::fifo::Fifo;
use crate::task::{Streams, Task};
use crate::task_api::{Answer, Refusal, TaskApi, done};
use crate::{TestResult, failure};

/// The name of the one exec.
const EXEC: &str = "probe";

impl Oracle<'_> {
    /// Runs a container of the pod, or a further process in one.
    pub(super) fn in_pod(
        &self,
        id: &str,
        files: &Path,
        mut spec: Spec,
        runtime: usize,
        kind: Kind,
    ) -> TestResult<Outcome> {
        let pod = self.host.bundle(&self.pod(runtime)?.id);
        let api = Arc::new(TaskApi::connect_as_containerd(&pod)?);
        let task = Task::new(api, id.to_owned(), files);
        let output = Fifo::new(files, "output")?;
        let printed = output.collect()?;
        let answer = if kind == Kind::Exec {
            let mut process = spec.json["process"].clone();
            for (key, value) in spec.exec.as_object().into_iter().flatten() {
                process[key] = value.clone();
            }
            spec.json["process"]["args"] = json!(["/probe", "pause"]);
            exec(&task, &bundle(files, &spec.json)?, &process, &output)
        } else {
            let streams = streams(&spec.json["process"], &output);
            run(&task, &bundle(files, &spec.json)?, &streams)
        };
        match answer? {
            Ok(status) => ended(status, &String::from_utf8_lossy(&printed.finish()?)),
            Err(refusal) => Ok(Outcome::Refused(refusal.text)),
        }
    }
}

/// Runs the container's own process to its end; returns the exit status.
fn run(task: &Task, bundle: &Path, streams: &Streams) -> TestResult<Answer<u32>> {
    if let Err(refusal) = task.create_from(bundle, streams, |_| {})? {
        return Ok(Err(refusal));
    }
    let status = start_and_wait(task, "")?;
    done(task.delete("")?)?;
    Ok(status)
}

/// Runs a further process in the container, whose own process does nothing; returns the exit
/// status.
fn exec(task: &Task, bundle: &Path, process: &Value, output: &Fifo) -> TestResult<Answer<u32>> {
    let refused = |refusal: Refusal| failure(format!("make the container: {}", refusal.text));
    task.create_from(bundle, &Streams::default(), |_| {})?
        .map_err(refused)?;
    task.start("")?.map_err(refused)?;
    let status = match task.exec_as(EXEC, process, &streams(process, output))? {
        Ok(()) => {
            let status = start_and_wait(task, EXEC)?;
            done(task.delete(EXEC)?)?;
            status
        }
        Err(refusal) => Err(refusal),
    };
    task.end()?;
    Ok(status)
}

fn start_and_wait(task: &Task, exec: &str) -> TestResult<Answer<u32>> {
    match task.start(exec)? {
        Ok(_) => task.wait(exec),
        Err(refusal) => Ok(Err(refusal)),
    }
}

/// The streams for a process's output. With a terminal there is no standard error; without one,
/// runc's shim wants both or neither.
fn streams(process: &Value, output: &Fifo) -> Streams {
    let terminal = process["terminal"] == true;
    Streams {
        stdout: output.path(),
        stderr: if terminal {
            String::new()
        } else {
            output.path()
        },
        terminal,
        ..Streams::default()
    }
}

/// The bundle of a container: a folder with its spec.
fn bundle(files: &Path, spec: &Value) -> TestResult<PathBuf> {
    let bundle = files.join("bundle");
    fs::create_dir(&bundle)?;
    fs::write(bundle.join("config.json"), serde_json::to_vec(spec)?)?;
    Ok(bundle)
}
