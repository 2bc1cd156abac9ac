//! The hooks of a container that run on the host.
//!
//! Called by `pod` at the steps of a container's life, and by `cleanup` for a container whose
//! shim is gone. A hook is a program of the administrator's, named in the spec by who may start
//! containers; it runs as runc would run it: in containerd's mount namespace and the host's
//! network, with the container's state as JSON on its standard input, in the container's own
//! cgroup.
//!
//! What must hold: each hook has a deadline, the spec's or [`DEADLINE`]; a hook that exceeds it is
//! killed; the first one that fails ends its list. What it writes is kept up to a bound, for the
//! error. poststop hooks run once: by the shim, or by `delete` after its death. A file in the
//! bundle says which.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::thread::UnshareFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::cgroup::Cgroup;
use crate::spawn::{Birth, Child, Exit, Network, birth};
use crate::spec::HostHook;
use kata_like_failure::{Failure, Kind, one_line};

/// How long a hook may run where the spec does not say it.
pub const DEADLINE: Duration = Duration::from_secs(120);
/// How long the output of a hook that has ended is read on: it may have left a child that holds it.
const LAST_OUTPUT: Duration = Duration::from_millis(300);
/// As much of a hook's output is kept of each stream.
const MAX_OUTPUT: usize = 16 << 10;
/// How long a killed hook may take to be gone.
const KILLED: Duration = Duration::from_secs(2);

/// A container's state as the OCI runtime specification has it ("State").
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    /// The version of the container's spec.
    pub oci_version: &'a str,
    pub id: &'a str,
    /// `creating`, `running` or `stopped`.
    pub status: &'static str,
    /// The pid of its stand-in on the host; 0 if there is none any more.
    #[serde(skip_serializing_if = "is_zero")]
    pub pid: u32,
    pub bundle: &'a str,
    /// The spec's annotations.
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub annotations: &'a HashMap<String, String>,
}

fn is_zero(pid: &u32) -> bool {
    *pid == 0
}

/// The file in a bundle that says: hooks have run for this container, and its poststop hooks have
/// not.
const DUE: &str = "poststop-due";

/// Notes that a container's poststop hooks are to run, whatever becomes of the shim.
pub fn owe_poststop(bundle: &Path) -> Result<(), Failure> {
    let path = bundle.join(DUE);
    std::fs::File::create(&path)
        .map(drop)
        .map_err(|cause| Failure::failed(format!("write {}", path.display()), cause))
}

/// Whether a container's poststop hooks are still to run; from now on they are the caller's to run.
pub fn take_poststop(bundle: &Path) -> bool {
    // Of several callers one finds the file.
    std::fs::remove_file(bundle.join(DUE)).is_ok()
}

/// Whether a container's poststop hooks are still to run.
pub fn owes_poststop(bundle: &Path) -> bool {
    bundle.join(DUE).exists()
}

/// Where hooks run.
#[derive(Clone, Debug)]
pub struct Place {
    /// The cgroup that they are born in; none: the caller's own.
    pub cgroup: Option<Arc<Cgroup>>,
    /// containerd's mount namespace; none: the caller's own.
    pub mounts: Option<Arc<OwnedFd>>,
    /// The directory that they start in: the bundle.
    pub directory: PathBuf,
}

/// Runs hooks one after the other. `kind` is their name in the spec. `limit` bounds each hook's
/// deadline.
pub async fn run(
    kind: &str,
    hooks: &[HostHook],
    state: &State<'_>,
    place: &Place,
    limit: Duration,
) -> Result<(), Failure> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::to_vec(state)
        .map_err(|cause| Failure::failed(format!("write the state for the {kind} hooks"), cause))?;
    for (index, hook) in hooks.iter().enumerate() {
        let deadline = hook.timeout.unwrap_or(DEADLINE).min(limit);
        run_one(hook, state.clone(), place, deadline)
            .await
            .map_err(|why| {
                let text = format!("error running {kind} hook #{index}: {why}");
                Failure::new(Kind::Failed, text)
            })?;
        tracing::debug!("{kind} hook #{index} ({}) has run", hook.path.display());
    }
    Ok(())
}

