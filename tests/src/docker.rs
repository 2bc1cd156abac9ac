//! Docker on the host's containerd: a dockerd for each test binary, started by the first test, and
//! `docker`.
//!
//! dockerd ends with the test binary. It has folders of its own, and leaves the host's firewall
//! open.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;

use crate::ctr::Call;
use crate::host::{Host, spawn_bound, tools};
use crate::process::until;
use crate::rootfs::Rootfs;
use crate::{IMAGE, TestResult, failure, runtime, userland};

/// The programs that dockerd calls, and the names of the test host's programs for them.
const FIREWALL: [&str; 6] = [
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
];

static DAEMON: OnceLock<Result<PathBuf, String>> = OnceLock::new();

/// Docker, for as long as one test uses it.
pub struct Docker<'host> {
    host: &'host Host,
    directory: PathBuf,
}

impl<'host> Docker<'host> {
    /// Docker on the containerd of this host.
    pub fn on(host: &'host Host) -> TestResult<Self> {
        let started = DAEMON.get_or_init(|| start(host).map_err(|error| error.to_string()));
        Ok(Self {
            host,
            directory: started.clone().map_err(failure)?,
        })
    }

    /// `docker` with these arguments.
    pub fn call(&self, arguments: &[&str]) -> Call {
        let mut command = docker(&self.directory);
        command.args(arguments);
        Call::new(command)
    }

    /// The standard output of a call that must not fail.
    pub fn output(&self, arguments: &[&str]) -> TestResult<String> {
        Ok(self.call(arguments).ok()?.text())
    }

    /// `docker run --rm` of the test image in the foreground.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Call {
        self.call(&run_arguments(&["--rm"], options, command))
    }

    /// `docker run -d`.
    pub fn start(
        &self,
        stem: &str,
        options: &[&str],
        command: &[&str],
    ) -> TestResult<Container<'_>> {
        let name = self.host.name(stem);
        // First, so that a failed start is cleaned up, too.
        let container = Container { docker: self, name };
        let how = ["-d", "--name", &container.name];
        self.call(&run_arguments(&how, options, command)).ok()?;
        Ok(container)
    }

    /// What dockerd has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }
}

/// A container, removed with the value.
pub struct Container<'docker> {
    docker: &'docker Docker<'docker>,
    name: String,
}

impl Container<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A script in it, by `docker exec`.
    pub fn exec(&self, script: &str) -> Call {
        self.docker.call(&["exec", &self.name, "sh", "-c", script])
    }

    /// What `docker inspect` says.
    pub fn inspect(&self) -> TestResult<Value> {
        let text = self.docker.output(&["inspect", &self.name])?;
        let mut all: Value = serde_json::from_str(&text)?;
        Ok(all[0].take())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self
            .docker
            .call(&["rm", "--force", "--volumes", &self.name])
            .output();
    }
}

fn run_arguments<'a>(how: &[&'a str], options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    static RUNTIME: OnceLock<String> = OnceLock::new();
    let mut all = vec!["run", "--runtime", RUNTIME.get_or_init(runtime)];
    all.extend(how);
    all.extend(options);
    all.push(IMAGE);
    all.extend(command);
    all
}

fn docker(directory: &Path) -> Command {
    let program = tools().unwrap_or_default().join("docker/docker");
    let mut command = Command::new(program);
    command
        .arg("--host")
        .arg(format!("unix://{}", directory.join("socket").display()));
    command
}

fn start(host: &Host) -> TestResult<PathBuf> {
    let directory = PathBuf::from(format!("/run/tests.docker.{}", std::process::id()));
    let programs = directory.join("bin");
    fs::create_dir_all(&programs)?;
    let firewall = userland::path("sbin/xtables-nft-multi")?;
    for name in FIREWALL {
        std::os::unix::fs::symlink(&firewall, programs.join(name))?;
    }
    let tools = tools()?;
    let own = std::env::var("PATH").unwrap_or_default();
    let search = [
        programs,
        tools.join("docker"),
        tools.join("runc"),
        own.into(),
    ]
    .map(|path| path.display().to_string())
    .join(":");
    let log = File::create(directory.join("log"))?;
    let mut command = Command::new(tools.join("docker/dockerd"));
    for (option, value) in [
        ("--containerd", host.address()),
        ("--data-root", directory.join("data")),
        ("--exec-root", directory.join("exec")),
        ("--pidfile", directory.join("pid")),
    ] {
        command.arg(option).arg(value);
    }
    command
        .arg(format!(
            "--host=unix://{}",
            directory.join("socket").display()
        ))
        .arg("--ip-forward-no-drop") // CRI's pods are on this host's bridges, too
        .env("PATH", search)
        .env("LD_LIBRARY_PATH", userland::path("lib/x86_64-linux-gnu")?)
        .env(
            "XTABLES_LIBDIR",
            userland::path("lib/x86_64-linux-gnu/xtables")?,
        )
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    spawn_bound(command)?;
    let answers = || {
        let mut info = docker(&directory);
        info.arg("info");
        Call::new(info).ok()
    };
    until("dockerd answers", Duration::from_secs(120), || {
        answers().is_ok()
    })
    .map_err(|error| {
        let log = fs::read_to_string(directory.join("log")).unwrap_or_default();
        failure(format!("{error}: {log}"))
    })?;
    import(host, &directory)?;
    Ok(directory)
}

/// Imports the test image: Docker reads no archive in OCI's layout.
fn import(host: &Host, directory: &Path) -> TestResult {
    let rootfs = Rootfs::mount(host)?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(rootfs.path()).args(["-c", "."]);
    let archive = Call::new(tar).ok()?.stdout;
    let mut import = docker(directory);
    import.args(["import", "-", IMAGE]);
    Call::new(import).input(archive).ok().map(drop)
}
