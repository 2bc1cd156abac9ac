//! A task in its odd states: paused, with other limits, with a log of its own, its exec failed, its clock stepped.
//!
//! What callers rely on is what runc's shim answers, so these tests also run against it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::process::until;
use kata_like_tests::task_api::{Refusal, SERVICES, TaskApi};
use kata_like_tests::{Call, Host, Pod, TestResult, failure, is_oracle, kata_like_only};
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(30);

/// The version of the API that the host's containerd speaks with the shim under test.
fn api_of(host: &Host, pod: &Pod) -> TestResult<TaskApi> {
    TaskApi::connect(&host.bundle(pod.id()), SERVICES[usize::from(is_oracle())])
}

fn done<T>(answer: Result<T, Refusal>) -> TestResult<T> {
    answer.map_err(|refusal| failure(format!("refused: {refusal:?}")))
}

fn refused<T>(answer: Result<T, Refusal>) -> TestResult<Refusal> {
    let refusal = answer.err();
    refusal.ok_or_else(|| failure("it was done, and should have been refused"))
}

/// Nothing runs in a paused container, nothing new is let in, and it can be killed.
#[test]
fn a_paused_container_stands_still() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let log = PathBuf::from(format!("/run/{}", host.name("log")));
    let uri = format!("file://{}", log.display());
    let script = "while :; do echo tick; sleep 0.1; done";
    let pod = host.start("paused", &["--log-uri", &uri], &["sh", "-c", script])?;
    let ticks = || fs::metadata(&log).map_or(0, |about| about.len());
    let moves = |what: &str| -> TestResult {
        let before = ticks();
        until(what, 10 * SECOND, || ticks() > before)
    };
    moves("the first ticks")?;
    host.ctr(["task", "pause", pod.id()]).ok()?;
    pod.wait_status("PAUSED", 5 * SECOND)?;
    thread::sleep(SECOND / 2); // what was under way
    let before = ticks();
    thread::sleep(2 * SECOND);
    assert_eq!(ticks(), before, "a paused container goes on");

    let exec = pod.exec(&["true"])?;
    assert!(exec.error_text().contains("paused"), "{}", exec.both());
    let again = host.ctr(["task", "pause", pod.id()]).output()?;
    assert_ne!(again.status, 0, "paused twice");
    let deleted = host.ctr(["task", "rm", pod.id()]).output()?;
    assert_ne!(deleted.status, 0, "deleted while it was paused");

    host.ctr(["task", "resume", pod.id()]).ok()?;
    pod.wait_status("RUNNING", 5 * SECOND)?;
    moves("ticks after the pause")?;
    assert_eq!(pod.exec(&["echo", "lives"])?.text(), "lives");

    host.ctr(["task", "pause", pod.id()]).ok()?;
    assert_eq!(pod.kill("KILL")?.status, 0);
    assert_eq!(events.exit(pod.id(), pod.id(), 10 * SECOND)?.status(), 137);
    let topics: Vec<_> = events
        .of(pod.id())
        .into_iter()
        .filter(|event| event.topic != "/tasks/exit" || event.process() == pod.id())
        .map(|event| event.topic)
        .filter(|topic| {
            topic == "/tasks/paused" || topic == "/tasks/resumed" || topic == "/tasks/exit"
        })
        .collect();
    let wanted = [
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/paused",
        "/tasks/exit",
    ];
    assert_eq!(topics, wanted);
    assert_eq!(pod.delete()?, 137);
    fs::remove_file(log)?;
    Ok(())
}