/// A hook's process. Dropped, it is killed.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// Runs one hook; the error is in runc's words.
async fn run_one(
    hook: &HostHook,
    state: Vec<u8>,
    place: &Place,
    deadline: Duration,
) -> Result<(), String> {
    let made = |cause: io::Error| format!("make its pipes: {cause}");
    let (input, to_hook) = pair().map_err(made)?;
    let (from_stdout, stdout) = pair().map_err(made)?;
    let (from_stderr, stderr) = pair().map_err(made)?;
    let (hook, place) = (hook.clone(), place.clone());
    let born = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = hook.arguments.iter().map(String::as_str).collect();
        let environment = hook.environment.clone().unwrap_or_else(own_environment);
        let newborn = birth(&Birth {
            program: &hook.path,
            arguments: &arguments,
            environment: &environment,
            directory: &place.directory,
            cgroup: place.cgroup.as_ref().map(|cgroup| cgroup.as_fd()),
            network: Network::Inherited,
            namespaces: UnshareFlags::empty(),
            mounts: place.mounts.as_ref().map(|mounts| mounts.as_fd()),
            label: None,
            oom_score: None,
            descriptors: &[
                Some(input.as_fd()),
                Some(stdout.as_fd()),
                Some(stderr.as_fd()),
            ],
        });
        newborn.map_err(|error| one_line(&error))
    });
    let newborn = born.await.map_err(|panic| panic.to_string())??;
    let child = Running(Child::watch(newborn).map_err(|cause| format!("watch it: {cause}"))?);
    let mut to_hook = pipe::Sender::from_owned_fd(to_hook).map_err(made)?;
    tokio::spawn(async move {
        // A hook need not read it.
        let _ = to_hook.write_all(&state).await;
    });
    let stdout = tokio::spawn(gather(
        pipe::Receiver::from_owned_fd(from_stdout).map_err(made)?,
    ));
    let stderr = tokio::spawn(gather(
        pipe::Receiver::from_owned_fd(from_stderr).map_err(made)?,
    ));
    let Ok(exit) = tokio::time::timeout(deadline, child.0.exited()).await else {
        child.0.end(KILLED).await;
        return Err(format!(
            "hook ran past specified timeout of {:.1}s",
            deadline.as_secs_f64()
        ));
    };
    let how = match exit {
        Exit::Status(0) => return Ok(()),
        Exit::Status(status) => format!("exit status {status}"),
        Exit::Signal(signal) => format!("killed by signal {signal}"),
    };
    let (stdout, stderr) = tokio::join!(text(stdout), text(stderr));
    Err(format!("{how}, stdout: {stdout}, stderr: {stderr}"))
}

/// A pipe: the end to read from, the end to write to.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// containerd's environment, which the shim has from it.
fn own_environment() -> Vec<String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .map(|(name, value)| format!("{name}={value}"))
        .collect()
}

/// Reads to the end, and keeps the beginning.
async fn gather(mut from: pipe::Receiver) -> Vec<u8> {
    let (mut kept, mut chunk) = (Vec::new(), vec![0; 4096]);
    while let Ok(length @ 1..) = from.read(&mut chunk).await {
        let room = MAX_OUTPUT.saturating_sub(kept.len());
        kept.extend_from_slice(chunk.get(..length.min(room)).unwrap_or_default());
    }
    kept
}

async fn text(gathered: tokio::task::JoinHandle<Vec<u8>>) -> String {
    let abort = gathered.abort_handle();
    let bytes = match tokio::time::timeout(LAST_OUTPUT, gathered).await {
        Ok(bytes) => bytes.unwrap_or_default(),
        Err(_) => {
            abort.abort();
            Vec::new()
        }
    };
    kata_like_failure::clean(String::from_utf8_lossy(&bytes).trim_end(), MAX_OUTPUT)
}

#[cfg(test)]
mod tests;
