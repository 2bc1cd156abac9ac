//! CRI-O's `runtime_type = "vm"`: the calls of 1.36, in its order, as its source has them
//! (`server/sandbox_run_linux.go`, `internal/oci/runtime_vm.go`, `internal/config/nsmgr`).
//!
//! It pins a pod's namespaces before the pod and names their paths in each container's spec. There
//! is no containerd to send events to, and the answer of `start` is a plain address. A container's
//! exit is a Wait that returns; whether it was out of memory, a file says. After a restart it finds
//! the shim by the file `address`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use kata_like_tests::fifo::{Fifo, Reader};
use kata_like_tests::host::Host;
use kata_like_tests::namespace::Namespace;
use kata_like_tests::process::until;
use kata_like_tests::rootfs::join_namespace;
use kata_like_tests::task::{KILL, Streams, Task};
use kata_like_tests::task_api::{SERVICES, TaskApi, done, refused};
use kata_like_tests::{Call, Parts, TestResult, failure, kata_like_only};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use serde_json::{Value, json};

use crate::{Caller, PATIENCE};

const TERM: u32 = 15;

const FLAGS: [&str; 6] = [
    "-namespace",
    "default",
    "-address",
    "",
    "-publish-binary",
    "/usr/bin/crio",
];

/// What CRI-O makes for a pod before the pod: pinned namespaces, the pod's `/dev/shm`, and a
/// network as by CNI.
struct Pinned {
    place: PathBuf,
    network: Namespace,
}

impl Pinned {
    fn new(host: &Host, stem: &str) -> TestResult<Self> {
        let place = PathBuf::from(format!("/run/{}", host.name(stem)));
        let network = Namespace::new(host, stem)?;
        let pinned = Self { place, network };
        for folder in ["ipcns", "utsns", "shm"] {
            fs::create_dir_all(pinned.place.join(folder))?;
        }
        let (ipc, uts) = (pinned.path("ipcns"), pinned.path("utsns"));
        let mut pinns = Command::new("unshare");
        for (option, path) in [("--ipc", &ipc), ("--uts", &uts)] {
            fs::write(path, "")?;
            pinns.arg(format!("{option}={}", path.display()));
        }
        pinns.arg("true");
        Call::new(pinns).ok()?;
        let shm = pinned.place.join("shm");
        let flags = MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV;
        mount("shm", &shm, "tmpfs", flags, Some(c"mode=1777,size=1m"))?;
        Ok(pinned)
    }

    /// Where a namespace is: all kinds have the same name in different folders.
    fn path(&self, folder: &str) -> PathBuf {
        self.place.join(folder).join("5d3c6a84")
    }

    /// An interface of the pod's, as a plugin makes it.
    fn plug_in(&self) -> TestResult {
        for step in [
            "link add eth0 type veth peer name far0",
            "address add 10.85.0.2/16 dev eth0",
            "link set eth0 up",
            "link set far0 up",
        ] {
            self.network.ip(step)?;
        }
        Ok(())
    }

    /// Puts the paths into a spec, and the pod's `/dev/shm`.
    fn enter(&self, spec: &mut Value) {
        for (kind, path) in [
            ("ipc", self.path("ipcns")),
            ("uts", self.path("utsns")),
            ("network", self.network.path()),
        ] {
            join_namespace(spec, kind, &path.display().to_string());
        }
        let mounts = spec["mounts"].as_array_mut().into_iter().flatten();
        for mount in mounts.filter(|mount| mount["destination"] == "/dev/shm") {
            let source = self.place.join("shm");
            *mount = json!({"destination": "/dev/shm", "type": "bind", "source": source,
                "options": ["rw", "bind"]});
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for path in [
            self.path("ipcns"),
            self.path("utsns"),
            self.place.join("shm"),
        ] {
            let _ = unmount(&path, UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir_all(&self.place);
    }
}

/// A container, with the ends of its streams that CRI-O holds.
struct Container {
    task: Task,
    stdout: Reader,
    /// What the shim logs.
    _log: Reader,
}

/// The node: one pod's worth of CRI-O.
struct CriO<'host> {
    caller: Caller<'host>,
    sandbox: String,
    pinned: Pinned,
}

impl CriO<'_> {
    fn spec(&self, kind: &str, command: &[&str]) -> TestResult<Value> {
        let mut spec = self.caller.rootfs.spec(command)?;
        spec["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.SandboxID": self.sandbox,
        });
        spec["hostname"] = "the-pod".into();
        if kind == "sandbox" {
            spec["root"]["readonly"] = true.into();
            spec["linux"]["sysctl"] =
                json!({"kernel.shm_rmid_forced": "1", "net.ipv4.ping_group_range": "0 5"});
        }
        self.pinned.enter(&mut spec);
        Ok(spec)
    }