/// Limits are changed while the container runs; what can't be is refused, and changes nothing.
#[test]
fn limits_are_changed_while_it_runs() -> TestResult {
    let host = Host::shared()?;
    let cgroup = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let options = ["--memory-limit", "134217728", "--mount", cgroup];
    let pod = host.start("updated", &options, &["sleep", "1000"])?;
    let api = api_of(&host, &pod)?;
    let update = |resources: serde_json::Value| -> TestResult<Result<api::Empty, Refusal>> {
        let request = api::UpdateTaskRequest {
            id: pod.id().to_owned(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: serde_json::to_vec(&resources)?,
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(api.call("Update", &request, DEADLINE)?.0)
    };
    let limits = || -> TestResult<Vec<String>> {
        let script =
            "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup); cat memory.max cpu.max pids.max";
        let text = pod.exec_call(&[], &["sh", "-c", script]).ok()?.text();
        Ok(text.lines().map(str::to_owned).collect())
    };
    assert_eq!(limits()?[0], "134217728");
    done(update(serde_json::json!({
        "memory": {"limit": 67_108_864},
        "cpu": {"quota": 50_000, "period": 100_000},
        "pids": {"limit": 64},
    }))?)?;
    let changed = ["67108864", "50000 100000", "64"];
    assert_eq!(limits()?, changed);
    // One field alone leaves the others.
    done(update(serde_json::json!({"pids": {"limit": 32}}))?)?;
    assert_eq!(limits()?, ["67108864", "50000 100000", "32"]);
    if !is_oracle() {
        let bad = serde_json::json!({"pids": {"limit": 16}, "rdma": {"a": {"hcaHandles": 1}}});
        let refusal = refused(update(bad)?)?;
        assert!(refusal.text.contains("linux.resources.rdma"), "{refusal:?}");
        assert_eq!(limits()?[2], "32");
    }
    // The new limit counts.
    let hog = pod.exec(&["tail", "/dev/zero"])?;
    assert_eq!(hog.status, 137, "{}", hog.both());
    let metrics = host
        .ctr(["task", "metrics", "--format", "json", pod.id()])
        .ok()?
        .text();
    let metrics: serde_json::Value = serde_json::from_str(&metrics)?;
    let number = |path: &str| metrics.pointer(path).and_then(serde_json::Value::as_u64);
    assert_eq!(number("/memory/usage_limit"), Some(67_108_864), "{metrics}");
    assert_eq!(number("/pids/limit"), Some(32), "{metrics}");
    for path in [
        "/cpu/usage_usec",
        "/memory/usage",
        "/pids/current",
        "/memory_events/oom_kill",
        "/memory/pgfault",
    ] {
        assert!(
            number(path).is_some_and(|number| number > 0),
            "{path}: {metrics}"
        );
    }
    assert_eq!(pod.kill("KILL")?.status, 0);
    pod.wait_status("STOPPED", 5 * SECOND)?;
    refused(update(serde_json::json!({"pids": {"limit": 8}}))?)?;
    assert_eq!(pod.delete()?, 137);
    Ok(())
}

/// An exec whose command is missing stays as it was registered: no exit is told, it waits for nothing, and
/// can be deleted. Started a second time it is refused, and the shim lives.
#[test]
fn a_failed_exec_stays_created() -> TestResult {
    let host = Host::shared()?;
    let pod = host.start("failed", &[], &["sleep", "1000"])?;
    let api = api_of(&host, &pod)?;
    let (id, exec_id) = (pod.id().to_owned(), "broken".to_owned());
    let process = serde_json::json!({
        "cwd": "/", "args": ["/no/such"], "env": [], "user": {"uid": 0, "gid": 0},
    });
    let request = api::ExecProcessRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        spec: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: serde_json::to_vec(&process)?,
            ..Default::default()
        }),
        ..Default::default()
    };
    let _: api::Empty = done(api.call("Exec", &request, DEADLINE)?.0)?;
    let again = refused(api.call::<api::Empty>("Exec", &request, DEADLINE)?.0)?;
    assert_eq!(
        again.code,
        containerd_shim_protos::ttrpc::Code::ALREADY_EXISTS,
        "{again:?}"
    );
    let start = api::StartRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        ..Default::default()
    };
    let refusal = refused(api.call::<api::StartResponse>("Start", &start, DEADLINE)?.0)?;
    assert!(
        refusal
            .text
            .contains("exec: \"/no/such\": stat /no/such: no such file or directory"),
        "{refusal:?}"
    );
    let state = api::StateRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        ..Default::default()
    };
    let state: api::StateResponse = done(api.call("State", &state, DEADLINE)?.0)?;
    assert_eq!((state.status, state.pid), (api::Status::CREATED.into(), 0));
    // A second start is a panic of runc's shim: not tried.
    if !is_oracle() {
        refused(api.call::<api::StartResponse>("Start", &start, DEADLINE)?.0)?;
    }
    let wait = api::WaitRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        ..Default::default()
    };
    let _: api::WaitResponse = done(api.call("Wait", &wait, SECOND)?.0)?;
    let delete = api::DeleteRequest {
        id,
        exec_id,
        ..Default::default()
    };
    let _: api::DeleteResponse = done(api.call("Delete", &delete, DEADLINE)?.0)?;
    assert_eq!(pod.exec(&["echo", "lives"])?.text(), "lives");
    pod.remove()
}

