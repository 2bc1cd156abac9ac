//! A container of the pod, made as containerd makes it: by the task API of the pod's shim.
//!
//! `ctr` would do for it, too, but takes most of a second for each of its calls under emulation.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::Value;

use crate::task_api::{Refusal, SERVICES, TaskApi};
use crate::{TestResult, failure};

/// For each call, and for the probe to end.
const DEADLINE: Duration = Duration::from_secs(90);

/// What containerd calls a process of the runtime spec.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// The name of the one exec.
const EXEC: &str = "probe";

/// What a call was answered, or that it was refused and why.
type Answer<T> = Result<T, Refusal>;

/// The exit status of a process, and what it has printed.
type Ended = (u32, String);

/// A container that a shim has been told of, deleted with this.
pub struct Task {
    api: TaskApi,
    id: String,
    printed: Printed,
    output: PathBuf,
}

impl Task {
    /// Prepares it; `pod` is the bundle of the pod's first container.
    pub fn new(pod: &Path, id: &str, files: &Path) -> TestResult<Self> {
        // containerd 2 says which version of the API the shim speaks; 1.7 knows only the older one.
        let service = SERVICES[usize::from(pod.join("bootstrap.json").exists())];
        let output = files.join("output");
        Ok(Self {
            api: TaskApi::connect(pod, service)?,
            id: id.to_owned(),
            printed: Printed::read(&output)?,
            output,
        })
    }

    /// Runs the container's own process to its end.
    pub fn run(self, bundle: &Path, terminal: bool) -> TestResult<Answer<Ended>> {
        if let Err(refusal) = self.create(bundle, terminal, true)? {
            return Ok(Err(refusal));
        }
        let ended = self.start_and_wait("")?;
        self.delete("")?;
        Ok(ended.map(|status| (status, self.printed.finish())))
    }

    /// Runs a further process in the container, whose own process does nothing.
    pub fn exec(self, bundle: &Path, process: &Value) -> TestResult<Answer<Ended>> {
        let refused = |refusal: Refusal| failure(format!("make the container: {}", refusal.text));
        self.create(bundle, false, false)?.map_err(refused)?;
        self.start("")?.map_err(refused)?;
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: EXEC.into(),
            terminal: process["terminal"] == true,
            stdout: self.output(true),
            stderr: self.output(process["terminal"] != true),
            spec: Some(Any {
                type_url: PROCESS.into(),
                value: serde_json::to_vec(process)?,
                ..Any::default()
            })
            .into(),
            ..Default::default()
        };
        let ended = match self.call::<api::Empty>("Exec", &request)? {
            Ok(_) => {
                let ended = self.start_and_wait(EXEC)?;
                self.delete(EXEC)?;
                ended
            }
            Err(refused) => Err(refused),
        };
        let kill = api::KillRequest {
            id: self.id.clone(),
            signal: 9,
            all: true,
            ..Default::default()
        };
        let killed: Answer<api::Empty> = self.call("Kill", &kill)?;
        killed.map_err(|refusal| failure(format!("kill: {}", refusal.text)))?;
        self.wait("")?.map_err(|refusal| failure(refusal.text))?;
        self.delete("")?;
        Ok(ended.map(|status| (status, self.printed.finish())))
    }

    fn create(&self, bundle: &Path, terminal: bool, prints: bool) -> TestResult<Answer<()>> {
        let request = api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.display().to_string(),
            terminal,
            stdout: self.output(prints),
            // With a terminal there is none; without one, runc's shim wants both or neither.
            stderr: self.output(prints && !terminal),
            ..Default::default()
        };
        let answer: Answer<api::CreateTaskResponse> = self.call("Create", &request)?;
        Ok(answer.map(drop))
    }

    fn output(&self, wanted: bool) -> String {
        let path = self.output.display().to_string();
        if wanted { path } else { String::new() }
    }

    fn start(&self, exec: &str) -> TestResult<Answer<()>> {
        let request = api::StartRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let answer: Answer<api::StartResponse> = self.call("Start", &request)?;
        Ok(answer.map(drop))
    }

    fn start_and_wait(&self, exec: &str) -> TestResult<Answer<u32>> {
        match self.start(exec)? {
            Ok(()) => self.wait(exec),
            Err(refused) => Ok(Err(refused)),
        }
    }

    /// The exit status.
    fn wait(&self, exec: &str) -> TestResult<Answer<u32>> {
        let request = api::WaitRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let answer: Answer<api::WaitResponse> = self.call("Wait", &request)?;
        Ok(answer.map(|ended| ended.exit_status))
    }

    fn delete(&self, exec: &str) -> TestResult {
        let request = api::DeleteRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let answer: Answer<api::DeleteResponse> = self.call("Delete", &request)?;
        answer
            .map(drop)
            .map_err(|refusal| failure(format!("delete: {}", refusal.text)))
    }

    fn call<T: Message>(&self, method: &str, request: &impl Message) -> TestResult<Answer<T>> {
        Ok(self.api.call(method, request, DEADLINE)?.0)
    }
}

/// A FIFO that is read as long as it is needed.
struct Printed {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Vec<u8>>,
}

impl Printed {
    fn read(path: &Path) -> TestResult<Self> {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )?;
        // Open for writing as well, so that no end is seen before the last writer has come.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let shared = Arc::clone(&stop);
        let reader = thread::spawn(move || collect(file, &shared));
        Ok(Self { stop, reader })
    }

    fn finish(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        String::from_utf8_lossy(&self.reader.join().unwrap_or_default()).into_owned()
    }
}

fn collect(mut file: File, stop: &AtomicBool) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        let last = stop.load(Ordering::Relaxed);
        match file.read(&mut buffer) {
            Ok(count) => all.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock && !last => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(_) => return all,
        }
    }
}

/// The bundle of a container: a folder with its spec.
pub fn bundle(files: &Path, spec: &Value) -> TestResult<PathBuf> {
    let bundle = files.join("bundle");
    fs::create_dir(&bundle)?;
    fs::write(bundle.join("config.json"), serde_json::to_vec(spec)?)?;
    Ok(bundle)
}
