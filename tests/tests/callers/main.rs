//! Other callers, each by the calls that it makes: nerdctl, BuildKit, CRI-O, and a caller of runc's
//! command line.
//!
//! None of these programs is in Debian. The tests know what they ask for, and in which order.
//! `docker` tests the one that is in Debian.

mod cri_o;
mod nerdctl;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api;
use containerd_shim_protos::types::mount::Mount;
use kata_like_tests::fifo::Fifo;
use kata_like_tests::host::NAMESPACE;
use kata_like_tests::rootfs::Rootfs;
use kata_like_tests::task::{KILL, Streams, Task};
use kata_like_tests::task_api::{Answer, SERVICES, TaskApi, done, refused};
use kata_like_tests::{Call, Host, IMAGE, Parts, TestResult, failure, in_time, kata_like_only};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// A caller that cancels a build step or stops a container gives the shim this long.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A caller that runs the shim's binary itself.
struct Caller<'host> {
    host: &'host Host,
    rootfs: Rootfs<'host>,
    /// Bundles and streams.
    files: PathBuf,
    /// The flags that it passes before the verb, without `-id`.
    flags: Vec<String>,
}

impl<'host> Caller<'host> {
    fn new(host: &'host Host, flags: &[&str]) -> TestResult<Self> {
        let files = PathBuf::from(format!("/run/{}", host.name("caller")));
        fs::create_dir(&files)?;
        Ok(Self {
            host,
            rootfs: Rootfs::mount(host)?,
            files,
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        })
    }

    /// The binary, with nothing about containerd in its environment.
    fn verb(&self, id: &str, verb: &str) -> Call {
        let prefix = std::env::var("KATA_LIKE_PREFIX").unwrap_or_else(|_| "/run/installed".into());
        let shim = Path::new(&prefix).join("bin/containerd-shim-kata-like-v2");
        let mut command = Command::new(shim);
        command
            .args(&self.flags)
            .args(["-id", id, verb])
            .env("TTRPC_ADDRESS", "")
            .current_dir(self.files.join(id));
        Call::new(command)
    }

    /// `start` for a container with this spec. Returns a client of its task API, and the address.
    fn start(&self, stem: &str, spec: &Value) -> TestResult<(Task, String)> {
        self.start_as(&self.host.name(stem), spec)
    }

    /// The same with this id.
    fn start_as(&self, id: &str, spec: &Value) -> TestResult<(Task, String)> {
        let bundle = self.files.join(id);
        fs::create_dir_all(bundle.join("rootfs"))?;
        let mut spec = spec.clone();
        spec["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        fs::write(bundle.join("config.json"), spec.to_string())?;
        let answer = self.verb(id, "start").ok()?;
        let address = String::from_utf8(answer.stdout)?;
        assert!(address.starts_with("unix:///"), "{address:?}");
        assert_eq!(answer.stderr, b"", "{address}");
        // After a restart the caller looks for the address there.
        assert_eq!(fs::read_to_string(bundle.join("address"))?, address);
        let api = TaskApi::connect(&bundle, SERVICES[0])?;
        Ok((
            Task::new(Arc::new(api), id.to_owned(), &self.files),
            address,
        ))
    }

    /// Shutdown after each container, as a caller without sandboxes does it.
    fn shut_down(&self, task: &Task) -> TestResult {
        let api = TaskApi::connect(&self.files.join(task.id()), SERVICES[0])?;
        let request = api::ShutdownRequest {
            id: task.id().into(),
            ..Default::default()
        };
        let _: api::Empty = done(api.call("Shutdown", &request, PATIENCE)?.0)?;
        Ok(())
    }
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.files);
    }
}

/// A build step: one bind mount as its root; then Wait, Start, CloseIO.
#[test]
fn buildkit_runs_steps() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let address = host.address().display().to_string();
    let flags = [
        "-namespace",
        "buildkit",
        "-address",
        &address,
        "-publish-binary",
        "containerd",
    ];
    let caller = Caller::new(&host, &flags)?;
    let before = host.footprint();
    let mut spec = caller
        .rootfs
        .spec(&["sh", "-c", "seq 1 20000; cat; echo done; exit 3"])?;
    spec["root"] = json!({"path": "rootfs"});
    let mut parts = Parts::new();
    parts.run("a step", || a_step_runs(&caller, &spec));
    spec["process"]["args"] = json!(["sh", "-c", "trap '' TERM; sleep 1000 & wait"]);
    parts.run("a build that is given up", || {
        a_step_is_given_up(&caller, &spec)
    });
    // Without a CNI configuration BuildKit takes the host's network.
    parts.run("the host's network", || {
        the_hosts_network_is_refused(&caller, spec)
    });
    parts.run("the end", || host.leaves_nothing(&before));
    parts.end()
}

