//! A pod of one container whose shim is called as containerd calls it, but without containerd: the
//! shortest way to a machine that can be killed.
//!
//! The root is an overlay, like that of containerd's snapshotter, whose upper directory the test
//! knows. So the files of the root and of the volume can be read on the host whatever becomes of
//! the pod.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::types::mount::Mount;
use kata_like_tests::host::NAMESPACE;
use kata_like_tests::process::Process;
use kata_like_tests::task::{Streams, Task};
use kata_like_tests::task_api::{SERVICES, TaskApi, done};
use kata_like_tests::{Call, Host, Patience, TestResult, failure};
use rustix::process::Signal;
use serde_json::{Value, json};

/// For everything that is waited for: emulated hosts are slow, and the test should find hangs.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Where the volume is in the container.
pub const DATA: &str = "/data";

/// Waits until something holds, and leaves the CPU to others meanwhile.
pub fn until(what: &str, mut holds: impl FnMut() -> TestResult<bool>) -> TestResult {
    let patience = Patience::new(PATIENCE);
    while !holds()? {
        if patience.is_over() {
            return Err(failure(format!("not within {PATIENCE:?}: {what}")));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A spec's mount for a volume or a file of the host.
pub fn bind(source: &Path, target: &str, mode: &str) -> Value {
    json!({"type": "bind", "source": source, "destination": target, "options": ["rbind", mode]})
}

/// What all machines of a test are made from.
pub struct Ground {
    spec: Value,
    files: PathBuf,
    lower: PathBuf,
}

impl Ground {
    /// The containers' root is this directory, in which they change nothing. A memory limit makes
    /// the machine smaller, which boots sooner.
    pub fn new(host: &Host, lower: &Path, memory: Option<u64>) -> TestResult<Self> {
        let files = PathBuf::from(format!("/run/{}", host.name("machines")));
        fs::create_dir(&files)?;
        let mut spec: Value = serde_json::from_str(&host.ctr(["oci", "spec"]).ok()?.text())?;
        spec["process"]["env"] = json!(["PATH=/bin:/usr/bin:/usr/sbin"]);
        spec["process"]["cwd"] = "/".into();
        spec["root"] = json!({"path": "rootfs"});
        if let Some(bytes) = memory {
            spec["linux"]["resources"]["memory"]["limit"] = bytes.into();
        }
        Ok(Self {
            spec,
            files,
            lower: lower.to_owned(),
        })
    }

    /// Starts a machine that runs a command. What it writes goes to `place`, whatever was there
    /// before.
    pub fn start(
        &self,
        id: &str,
        place: &Path,
        command: &[&str],
        mounts: &[Value],
    ) -> TestResult<Machine> {
        let bundle = self.files.join(id);
        let [upper, work, volume] = ["upper", "work", "volume"].map(|name| place.join(name));
        for directory in [&bundle.join("rootfs"), &upper, &work, &volume] {
            fs::create_dir_all(directory)?;
        }
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))?;
        let mut spec = self.spec.clone();
        spec["process"]["args"] = command.into();
        let all = spec["mounts"].as_array_mut();
        let all = all.ok_or_else(|| failure("a spec without mounts"))?;
        all.push(bind(&volume, DATA, "rw"));
        all.extend(mounts.iter().cloned());
        spec["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        fs::write(bundle.join("config.json"), spec.to_string())?;
        let output = bundle.join("output");
        let errors = bundle.join("errors");
        fs::write(&output, "")?;
        fs::write(&errors, "")?;
        let answer = verb(id, &bundle, "start").ok()?;
        if !answer.text().starts_with("unix:///") {
            return Err(failure(format!("start of {id}: {}", answer.both())));
        }
        let api = TaskApi::connect(&bundle, SERVICES[0])?;
        let task = Task::new(Arc::new(api), id.to_owned(), &self.files);
        let lower = self.lower.display();
        let root = Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("lowerdir={lower}"),
                format!("upperdir={}", upper.display()),
                format!("workdir={}", work.display()),
            ],
            ..Default::default()
        };
        let streams = Streams {
            stdout: output.display().to_string(),
            stderr: errors.display().to_string(),
            ..Streams::default()
        };
        done(task.create_with(&spec, &streams, |request| request.rootfs = vec![root])?)?;
        done(task.start("")?)?;
        Ok(Machine {
            bundle,
            task,
            output,
            errors,
            upper,
            volume,
        })
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.files);
    }
}

/// The shim's binary, without an address for events.
fn verb(id: &str, bundle: &Path, verb: &str) -> Call {
    let prefix = std::env::var("KATA_LIKE_PREFIX").unwrap_or_else(|_| "/run/installed".into());
    let mut command = Command::new(Path::new(&prefix).join("bin/containerd-shim-kata-like-v2"));
    command
        .args(["-namespace", NAMESPACE, "-address", ""])
        .args(["-publish-binary", "containerd", "-id", id])
        .env("TTRPC_ADDRESS", "")
        .current_dir(bundle);
    if verb == "delete" {
        command.arg("-bundle").arg(bundle);
    }
    command.arg(verb);
    Call::new(command).deadline(PATIENCE)
}

/// A pod that runs.
pub struct Machine {
    bundle: PathBuf,
    task: Task,
    output: PathBuf,
    errors: PathBuf,
    upper: PathBuf,
    volume: PathBuf,
}

impl Machine {
    /// The file on the host with the container's standard output.
    pub fn output(&self) -> &Path {
        &self.output
    }

    /// The text of its standard error.
    pub fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// A file of the container, by its path on the host.
    pub fn on_host(&self, path: &str) -> PathBuf {
        match path.strip_prefix(DATA) {
            Some(rest) => self.volume.join(rest.trim_start_matches('/')),
            None => self.upper.join(path.trim_start_matches('/')),
        }
    }

    /// One of the pod's processes, from its record.
    fn process(&self, role: &str) -> TestResult<Process> {
        let folder = format!("/run/kata-like/{NAMESPACE}:{}", self.task.id());
        let record: Value = serde_json::from_slice(&fs::read(format!("{folder}/shim.json"))?)?;
        let pid = record[role]["pid"].as_i64().unwrap_or_default();
        Process::find(i32::try_from(pid)?)
            .ok_or_else(|| failure(format!("no {role} in {record}, or it is gone")))
    }

    /// Kills one of the pod's processes, and removes the remains as containerd does.
    pub fn kill(&self, role: &str) -> TestResult {
        let shim = self.process("shim")?;
        let victim = self.process(role)?;
        let vmm = self.process("vmm")?;
        victim.signal(Signal::KILL)?;
        if role == "shim" {
            verb(self.task.id(), &self.bundle, "delete").ok()?;
        } else {
            let status = done(self.task.wait("")?)?;
            assert_eq!(status, 137, "{role} was killed");
            done(self.task.delete("")?)?;
            let api = TaskApi::connect(&self.bundle, SERVICES[0])?;
            let request = api::ShutdownRequest {
                id: self.task.id().into(),
                ..Default::default()
            };
            let _: api::Empty = done(api.call("Shutdown", &request, PATIENCE)?.0)?;
        }
        until("the pod's processes are gone", || {
            Ok(!shim.is_alive() && !vmm.is_alive())
        })
    }
}

impl Drop for Machine {
    /// If the pod is gone the shim's binary finds nothing.
    fn drop(&mut self) {
        if self
            .process("shim")
            .is_ok_and(|shim| shim.signal(Signal::KILL).is_ok())
        {
            let _ = verb(self.task.id(), &self.bundle, "delete").output();
        }
        let _ = fs::remove_dir_all(&self.bundle);
    }
}