/// A logger gets both streams on descriptors of its own, says that it is ready, and ends with the container.
#[test]
fn output_goes_to_a_loggers_program() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let place = PathBuf::from(format!("/run/{}", host.name("logger")));
    fs::create_dir(&place)?;
    let program = place.join("logger");
    let here = place.display();
    // Arguments are the URI's keys and values.
    let script = format!(
        "#!/bin/sh\ncat <&3 >{here}/stdout 5>&- & cat <&4 >{here}/stderr 5>&- & \
         echo \"$1 $2 $CONTAINER_ID $CONTAINER_NAMESPACE\" >{here}/told\nexec 5>&-\nwait\ntouch {here}/ended\n"
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{}?key=value", program.display());
    let command = ["sh", "-c", "echo out; echo err >&2; exit 3"];
    let pod = host.start("logged", &["--log-uri", &uri], &command)?;
    assert_eq!(events.exit(pod.id(), pod.id(), 60 * SECOND)?.status(), 3);
    let id = pod.id().to_owned();
    assert_eq!(pod.delete()?, 3);
    until("the logger's end", 15 * SECOND, || {
        place.join("ended").exists()
    })?;
    let read = |name: &str| fs::read_to_string(place.join(name)).unwrap_or_default();
    assert_eq!(
        (read("stdout"), read("stderr")),
        ("out\n".into(), "err\n".into())
    );
    let told = read("told");
    let namespace = kata_like_tests::host::NAMESPACE;
    assert_eq!(told.trim(), format!("key value {id} {namespace}"));
    fs::remove_dir_all(place)?;
    Ok(())
}

fn now() -> TestResult<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// How far the guest's clock is ahead of the host's, in seconds, and how exactly that is known.
fn ahead(pod: &Pod) -> TestResult<(f64, f64)> {
    // The shell's own start is not in it: the time is taken once for the way there, once for both ways.
    let mut best = (0.0, f64::MAX);
    for _ in 0..3 {
        let begin = now()?;
        let output = pod.exec_call(&[], &[TOOL, "time"]).ok()?;
        let end = now()?;
        let guest: f64 = output.text().parse()?;
        let (middle, half) = ((begin + end) / 2.0, (end - begin) / 2.0);
        if half < best.1 {
            best = (guest - middle, half);
        }
    }
    Ok(best)
}

/// The host's clock is stepped by an hour, and back: the guest's follows within five seconds.
#[test]
fn the_guests_clock_follows_the_hosts() -> TestResult {
    kata_like_only!();
    if std::env::var("TEST_HOST").is_ok_and(|kind| kind != "emulated") {
        eprintln!("not on this machine: its clock is not the test's to step");
        return Ok(());
    }
    let host = Host::alone()?;
    let tool = Tool::new(&host)?;
    let pod = host.start("clock", &["--mount", &tool.mount()], &["sleep", "1000"])?;
    for hours in [1, -1] {
        step_clock(hours * 3600)?;
        thread::sleep(SECOND);
        let (ahead, uncertain) = ahead(&pod)?;
        assert!(
            ahead.abs() < uncertain + 0.1,
            "{ahead} s, known to {uncertain} s"
        );
    }
    // A VM that stood still for a while has lost nothing, either.
    let vmm = pod.process("vmm")?;
    vmm.signal(Signal::STOP)?;
    thread::sleep(30 * SECOND);
    vmm.signal(Signal::CONT)?;
    thread::sleep(SECOND);
    let (ahead, uncertain) = ahead(&pod)?;
    assert!(
        ahead.abs() < uncertain + 0.1,
        "{ahead} s, known to {uncertain} s"
    );
    pod.remove()
}

fn step_clock(seconds: i64) -> TestResult {
    let target = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let time = rustix::time::Timespec {
        tv_sec: i64::try_from(target.as_secs())? + seconds,
        tv_nsec: target.subsec_nanos().into(),
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)?;
    Ok(())
}