/// Create of a build step.
fn create_step(
    caller: &Caller,
    step: &Task,
    spec: &Value,
    streams: &Streams,
) -> TestResult<Answer<u32>> {
    step.create_with(spec, streams, |request| {
        request.rootfs = vec![Mount {
            type_: "bind".into(),
            source: caller.rootfs.path().display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        }];
    })
}

fn a_step_runs(caller: &Caller, spec: &Value) -> TestResult {
    let (step, _) = caller.start("step", spec)?;
    let [stdin, stdout, stderr] =
        ["stdin", "stdout", "stderr"].map(|name| Fifo::new(&caller.files, name));
    let (stdin, stdout, stderr) = (stdin?, stdout?, stderr?);
    let (mut output, _errors) = (stdout.reader()?, stderr.reader()?);
    let streams = Streams {
        stdin: stdin.path(),
        stdout: stdout.path(),
        stderr: stderr.path(),
        terminal: false,
    };
    done(create_step(caller, &step, spec, &streams)?)?;
    thread::scope(|scope| -> TestResult {
        let waiting = scope.spawn(|| step.wait(""));
        done(step.start("")?)?;
        // The step's input goes on: CloseIO ends only the shim's own hold on it.
        let writer = stdin.write("early\n")?;
        done(step.close_stdin("")?)?;
        output.expect("20000\nearly\n", PATIENCE)?;
        let late = stdin.write("late\n")?;
        drop((writer, late));
        output.to_end(PATIENCE)?;
        let status = waiting.join().map_err(|_| failure("a thread panicked"))??;
        assert_eq!(done(status)?, 3);
        Ok(())
    })?;
    let numbers: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    assert!(
        output.text() == format!("{numbers}early\nlate\ndone\n"),
        "not what was written"
    );
    done(step.delete("")?)?;
    caller.shut_down(&step)
}

fn a_step_is_given_up(caller: &Caller, spec: &Value) -> TestResult {
    let (step, _) = caller.start("step", spec)?;
    done(create_step(caller, &step, spec, &Streams::default())?)?;
    thread::scope(|scope| -> TestResult {
        let waiting = scope.spawn(|| step.wait(""));
        done(step.start("")?)?;
        done(step.close_stdin("")?)?;
        let begun = Instant::now();
        done(step.kill("", KILL, false)?)?;
        let status = waiting.join().map_err(|_| failure("a thread panicked"))??;
        assert_eq!(done(status)?, 137);
        assert!(
            in_time(begun.elapsed(), KILL_DEADLINE),
            "{:?}",
            begun.elapsed()
        );
        Ok(())
    })?;
    done(step.delete("")?)?;
    caller.shut_down(&step)
}

fn the_hosts_network_is_refused(caller: &Caller, mut spec: Value) -> TestResult {
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.ok_or_else(|| failure("no namespaces"))?;
    namespaces.retain(|namespace| namespace["type"] != "network");
    let (step, _) = caller.start("step", &spec)?;
    let refusal = refused(create_step(caller, &step, &spec, &Streams::default())?)?;
    assert!(
        refusal.text.contains(r#"networkMode = "cni""#),
        "{}",
        refusal.text
    );
    caller.shut_down(&step)
}

/// `--runtime kata-like`, without `io.containerd.`, is handed to runc's shim as the name of a runc
/// binary.
#[test]
fn who_means_runcs_command_line_is_told() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let id = host.name("mistaken");
    let pod = kata_like_tests::CtrContainer::new(&host, id.clone());
    let output = host
        .ctr([
            "run",
            "-d",
            "--runtime",
            "io.containerd.runc.v2",
            "--runc-binary",
            "kata-like",
            IMAGE,
            &id,
            "true",
        ])
        .output()?;
    let said = output.error_text();
    assert_ne!(output.status, 0);
    assert!(
        said.contains("--runtime io.containerd.kata-like.v2"),
        "{said}"
    );
    drop(pod);
    host.leaves_nothing(&before)
}