    /// CreateContainer: the shim's log and the FIFOs first, then `start` and Create.
    fn create(&self, stem: &str, spec: &Value) -> TestResult<(Container, String)> {
        let bundle = self.caller.files.join(self.caller.host.name(stem));
        let id = bundle.file_name().and_then(|name| name.to_str());
        let id = id.ok_or_else(|| failure("no id"))?.to_owned();
        fs::create_dir_all(&bundle)?;
        let log = Fifo::new(&bundle, "log")?.reader()?;
        let (task, address) = self.caller.start_as(&id, spec)?;
        let fifos = ["stdout", "stderr"].map(|name| Fifo::new(&bundle, name));
        let [stdout, stderr] = fifos;
        let (stdout, stderr) = (stdout?, stderr?);
        let container = Container {
            task,
            stdout: stdout.reader()?,
            _log: log,
        };
        let streams = Streams {
            stdout: stdout.path(),
            stderr: stderr.path(),
            ..Streams::default()
        };
        let _held = stderr.reader()?;
        done(container.task.create(spec, &streams)?)?;
        Ok((container, address))
    }

    /// CreateContainer and StartContainer, with the look at its state after each.
    fn run(&self, stem: &str, spec: &Value) -> TestResult<(Container, String)> {
        let (container, address) = self.create(stem, spec)?;
        assert_eq!(container.task.status("")?, api::Status::CREATED);
        done(container.task.start("")?)?;
        assert_eq!(container.task.status("")?, api::Status::RUNNING);
        Ok((container, address))
    }

    /// Whether the file is there that says that memory ran out.
    fn was_out_of_memory(&self, task: &Task) -> bool {
        self.caller.files.join(task.id()).join("oom").exists()
    }

    /// StopContainer, with a Wait that was begun before: the exit status.
    fn stop(&self, task: &Task, signal: u32) -> TestResult<u32> {
        let status = thread::scope(|scope| {
            let waiting = scope.spawn(|| task.wait(""));
            done(task.kill("", signal, false)?)?;
            waiting.join().map_err(|_| failure("a thread panicked"))?
        })?;
        assert_eq!(task.status("")?, api::Status::STOPPED);
        done(status)
    }

    /// DeleteContainer: Delete, then Shutdown after each container.
    fn delete(&self, task: &Task) -> TestResult {
        done(task.delete("")?)?;
        self.caller.shut_down(task)
    }
}

#[test]
fn cri_o_runs_pods() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let caller = Caller::new(&host, &FLAGS)?;
    let node = CriO {
        caller,
        sandbox: host.name("sandbox"),
        pinned: Pinned::new(&host, "pinned")?,
    };
    node.pinned.plug_in()?;
    let before = host.footprint();
    let mut parts = Parts::new();
    parts.run("namespaces of the host", || of_the_host_is_refused(&node));

    let (sandbox, address) = node.run("sandbox", &node.spec("sandbox", &["/pause"])?)?;
    let script = "echo begun; trap 'exit 5' TERM; while :; do sleep 0.2; done";
    let (mut one, same) = node.run("one", &node.spec("container", &["sh", "-c", script])?)?;
    assert_eq!(same, address, "a container of the pod has its own shim");
    one.stdout.expect("begun\n", PATIENCE)?;
    let (two, _) = node.run("two", &node.spec("container", &["sleep", "1000"])?)?;
    parts.run("the pod's namespaces", || {
        are_the_pods(&one.task, &two.task)
    });
    parts.run("a namespace of another pod", || {
        another_pods_is_refused(&node)
    });
    parts.run("stats", || stats_are_read(&one.task));
    parts.run("exec", || {
        assert_eq!(one.task.output("echo of exec")?, "of exec");
        assert_eq!(one.task.run(&["sh", "-c", "exit 4"])?, 4);
        Ok(())
    });
    parts.run("out of memory, or killed", || {
        let mut spec = node.spec("container", &["tail", "/dev/zero"])?;
        spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20});
        let (hungry, _) = node.create("hungry", &spec)?;
        done(hungry.task.start("")?)?;
        assert_eq!(done(hungry.task.wait("")?)?, 137);
        assert_eq!(node.stop(&two.task, KILL)?, 137);
        let noted = [&hungry.task, &two.task].map(|task| node.was_out_of_memory(task));
        assert_eq!(noted, [true, false]);
        node.delete(&hungry.task)?;
        node.delete(&two.task)
    });

    let [sandbox, one] = restart(&node, [sandbox, one], &address)?;
    parts.run("alive or not", || {
        // It asks by signal 0.
        done(one.kill("", 0, false)?)?;
        assert_eq!(node.stop(&one, TERM)?, 5);
        let gone = refused(one.kill("", 0, false)?)?;
        assert!(gone.text.contains("finished"), "{gone:?}");
        node.delete(&one)?;
        assert_eq!(sandbox.status("")?, api::Status::RUNNING);
        Ok(())
    });
    parts.run("the end", || {
        node.stop(&sandbox, KILL)?;
        node.delete(&sandbox)?;
        host.leaves_nothing(&before)?;
        // Nothing is left to delete, but it must succeed all the same.
        node.caller.verb(sandbox.id(), "delete").ok().map(drop)
    });
    parts.end()
}

