//! The oracle is runc: one OCI spec under both runtimes, and what a probe in the container sees.
//!
//! `tests/oci.rs` runs the catalogue once and looks at it from several sides. A case is a change of
//! containerd's default spec; `run` makes the container twice, through the same containerd, and compares
//! the two reports. Most cases are containers of one pod, as CRI makes them, so that the machine boots once
//! for all; the others have a machine each.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde_json::{Value, json};

use crate::ctr::Call;
use crate::host::Host;
use crate::pty::OnTerminal;
use crate::{TestResult, failure};

pub mod catalogue;
pub mod compare;
pub mod reasons;

/// The oracle and the runtime under test, as containerd names them.
pub const RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.kata-like.v2"];

/// The environment variable that names the probe's file; `run-tests` sets it.
pub const PROBE: &str = "KATA_LIKE_PROBE";

/// The environment variable that names a file for the table; the whole reports go beside it.
pub const REPORT: &str = "KATA_LIKE_ORACLE_REPORT";

/// The environment variable that names the cases to run, by a part of their names; all without it.
pub const ONLY: &str = "KATA_LIKE_ORACLE_ONLY";

/// A root without it is none that the probe touches.
const MARK: &str = ".root-of-a-probe";

/// For a command on a terminal.
const DEADLINE: Duration = Duration::from_secs(60);

/// How often a case is tried where the emulator has broken the pod's machine.
const TRIES: u32 = 3;

/// In what kind of container a case runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of many in the pod.
    InPod,
    /// By itself.
    Alone,
    /// One of the pod, on a terminal of 91 by 33.
    OnTerminal,
    /// A further process in a container of the pod; the case changes `Spec::exec`.
    Exec,
}

/// One spec.
pub struct Case {
    /// What it is about.
    pub name: &'static str,
    /// Where it runs.
    pub kind: Kind,
    /// Changes the spec and the files around it.
    pub change: fn(&mut Spec),
}

/// A container to be.
pub struct Spec {
    /// containerd's default spec.
    pub json: Value,
    /// The options of `ctr task exec`, for a case of that kind.
    pub exec: Vec<&'static str>,
    /// The container's root on the host; the case may plant things in it.
    pub root: PathBuf,
    /// A folder on the host for its volumes: `file`, `below/file`, and `below` is a mount.
    pub volume: PathBuf,
}

/// What came of a container.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The probe's report.
    Report(Value),
    /// It could not be made: the last line of the error.
    Refused(String),
}

/// A case under both runtimes.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The case's name.
    pub name: &'static str,
    /// Under runc.
    pub runc: Outcome,
    /// Under kata-like.
    pub ours: Outcome,
    /// How long each took.
    pub took: [Duration; 2],
}

/// What all cases share: the host, the files, and a pod for each runtime.
pub struct Oracle<'host> {
    host: &'host Host,
    directory: tempfile::TempDir,
    probe: PathBuf,
    default: Value,
    pods: [Mutex<Option<SharedPod>>; 2],
}

#[derive(Clone)]
struct SharedPod {
    id: String,
    pid: i32,
}

impl<'host> Oracle<'host> {
    /// Prepares the files; no container is made yet.
    pub fn new(host: &'host Host) -> TestResult<Self> {
        let directory = tempfile::tempdir()?;
        // Of its own, so that nothing of the host's options and propagation is in what containers see.
        rustix::mount::mount(
            "oracle",
            directory.path(),
            "tmpfs",
            MountFlags::empty(),
            Some(c"mode=755"),
        )?;
        rustix::mount::mount_change(directory.path(), MountPropagationFlags::PRIVATE)?;
        let built = std::env::var_os(PROBE)
            .ok_or_else(|| failure(format!("{PROBE} is not set: run-tests builds the probe")))?;
        let probe = directory.path().join("probe");
        fs::copy(&built, &probe)?;
        fs::set_permissions(&probe, fs::Permissions::from_mode(0o755))?;
        let printed = host.ctr(["oci", "spec"]).ok()?;
        Ok(Self {
            host,
            directory,
            probe,
            default: complete(serde_json::from_slice(&printed.stdout)?),
            pods: [Mutex::new(None), Mutex::new(None)],
        })
    }

