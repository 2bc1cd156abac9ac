//! The oracle is runc: one OCI spec under both runtimes, and what a probe in the container sees.
//!
//! `tests/oci.rs` runs the catalogue once and looks at it from several sides. A case changes
//! containerd's default spec. `run` makes the container twice, through the same containerd, and
//! compares the two reports. Most cases are containers of one pod, as CRI makes them, so the
//! machine boots once for all; the others have a machine each.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde_json::{Value, json};

use crate::annotations::{Role, annotate};
use crate::host::Host;
use crate::rootfs::join_namespace;
use crate::{TestResult, failure};
use pods::OraclePod;

pub mod catalogue;
pub mod compare;
mod in_pod;
mod pods;
pub mod reasons;

/// The oracle and the runtime under test, as containerd names them.
pub const RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.kata-like.v2"];

/// The environment variable that names the probe's file; `run-tests` sets it.
pub const PROBE: &str = "KATA_LIKE_PROBE";

/// The environment variable with a folder for the tables and for `oracle.log`.
pub const REPORT: &str = "KATA_LIKE_ORACLE_REPORTS";

/// The environment variable that selects cases by parts of their names; without it all run.
pub const ONLY: &str = "KATA_LIKE_ORACLE_ONLY";

/// The probe does nothing in a root without this file.
const MARK: &str = ".root-of-a-probe";

/// Where the host has its cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";

/// How every host mounts them.
const CGROUP_FLAGS: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// How often a case is tried if the emulator has broken the pod's machine.
const TRIES: u32 = 3;

/// The kind of container that a case runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of many in the pod.
    InPod,
    /// By itself.
    Alone,
    /// A further process in a container of the pod; `Spec::exec` has its differences.
    Exec,
}

/// One spec.
pub struct Case {
    /// What the case is about.
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
    /// What the further process of an `Exec` case has in place of the container's own.
    pub exec: Value,
    /// The container's root on the host; the case may put files into it.
    pub root: PathBuf,
    /// A folder on the host for its volumes: `file`, `below/file`, and `below` is a mount.
    pub volume: PathBuf,
}

/// The result of a container.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The probe's report.
    Report(Value),
    /// It could not be made; this is the error's last line.
    Refused(String),
    /// It ended instead of running its command; this is its output.
    Failed(String),
    /// The test itself failed. This equals nothing.
    Broken(String),
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
    cgroup_options: CString,
    pods: [Mutex<Option<OraclePod>>; 2],
}

