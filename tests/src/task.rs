//! A task by the calls of the task API, each with what it is asked and answered.
//!
//! `shim_pod` and the oracle make such tasks; a task that `ctr` has made can be called, too.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::ProcessDetails;
use serde_json::{Value, json};

use crate::host::{Host, NAMESPACE};
use crate::process::until;
use crate::task_api::{Answer, TaskApi, done};
use crate::{TestResult, failure};

/// Of a single call; emulated hosts are slow, and a hang is what this is to find.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);
/// SIGKILL.
pub const KILL: u32 = 9;

const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A name that no other exec and no other file has.
fn name(stem: &str) -> String {
    format!("direct-{stem}-{}", COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Where a process's streams go: paths or URIs; an empty text is nowhere.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether there is a terminal; then there is no standard error.
    pub terminal: bool,
}

/// A container that the shim has been told of, or will be.
pub struct Task {
    api: Arc<TaskApi>,
    id: String,
    files: PathBuf,
    /// Nothing is left to do when the value goes: it was deleted, or it is somebody else's.
    settled: AtomicBool,
}

impl Task {
    /// A task to be, deleted with the value; its bundle and the output of execs are in `files`.
    pub fn new(api: Arc<TaskApi>, id: String, files: &Path) -> Self {
        Self {
            api,
            id,
            files: files.to_owned(),
            settled: AtomicBool::new(false),
        }
    }

    /// The task of a container that `ctr` has made; it outlives the value.
    pub fn of(host: &Host, id: &str) -> TestResult<Self> {
        Ok(Self {
            api: Arc::new(TaskApi::connect_as_containerd(&host.bundle(id))?),
            id: id.to_owned(),
            files: "/run".into(),
            settled: AtomicBool::new(true),
        })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Create.
    pub fn create(&self, spec: &Value, streams: &Streams) -> TestResult<Answer<u32>> {
        self.create_with(spec, streams, |_| {})
    }

    /// Create, with a change of the request.
    pub fn create_with(
        &self,
        spec: &Value,
        streams: &Streams,
        change: impl FnOnce(&mut api::CreateTaskRequest),
    ) -> TestResult<Answer<u32>> {
        let bundle = self.files.join(&self.id);
        fs::create_dir_all(&bundle)?;
        let mut spec = spec.clone();
        spec["process"]["terminal"] = streams.terminal.into();
        spec["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{}", self.id).into();
        fs::write(bundle.join("config.json"), spec.to_string())?;
        self.create_from(&bundle, streams, change)
    }

    /// Create, from a bundle that is there, with a change of the request.
    pub fn create_from(
        &self,
        bundle: &Path,
        streams: &Streams,
        change: impl FnOnce(&mut api::CreateTaskRequest),
    ) -> TestResult<Answer<u32>> {
        self.settled.store(false, Ordering::Relaxed);
        let streams = streams.clone();
        let mut request = api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.display().to_string(),
            terminal: streams.terminal,
            stdin: streams.stdin,
            stdout: streams.stdout,
            stderr: streams.stderr,
            ..Default::default()
        };
        change(&mut request);
        let answer: Answer<api::CreateTaskResponse> = self.call("Create", &request)?;
        Ok(answer.map(|answer| answer.pid))
    }

    /// Start, of the init (`exec` is empty) or an exec.
    pub fn start(&self, exec: &str) -> TestResult<Answer<u32>> {
        let request = api::StartRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let answer: Answer<api::StartResponse> = self.call("Start", &request)?;
        Ok(answer.map(|answer| answer.pid))
    }

    /// State.
    pub fn state(&self, exec: &str) -> TestResult<Answer<api::StateResponse>> {
        let request = api::StateRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.call("State", &request)
    }

    /// The state alone, of a process that is there.
    pub fn status(&self, exec: &str) -> TestResult<api::Status> {
        Ok(done(self.state(exec)?)?.status.enum_value_or_default())
    }

    /// Wait: the exit status.
    pub fn wait(&self, exec: &str) -> TestResult<Answer<u32>> {
        let answer: Answer<api::WaitResponse> = self.call("Wait", &self.waiting(exec))?;
        Ok(answer.map(|answer| answer.exit_status))
    }

    /// What `Wait` is asked with.
    pub fn waiting(&self, exec: &str) -> api::WaitRequest {
        api::WaitRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..Default::default()
        }
    }

    /// Kill.
    pub fn kill(&self, exec: &str, signal: u32, all: bool) -> TestResult<Answer<()>> {
        let request = api::KillRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.empty("Kill", &request)
    }

    /// Delete.
    pub fn delete(&self, exec: &str) -> TestResult<Answer<api::DeleteResponse>> {
        let request = api::DeleteRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let answer = self.call("Delete", &request)?;
        if exec.is_empty() && answer.is_ok() {
            self.settled.store(true, Ordering::Relaxed);
        }
        Ok(answer)
    }

    /// Exec: makes it known. What `process` does not say is root's.
    pub fn exec(&self, exec: &str, process: &Value, streams: &Streams) -> TestResult<Answer<()>> {
        let mut all = json!({"cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
        for (key, value) in process.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        self.exec_as(exec, &all, streams)
    }

    /// Exec of a process that says all.
    pub fn exec_as(
        &self,
        exec: &str,
        process: &Value,
        streams: &Streams,
    ) -> TestResult<Answer<()>> {
        let streams = streams.clone();
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            terminal: streams.terminal,
            stdin: streams.stdin,
            stdout: streams.stdout,
            stderr: streams.stderr,
            spec: MessageField::some(any(PROCESS, process)?),
            ..Default::default()
        };
        self.empty("Exec", &request)
    }

    /// Runs a further process, without streams, to its end; gives its exit status.
    pub fn run(&self, command: &[&str]) -> TestResult<u32> {
        self.run_with(command, &Streams::default())
    }

    /// The same with streams.
    pub fn run_with(&self, command: &[&str], streams: &Streams) -> TestResult<u32> {
        let exec = name("exec");
        done(self.exec(&exec, &json!({"args": command}), streams)?)?;
        done(self.start(&exec)?)?;
        let status = done(self.wait(&exec)?)?;
        done(self.delete(&exec)?)?;
        Ok(status)
    }

    /// What a shell script in the container writes to its standard output.
    pub fn output(&self, script: &str) -> TestResult<String> {
        let path = self.files.join(name("output"));
        fs::write(&path, "")?;
        let streams = Streams {
            stdout: path.display().to_string(),
            // runc's shim wants both or neither.
            stderr: path.display().to_string(),
            ..Streams::default()
        };
        self.run_with(&["sh", "-c", script], &streams)?;
        let text = fs::read_to_string(&path)?;
        fs::remove_file(path)?;
        Ok(text.trim_end().to_owned())
    }

    /// Waits until a script's output is this.
    pub fn shows(&self, script: &str, wanted: &str) -> TestResult {
        let mut last = String::new();
        until("what a script shows", DEADLINE, || {
            last = self
                .output(script)
                .unwrap_or_else(|error| error.to_string());
            last == wanted
        })
        .map_err(|error| failure(format!("{error}: {script:?}: {last:?}, not {wanted:?}")))
    }

    /// Pids: each with the exec that it is, or an empty text.
    pub fn pids(&self) -> TestResult<Answer<Vec<(u32, String)>>> {
        let request = api::PidsRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let answer: Answer<api::PidsResponse> = self.call("Pids", &request)?;
        let exec = |info: &Any| {
            let details = ProcessDetails::parse_from_bytes(&info.value);
            details.map(|details| details.exec_id).unwrap_or_default()
        };
        Ok(answer.map(|answer| {
            let processes = answer.processes.iter();
            processes
                .map(|process| {
                    (
                        process.pid,
                        process.info.as_ref().map(exec).unwrap_or_default(),
                    )
                })
                .collect()
        }))
    }

    /// Pause.
    pub fn pause(&self) -> TestResult<Answer<()>> {
        let request = api::PauseRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        self.empty("Pause", &request)
    }

    /// Resume.
    pub fn resume(&self) -> TestResult<Answer<()>> {
        let request = api::ResumeRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        self.empty("Resume", &request)
    }

    /// Update, by OCI `linux.resources`.
    pub fn update(&self, resources: &Value) -> TestResult<Answer<()>> {
        let request = api::UpdateTaskRequest {
            id: self.id.clone(),
            resources: MessageField::some(any(RESOURCES, resources)?),
            ..Default::default()
        };
        self.empty("Update", &request)
    }

    /// Stats, as they are packed.
    pub fn stats(&self) -> TestResult<Answer<Any>> {
        let request = api::StatsRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let answer: Answer<api::StatsResponse> = self.call("Stats", &request)?;
        Ok(answer.map(|answer| answer.stats.unwrap_or_default()))
    }

    /// CloseIO of stdin.
    pub fn close_stdin(&self, exec: &str) -> TestResult<Answer<()>> {
        let request = api::CloseIORequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            stdin: true,
            ..Default::default()
        };
        self.empty("CloseIO", &request)
    }

    /// ResizePty.
    pub fn resize(&self, exec: &str, width: u32, height: u32) -> TestResult<Answer<()>> {
        let request = api::ResizePtyRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            width,
            height,
            ..Default::default()
        };
        self.empty("ResizePty", &request)
    }

    /// Ends the connection and leaves the task as it is.
    pub fn leave(self) {
        self.settled.store(true, Ordering::Relaxed);
    }

    /// Kills it, waits for its end, deletes it.
    pub fn end(&self) -> TestResult {
        done(self.kill("", KILL, true)?)?;
        done(self.wait("")?)?;
        done(self.delete("")?).map(drop)
    }

    fn call<T: Message>(&self, method: &str, request: &impl Message) -> TestResult<Answer<T>> {
        Ok(self.api.call(method, request, DEADLINE)?.0)
    }

    fn empty(&self, method: &str, request: &impl Message) -> TestResult<Answer<()>> {
        let answer: Answer<api::Empty> = self.call(method, request)?;
        Ok(answer.map(drop))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.settled.load(Ordering::Relaxed) {
            return;
        }
        // Of one that is not there, each is refused at once.
        if matches!(self.kill("", KILL, true), Ok(Ok(()))) {
            let _ = self.wait("");
        }
        let _ = self.delete("");
    }
}

fn any(name: &str, value: &Value) -> TestResult<Any> {
    Ok(Any {
        type_url: name.into(),
        value: serde_json::to_vec(value)?,
        ..Any::default()
    })
}