    /// Runs all cases, two containers at a time; the pairs are in the cases' order.
    pub fn run(&self, cases: &[&Case]) -> TestResult<Vec<Pair>> {
        let jobs: Vec<(usize, usize)> = (0..cases.len())
            .flat_map(|case| (0..RUNTIMES.len()).map(move |runtime| (case, runtime)))
            .collect();
        let next = Mutex::new(jobs.into_iter());
        let done = Mutex::new(vec![[None, None]; cases.len()]);
        let work = || -> TestResult {
            loop {
                let job = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((case, runtime)) = job else {
                    return Ok(());
                };
                let started = Instant::now();
                let outcome = self.outcome(cases[case], runtime)?;
                done.lock().unwrap_or_else(PoisonError::into_inner)[case][runtime] =
                    Some((outcome, started.elapsed()));
            }
        };
        std::thread::scope(|scope| {
            let workers = [scope.spawn(work), scope.spawn(work)];
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().map_err(|_| failure("a worker panicked"))?)
        })?;
        let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        let pairs = cases.iter().zip(done).map(|(case, outcomes)| {
            let [Some((runc, first)), Some((ours, second))] = outcomes else {
                return Err(failure(format!("{} was not run", case.name)));
            };
            Ok(Pair {
                name: case.name,
                runc,
                ours,
                took: [first, second],
            })
        });
        pairs.collect()
    }

    fn outcome(&self, case: &Case, runtime: usize) -> TestResult<Outcome> {
        let mut tries = 0;
        loop {
            tries += 1;
            let outcome = self.container(case, runtime).map_err(|error| {
                failure(format!("{} ({}): {error}", case.name, RUNTIMES[runtime]))
            })?;
            // A container can't be refused and its pod be gone by that.
            let broken = matches!(outcome, Outcome::Refused(_)) && !self.pod_lives(runtime)?;
            if !broken || tries == TRIES {
                return Ok(outcome);
            }
            println!("{}: the pod has gone; again with another", case.name);
            self.remove_pod(runtime);
        }
    }

    fn container(&self, case: &Case, runtime: usize) -> TestResult<Outcome> {
        let id = self.host.name("oracle");
        let files = self.directory.path().join(&id);
        let mut spec = self.spec(&id, &files)?;
        (case.change)(&mut spec);
        if case.kind != Kind::Alone {
            let pod = self.pod(runtime)?;
            annotate(&mut spec.json, "container", &pod.id);
            share(
                &mut spec.json,
                "network",
                &format!("/proc/{}/ns/net", pod.pid),
            );
            // A case may name the pod's process where it wants another namespace of it.
            for namespace in spec.json["linux"]["namespaces"]
                .as_array_mut()
                .into_iter()
                .flatten()
            {
                if let Some(path) = namespace["path"].as_str() {
                    namespace["path"] = path
                        .replace("/proc/POD/", &format!("/proc/{}/", pod.pid))
                        .into();
                }
            }
        }
        let below = spec.volume.join("below");
        rustix::mount::mount("below", &below, "tmpfs", MountFlags::empty(), None)?;
        fs::write(below.join("file"), "below\n")?;
        let outcome = match case.kind {
            Kind::Exec => self.exec(&id, &files, spec, runtime),
            kind => self.command(&id, &files, &spec, runtime, kind),
        };
        rustix::mount::unmount(&below, UnmountFlags::DETACH)?;
        fs::remove_dir_all(&files)?;
        outcome
    }

    /// `ctr run` in the foreground.
    fn command(
        &self,
        id: &str,
        files: &Path,
        spec: &Spec,
        runtime: usize,
        kind: Kind,
    ) -> TestResult<Outcome> {
        let config = write(files, &spec.json)?;
        let arguments = [
            "run",
            "--rm",
            "--runtime",
            RUNTIMES[runtime],
            "--config",
            &config,
            id,
        ];
        if kind == Kind::OnTerminal {
            let mut command = self.host.ctr_command();
            // ctr must know of it, too, and takes no option after the name.
            command.args(["run", "--tty"]).args(&arguments[1..]);
            let terminal = OnTerminal::start(command, 91, 33)?;
            let (status, screen) = terminal.end(DEADLINE)?;
            return outcome(status, &screen, "");
        }
        let output = self.host.ctr(arguments).output()?;
        outcome(output.status, &output.text(), &output.error_text())
    }

    /// A container that waits, and the probe as a further process in it.
    fn exec(&self, id: &str, files: &Path, mut spec: Spec, runtime: usize) -> TestResult<Outcome> {
        spec.json["process"]["args"] = json!(["/probe", "pause"]);
        let config = write(files, &spec.json)?;
        self.host
            .ctr([
                "run",
                "-d",
                "--runtime",
                RUNTIMES[runtime],
                "--config",
                &config,
                id,
            ])
            .ok()?;
        let mut arguments = vec!["task", "exec", "--exec-id", "probe"];
        arguments.extend(&spec.exec);
        arguments.extend([id, "/probe", "report"]);
        let output = self.host.ctr(arguments).output();
        self.remove(id);
        let output = output?;
        outcome(output.status, &output.text(), &output.error_text())
    }

    fn remove(&self, id: &str) {
        for arguments in [
            ["task", "rm", "--force", id].as_slice(),
            &["container", "rm", id],
        ] {
            let call: Call = self.host.ctr(arguments);
            let _ = call.output();
        }
    }

    /// The files of a container, and the default spec.
    fn spec(&self, id: &str, files: &Path) -> TestResult<Spec> {
        let (root, volume) = (files.join("rootfs"), files.join("volume"));
        for name in [
            "bin", "dev", "etc", "home", "proc", "run", "srv", "sys", "var",
        ] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::create_dir(root.join("tmp"))?;
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        for (name, text) in [
            (
                "etc/passwd",
                "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n",
            ),
            ("etc/group", "root:x:0:\nextra:x:900:app\napp:x:1000:\n"),
            ("etc/hosts", "127.0.0.1 localhost\n"),
            ("etc/secret", "of the image\n"),
            (MARK, ""),
        ] {
            fs::write(root.join(name), text)?;
        }
        fs::hard_link(&self.probe, root.join("probe"))?;
        fs::create_dir_all(volume.join("below"))?;
        fs::write(volume.join("file"), "of the volume\n")?;
        let mut json = self.default.clone();
        json["root"] = json!({"path": root});
        json["process"]["args"] = json!(["/probe", "report"]);
        json["linux"]["cgroupsPath"] = json!(format!("/oracle/{id}"));
        Ok(Spec {
            json,
            exec: Vec::new(),
            root,
            volume,
        })
    }

    /// The pod of a runtime, made when it is first asked for.
    fn pod(&self, runtime: usize) -> TestResult<SharedPod> {
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
        annotate(&mut spec.json, "sandbox", &id);
        let config = write(&files, &spec.json)?;
        self.host
            .ctr([
                "run",
                "-d",
                "--runtime",
                RUNTIMES[runtime],
                "--config",
                &config,
                &id,
            ])
            .ok()?;
        let (_, pid) = self
            .task(&id)?
            .ok_or_else(|| failure("the pod's task is not listed"))?;
        Ok(pod.insert(SharedPod { id, pid }).clone())
    }

    fn pod_lives(&self, runtime: usize) -> TestResult<bool> {
        let pod = self.pods[runtime]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match pod {
            None => Ok(true),
            Some(pod) => Ok(self
                .task(&pod.id)?
                .is_some_and(|(status, _)| status == "RUNNING")),
        }
    }

    fn remove_pod(&self, runtime: usize) {
        let pod = self.pods[runtime]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(pod) = pod {
            self.remove(&pod.id);
        }
    }

    fn task(&self, id: &str) -> TestResult<Option<(String, i32)>> {
        let list = self.host.ctr(["task", "ls"]).ok()?.text();
        let line = list
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|words| words[0] == id);
        match line.as_deref() {
            Some([_, pid, status]) => Ok(Some(((*status).to_owned(), pid.parse()?))),
            _ => Ok(None),
        }
    }
}