/// Hooks of the host run there, with the state on their stdin: before the container is made, after its start,
/// and when it is gone. nerdctl's networking is such a hook.
#[test]
fn hooks_of_the_host_get_the_state() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let rootfs = Rootfs::mount(&host)?;
    let place = PathBuf::from(format!("/run/{}", host.name("hooks")));
    fs::create_dir(&place)?;
    let hook = |kind: &str| {
        let script = format!(
            "cat >{0}/{kind}.json; readlink /proc/self/ns/net >{0}/{kind}.net",
            place.display()
        );
        serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let mut spec = rootfs.spec(&host, &["true"])?;
    for kind in ["prestart", "createRuntime", "poststart", "poststop"] {
        spec["hooks"][kind] = hook(kind);
    }
    let id = host.name("hooked");
    rootfs.run(&host, &id, &spec)?.ok()?;
    let own = fs::read_link("/proc/self/ns/net")?;
    for (kind, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ] {
        let state = fs::read(place.join(format!("{kind}.json")))
            .map_err(|error| failure(format!("{kind}: {error}")))?;
        let state: serde_json::Value = serde_json::from_slice(&state)?;
        assert_eq!(state["id"], *id, "{kind}: {state}");
        if kind != "poststart" || !is_oracle() {
            assert_eq!(state["status"], status, "{kind}: {state}");
        }
        let has_pid = state["pid"].as_i64().is_some_and(|pid| pid > 0);
        assert_eq!(has_pid, kind != "poststop", "{kind}: {state}");
        let bundle = state["bundle"].as_str().unwrap_or_default();
        assert_eq!(PathBuf::from(bundle), host.bundle(&id), "{kind}");
        let net = fs::read_to_string(place.join(format!("{kind}.net")))?;
        assert_eq!(net.trim(), own.display().to_string(), "{kind}");
    }

    // One that fails before the start fails the creation, with its number and its words.
    spec["hooks"] = serde_json::json!({
        "createRuntime": [{"path": "/bin/true"}, {"path": "/bin/sh", "args": ["sh", "-c", "echo sorry >&2; exit 5"]}],
    });
    let output = rootfs.run(&host, &host.name("hooked"), &spec)?.output()?;
    assert_ne!(output.status, 0);
    let line = output.error_text();
    for words in ["hook #1", "exit status 5", "sorry"] {
        assert!(line.contains(words), "no {words:?} in: {line}");
    }
    fs::remove_dir_all(place)?;
    drop(rootfs);
    host.leaves_nothing(&before)
}

/// The test image as a directory, for a spec of one's own.
struct Rootfs<'host> {
    host: &'host Host,
    path: PathBuf,
}

impl<'host> Rootfs<'host> {
    fn mount(host: &'host Host) -> TestResult<Self> {
        let path = PathBuf::from(format!("/run/{}", host.name("rootfs")));
        fs::create_dir(&path)?;
        let target = path.display().to_string();
        host.ctr(["images", "mount", "--rw", kata_like_tests::IMAGE, &target])
            .ok()?;
        Ok(Self { host, path })
    }

    /// containerd's default spec for this command.
    fn spec(&self, host: &Host, command: &[&str]) -> TestResult<serde_json::Value> {
        let mut spec: serde_json::Value =
            serde_json::from_str(&host.ctr(["oci", "spec"]).ok()?.text())?;
        spec["process"]["args"] = command.into();
        spec["process"]["env"] = serde_json::json!(["PATH=/bin"]);
        spec["process"]["cwd"] = "/".into();
        spec["root"] = serde_json::json!({"path": self.path});
        Ok(spec)
    }

    fn run(&self, host: &Host, id: &str, spec: &serde_json::Value) -> TestResult<Call> {
        let path = self.path.with_extension("json");
        let mut spec = spec.clone();
        spec["linux"]["cgroupsPath"] = format!("/{}/{id}", kata_like_tests::host::NAMESPACE).into();
        fs::write(&path, spec.to_string())?;
        let (path, runtime) = (path.display().to_string(), kata_like_tests::runtime());
        Ok(host.ctr(["run", "--rm", "--runtime", &runtime, "--config", &path, id]))
    }
}

impl Drop for Rootfs<'_> {
    fn drop(&mut self) {
        let target = self.path.display().to_string();
        let _ = self
            .host
            .ctr(["images", "unmount", "--rm", &target])
            .output();
        let _ = Command::new("umount").arg("-l").arg(&self.path).output();
        let _ = fs::remove_dir(&self.path);
        let _ = fs::remove_file(self.path.with_extension("json"));
    }
}