impl<'host> Oracle<'host> {
    /// Prepares the files; no container is made yet.
    pub fn new(host: &'host Host) -> TestResult<Self> {
        let directory = tempfile::tempdir()?;
        // A mount of its own, without options that containers would see, and shared, as systemd
        // makes all mounts.
        rustix::mount::mount(
            "oracle",
            directory.path(),
            "tmpfs",
            MountFlags::empty(),
            Some(c"mode=755"),
        )?;
        rustix::mount::mount_change(directory.path(), MountPropagationFlags::SHARED)?;
        let built = std::env::var_os(PROBE)
            .ok_or_else(|| failure(format!("{PROBE} is not set: run-tests builds the probe")))?;
        let probe = directory.path().join("probe");
        fs::copy(&built, &probe)?;
        fs::set_permissions(&probe, fs::Permissions::from_mode(0o755))?;
        // New network namespaces start with the host's setting, which networks of other tests may
        // have changed.
        fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
        let printed = host.ctr(["oci", "spec"]).ok()?;
        Ok(Self {
            host,
            directory,
            probe,
            default: complete(serde_json::from_slice(&printed.stdout)?),
            cgroup_options: cgroup_options()?,
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
                tell(cases[case].name, runtime, &outcome);
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

    /// Runs a case only under kata-like.
    pub fn ours(&self, case: &Case) -> TestResult<Outcome> {
        self.outcome(case, 1)
    }

    fn outcome(&self, case: &Case, runtime: usize) -> TestResult<Outcome> {
        let mut tries = 0;
        loop {
            tries += 1;
            let outcome = self
                .container(case, runtime)
                .unwrap_or_else(|error| Outcome::Broken(error.to_string()));
            // A refused container does not end its pod.
            let broken = !matches!(outcome, Outcome::Report(_)) && !self.pod_lives(runtime);
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
            annotate(&mut spec.json, Role::Container, &pod.id);
            join_namespace(
                &mut spec.json,
                "network",
                &format!("/proc/{}/ns/net", pod.pid),
            );
            // A case may name the pod's process if it needs another namespace of it.
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
            Kind::Alone => self.alone(&id, &files, &spec, runtime),
            kind => self.in_pod(&id, &files, spec, runtime, kind),
        };
        rustix::mount::unmount(&below, UnmountFlags::DETACH)?;
        fs::remove_dir_all(&files)?;
        // Where a container has no cgroup namespace, runc's mount of the cgroups clears the options
        // of the host's.
        rustix::mount::mount_remount(CGROUPS, CGROUP_FLAGS, &*self.cgroup_options)?;
        outcome
    }

    /// `ctr run` in the foreground.
    fn alone(&self, id: &str, files: &Path, spec: &Spec, runtime: usize) -> TestResult<Outcome> {
        let config = write(files, &spec.json)?;
        let runtime = RUNTIMES[runtime];
        let arguments = ["run", "--rm", "--runtime", runtime, "--config", &config, id];
        let output = self.host.ctr(arguments).output()?;
        if output.status != 0 && output.stdout.is_empty() {
            return Ok(Outcome::Refused(output.error_text()));
        }
        ended(output.status.try_into().unwrap_or(255), &output.text())
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
            exec: json!({}),
            root,
            volume,
        })
    }
}

/// The options of the host's cgroups that belong to the hierarchy and not to a mount.
fn cgroup_options() -> TestResult<CString> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let options = table
        .lines()
        .filter_map(|line| line.split_once(" - cgroup2 "))
        .filter(|(mount, _)| mount.split(' ').nth(4) == Some(CGROUPS))
        .find_map(|(_, own)| own.split_once(" rw"));
    let (_, options) = options.ok_or_else(|| failure(format!("no cgroup v2 on {CGROUPS}")))?;
    Ok(CString::new(options.trim_start_matches(','))?)
}

/// Adds an outcome to `oracle.log`, one line each, for people who wait for the table or look into a
/// difference.
fn tell(case: &str, runtime: usize, outcome: &Outcome) {
    let outcome = match outcome {
        Outcome::Report(report) => report.clone(),
        other => format!("{other:?}").into(),
    };
    let line = json!({"case": case, "runtime": RUNTIMES[runtime], "outcome": outcome});
    let log = std::env::var_os(REPORT).map(|folder| Path::new(&folder).join("oracle.log"));
    let mut options = fs::OpenOptions::new();
    if let Some(Ok(mut log)) = log.map(|log| options.append(true).create(true).open(log)) {
        let _ = log.write_all(format!("{line}\n").as_bytes());
    }
}

/// Prints the table, and keeps it as `NAME.txt`.
pub fn keep(pairs: &[Pair], name: &str) -> TestResult {
    let table = compare::table(pairs);
    // Written directly, so that it shows for passing tests, too: libtest keeps what the macros
    // print.
    std::io::stdout().write_all(table.as_bytes())?;
    if let Some(folder) = std::env::var_os(REPORT).map(PathBuf::from) {
        fs::write(folder.join(format!("{name}.txt")), &table)?;
    }
    Ok(())
}

impl Drop for Oracle<'_> {
    fn drop(&mut self) {
        for runtime in 0..RUNTIMES.len() {
            self.remove_pod(runtime);
        }
        let _ = rustix::mount::unmount(self.directory.path(), UnmountFlags::DETACH);
    }
}

/// containerd's default spec, and what it leaves to the layer above the container. One case is
/// about that.
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

/// The result of a container that has ended. After a failed start runc leaves the exit status 1,
/// and the reason on the container's stderr; the probe ends otherwise.
fn ended(status: u32, printed: &str) -> TestResult<Outcome> {
    let line = printed.lines().find(|line| line.starts_with('{'));
    let line = match line {
        Some(line) => line,
        None if status == 1 && !printed.trim().is_empty() => {
            return Ok(Outcome::Failed(printed.trim().to_owned()));
        }
        None => {
            let text = format!("no report in {printed:?}, exit status {status}");
            return Err(failure(text));
        }
    };
    let report = serde_json::from_str(line)
        .map_err(|error| failure(format!("the report can't be read: {error}: {line:?}")))?;
    Ok(Outcome::Report(report))
}