impl Drop for Oracle<'_> {
    fn drop(&mut self) {
        for runtime in 0..RUNTIMES.len() {
            self.remove_pod(runtime);
        }
        let _ = rustix::mount::unmount(self.directory.path(), UnmountFlags::DETACH);
    }
}

/// containerd's default spec, and what it leaves to whoever is above the container. One case is about that.
fn complete(mut spec: Value) -> Value {
    spec["hostname"] = json!("oracle");
    spec["process"]["oomScoreAdj"] = json!(0);
    spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024},
        {"type": "RLIMIT_NPROC", "soft": 4096, "hard": 4096},
        {"type": "RLIMIT_SIGPENDING", "soft": 4096, "hard": 4096},
    ]);
    if let Some(list) = spec["linux"]["namespaces"].as_array_mut() {
        list.retain(|namespace| namespace["type"] != "cgroup");
        list.push(json!({"type": "cgroup"}));
    }
    spec
}

fn write(files: &Path, spec: &Value) -> TestResult<String> {
    let path = files.join("config.json");
    fs::write(&path, serde_json::to_vec(spec)?)?;
    Ok(path.display().to_string())
}

/// As containerd's CRI plugin marks a pod's containers.
fn annotate(spec: &mut Value, kind: &str, pod: &str) {
    if spec["annotations"].is_null() {
        spec["annotations"] = json!({});
    }
    spec["annotations"]["io.kubernetes.cri.container-type"] = kind.into();
    spec["annotations"]["io.kubernetes.cri.sandbox-id"] = pod.into();
}

/// Gives the namespace of this kind a path.
pub fn share(spec: &mut Value, kind: &str, path: &str) {
    for namespace in spec["linux"]["namespaces"]
        .as_array_mut()
        .into_iter()
        .flatten()
    {
        if namespace["type"] == kind && namespace["path"].is_null() {
            namespace["path"] = path.into();
        }
    }
}

fn outcome(status: i32, printed: &str, errors: &str) -> TestResult<Outcome> {
    let report = printed.lines().find(|line| line.starts_with('{'));
    match report.map(serde_json::from_str) {
        Some(Ok(report)) => Ok(Outcome::Report(report)),
        Some(Err(error)) => Err(failure(format!(
            "the report can't be read: {error}: {printed:?}"
        ))),
        None => {
            let both = format!("{printed}\n{errors}");
            let last = both.trim().lines().last().unwrap_or_default().to_owned();
            Ok(Outcome::Refused(format!("exit code {status}: {last}")))
        }
    }
}
