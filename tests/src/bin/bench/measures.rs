//! What is measured, and in which order: in each round every runtime once, so that what changes on
//! the host in the meantime is the same for all.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use kata_like_limits::emulated;
use kata_like_tests::{Host, IMAGE, KATA_LIKE, TestResult, failure};

use crate::results::{self, BASE, OURS, Of, Results};
use crate::{files, memory, timing};

/// How many start at once.
const AT_ONCE: usize = 4;

/// A runtime, and how `ctr` is asked for it.
pub struct Runtime {
    pub name: &'static str,
    options: Vec<String>,
}

impl Runtime {
    /// `ctr run` with it: how, its id, the options of this container, its command.
    pub fn run(&self, host: &Host, how: &str, id: &str, more: &[&str], words: &[&str]) -> Command {
        let mut command = host.ctr_command();
        command.args(["run", how]).args(&self.options).args(more);
        command.args([IMAGE, id]).args(words);
        command
    }
}

/// Measures everything.
pub fn all(rounds: usize) -> TestResult<Results> {
    let host = Host::alone()?;
    let mut results = Results {
        host: this_host()?,
        ..Results::default()
    };
    let runtimes = find(&mut results)?;
    // Once unmeasured: files come into the page cache.
    for runtime in &runtimes {
        one_life(&host, runtime, &mut Results::default())?;
    }
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        for runtime in &runtimes {
            one_life(&host, runtime, &mut results)?;
            at_once(&host, runtime, &mut results)?;
            files::measure(&host, runtime, &mut results)?;
        }
    }
    for runtime in &runtimes {
        memory::measure(&host, runtime, &mut results)?;
    }
    Ok(results)
}

/// The runtimes that are on this host.
fn find(results: &mut Results) -> TestResult<Vec<Runtime>> {
    let plain = |options: &[&str]| options.iter().map(|&it| it.to_owned()).collect();
    let runc = "io.containerd.runc.v2";
    let mut found = vec![
        Runtime {
            name: BASE,
            options: plain(&["--runtime", runc]),
        },
        Runtime {
            name: OURS,
            options: plain(&["--runtime", KATA_LIKE]),
        },
    ];
    match on_path("crun") {
        Some(path) => found.push(Runtime {
            name: "crun",
            options: plain(&["--runtime", runc, "--runc-binary", &path]),
        }),
        None => not_there(results, "crun"),
    }
    match on_path("containerd-shim-runsc-v1") {
        Some(_) => found.push(Runtime {
            name: "runsc",
            options: plain(&["--runtime", "io.containerd.runsc.v1"]),
        }),
        None => not_there(results, "runsc"),
    }
    for runtime in &found {
        let program = match runtime.name {
            "kata-like" => "containerd-shim-kata-like-v2",
            other => other,
        };
        let mut ask = Command::new(program);
        let (_, text) = timing::run({
            ask.arg(if program == runtime.name {
                "--version"
            } else {
                "-v"
            });
            ask
        })?;
        results.runtimes.push(results::Runtime {
            name: runtime.name.into(),
            version: text.lines().next().unwrap_or_default().into(),
        });
    }
    Ok(found)
}

fn not_there(results: &mut Results, name: &str) {
    let why = "no such program on the host's PATH";
    results.missing.insert(name.into(), why.into());
}

fn on_path(program: &str) -> Option<String> {
    let path = std::env::var("PATH").ok()?;
    let mut folders = path
        .split(':')
        .map(|folder| Path::new(folder).join(program));
    folders
        .find(|path| path.exists())
        .map(|path| path.display().to_string())
}

fn this_host() -> TestResult<results::Host> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let cpu = cpu
        .and_then(|rest| rest.split_once(": "))
        .map(|(_, name)| name);
    Ok(results::Host {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .into(),
        cpu: cpu.unwrap_or("unknown").into(),
        cpus: thread::available_parallelism()?.get(),
        emulated: emulated(),
    })
}

/// A container that ends by itself; one that gets an exec, is killed and deleted.
fn one_life(host: &Host, runtime: &Runtime, results: &mut Results) -> TestResult {
    let of = |name| Of {
        group: "one container",
        name,
        unit: "ms",
    };
    let id = host.name("bench");
    let (took, _) = timing::run(runtime.run(host, "--rm", &id, &[], &["true"]))?;
    results.add(&of("run a command and remove it"), runtime.name, took);

    let id = host.name("bench");
    let start = runtime.run(host, "-d", &id, &[], &["sleep", "1000"]);
    results.add(&of("start"), runtime.name, timing::run(start)?.0);
    let mut exec = host.ctr_command();
    exec.args(["task", "exec", "--exec-id", "one", &id, "true"]);
    results.add(&of("exec"), runtime.name, timing::run(exec)?.0);
    results.add(&of("kill and remove"), runtime.name, remove(host, &id)?);
    Ok(())
}

/// Kills and removes a container. In milliseconds.
pub fn remove(host: &Host, id: &str) -> TestResult<f64> {
    let mut task = host.ctr_command();
    task.args(["task", "delete", "--force", id]);
    let (took, _) = timing::run(task)?;
    let mut container = host.ctr_command();
    container.args(["container", "delete", id]);
    Ok(took + timing::run(container)?.0)
}

/// Some at once: how long the slowest takes.
fn at_once(host: &Host, runtime: &Runtime, results: &mut Results) -> TestResult {
    let name = format!("{AT_ONCE} at once, the slowest");
    let ids: Vec<_> = (0..AT_ONCE).map(|_| host.name("bench")).collect();
    let times = thread::scope(|scope| {
        let runs: Vec<_> = ids
            .iter()
            .map(|id| scope.spawn(|| timing::run(runtime.run(host, "--rm", id, &[], &["true"]))))
            .collect();
        let joined = runs.into_iter().map(|run| {
            let run = run.join().map_err(|_| failure("a thread panicked"))?;
            run.map(|(took, _)| took)
        });
        joined.collect::<TestResult<Vec<f64>>>()
    })?;
    let of = Of {
        group: "one container",
        name: &name,
        unit: "ms",
    };
    results.add(&of, runtime.name, times.into_iter().fold(0.0, f64::max));
    Ok(())
}