/// `hostIPC`: CRI-O then pins the host's own.
fn of_the_host_is_refused(node: &CriO) -> TestResult {
    let own = node.pinned.place.join("ipcns/own");
    fs::write(&own, "")?;
    mount_bind("/proc/self/ns/ipc", &own)?;
    let mut spec = node.spec("sandbox", &["/pause"])?;
    for namespace in spec["linux"]["namespaces"]
        .as_array_mut()
        .into_iter()
        .flatten()
    {
        if namespace["type"] == "ipc" {
            namespace["path"] = own.display().to_string().into();
        }
    }
    let (task, _) = node.caller.start("of-the-host", &spec)?;
    let refusal = refused(task.create(&spec, &Streams::default())?)?;
    unmount(&own, UnmountFlags::DETACH)?;
    fs::remove_file(&own)?;
    let wanted = format!("{} is not supported: it is the host's own", own.display());
    assert!(refusal.text.contains(&wanted), "{refusal:?}");
    node.caller.shut_down(&task)
}

fn are_the_pods(one: &Task, two: &Task) -> TestResult {
    let script = "for kind in ipc uts net pid; do readlink /proc/self/ns/$kind; done; hostname; \
        cat /proc/sys/kernel/shm_rmid_forced; cat /proc/sys/net/ipv4/ping_group_range; \
        ip -o -4 address show dev eth0 | grep -o 10.85.0.2/16";
    let (of_one, of_two) = (one.output(script)?, two.output(script)?);
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (of_one, of_two) = (lines(&of_one), lines(&of_two));
    assert_eq!(of_one[..3], of_two[..3]);
    assert_ne!(of_one[3], of_two[3], "they share processes");
    assert_eq!(of_one[4..], ["the-pod", "1", "0\t5", "10.85.0.2/16"]);
    assert_eq!(of_one[4..], of_two[4..]);
    one.output("echo shared >/dev/shm/file")?;
    assert_eq!(two.output("cat /dev/shm/file")?, "shared");
    Ok(())
}

fn another_pods_is_refused(node: &CriO) -> TestResult {
    let other = Pinned::new(node.caller.host, "other")?;
    let mut spec = node.spec("container", &["true"])?;
    for namespace in spec["linux"]["namespaces"]
        .as_array_mut()
        .into_iter()
        .flatten()
    {
        if namespace["type"] == "uts" {
            namespace["path"] = other.path("utsns").display().to_string().into();
        }
    }
    let (task, _) = node.caller.start("misled", &spec)?;
    let refusal = refused(task.create(&spec, &Streams::default())?)?;
    let path = other.path("utsns").display().to_string();
    assert!(refusal.text.contains(&path), "{refusal:?}");
    assert!(
        refusal.text.contains("not that of a container of this pod"),
        "{refusal:?}"
    );
    Ok(())
}

fn stats_are_read(task: &Task) -> TestResult {
    let mut packed = task.stats()?;
    // A guest that is late the first time has its last figures told later.
    until("stats", PATIENCE, || {
        if packed.is_err()
            && let Ok(again) = task.stats()
        {
            packed = again;
        }
        packed.is_ok()
    })?;
    let packed = done(packed)?;
    assert_eq!(packed.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&packed.value)?;
    let (memory, cpu) = (metrics.memory.usage, metrics.cpu.usage_usec);
    assert!(
        memory > 0 && cpu > 0 && metrics.pids.current > 0,
        "{metrics:?}"
    );
    Ok(())
}

/// CRI-O goes, with its connections and its ends of the streams, and comes back: it looks into each
/// bundle for the address, asks for the state, and opens the streams that the state names. What was
/// said meanwhile is there.
fn restart(node: &CriO, containers: [Container; 2], address: &str) -> TestResult<[Task; 2]> {
    let meanwhile = "(sleep 1; echo said meanwhile >/proc/1/fd/1) >/dev/null 2>&1 &";
    assert_eq!(containers[1].task.run(&["sh", "-c", meanwhile])?, 0);
    let ids = containers.map(|container| {
        let id = container.task.id().to_owned();
        container.task.leave();
        id
    });
    thread::sleep(Duration::from_secs(2));
    let again = ids.map(|id| -> TestResult<Task> {
        let bundle = node.caller.files.join(&id);
        assert_eq!(fs::read_to_string(bundle.join("address"))?, address);
        let api = TaskApi::connect(&bundle, SERVICES[0])?;
        let task = Task::new(Arc::new(api), id, &node.caller.files);
        let state = done(task.state("")?)?;
        assert_eq!(state.status.enum_value_or_default(), api::Status::RUNNING);
        for (name, path) in [("stdout", state.stdout), ("stderr", state.stderr)] {
            assert_eq!(Path::new(&path), bundle.join(name));
        }
        Ok(task)
    });
    let [sandbox, one] = again;
    let (sandbox, one) = (sandbox?, one?);
    let mut stdout = Fifo::at(&node.caller.files.join(one.id()).join("stdout")).reader()?;
    one.output("echo said after it >/proc/1/fd/1")?;
    stdout.expect("said meanwhile\nsaid after it\n", PATIENCE)?;
    Ok([sandbox, one])
}
