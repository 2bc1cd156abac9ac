//! The hooks that run in the guest: `createContainer` when all is mounted, `startContainer` before
//! the command.
//!
//! Called by `init` in the container's process. The guest has no file of the host, so the programs
//! come from the container's root. They are the image's, and get no more rights than it:
//! `createContainer` runs as root with the container's capabilities, `startContainer` as its user.
//! Both get the container's state on stdin (OCI runtime-spec, config.md, "POSIX-platform Hooks").

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kata_like_failure::{Failure, Step};
use kata_like_linux::fd::close_at_exec;
use oci_spec::runtime::{Hook, Spec};
use rustix::fs::Mode;

use super::error::Result;
use super::identity::Identity;

/// The timeout of a hook that has none of its own.
const LONGEST: Duration = Duration::from_secs(30);
/// How much of the output of a hook goes into an error.
const SHOWN: u64 = 512;

/// Runs the hooks `createContainer`, once the container's root is the root.
pub(super) fn create_container(container: &str, spec: &Spec, identity: &Identity) -> Result<()> {
    let hooks = spec.hooks().as_ref();
    let hooks = hooks.and_then(|hooks| hooks.create_container().as_ref());
    let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else {
        return Ok(());
    };
    close_at_exec(3).step(|| "close the runner's files for the hooks")?;
    let none = rustix::process::umask(Mode::from(0o022));
    let state = state(container, spec, "creating");
    let result = hooks.iter().enumerate().try_for_each(|(index, hook)| {
        let field = format!("hooks.createContainer[{index}]");
        run(hook, &state, &field, Some(identity))
    });
    rustix::process::umask(none);
    result
}

/// Runs the hooks `startContainer` in their order, until one fails.
pub(super) fn start_container(container: &str, spec: &Spec) -> Result<()> {
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.start_container().as_ref());
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        let field = format!("hooks.startContainer[{index}]");
        run(hook, &state(container, spec, "created"), &field, None)?;
    }
    Ok(())
}

fn state(container: &str, spec: &Spec, status: &str) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": spec.version(),
        "id": container,
        "status": status,
        "pid": std::process::id(),
        "bundle": "/",
        "annotations": spec.annotations().clone().unwrap_or_default(),
    })
}

/// Runs one hook. `limit`: with that identity's capabilities only.
fn run(
    hook: &Hook,
    state: &serde_json::Value,
    field: &str,
    limit: Option<&Identity>,
) -> Result<()> {
    if !hook.path().is_absolute() {
        return Err(Failure::bad(
            format!("{field}.path"),
            "is not an absolute path",
        ));
    }
    let timeout = timeout(hook, field)?;
    let step = || format!("{field}: run {}", hook.path().display());
    // Files, not pipes: a hook that reads or prints in an unexpected way blocks nobody.
    let mut input = memory("state").step(step)?;
    input.write_all(state.to_string().as_bytes()).step(step)?;
    input.rewind().step(step)?;
    let output = memory("output").step(step)?;
    let both = || output.try_clone().map(Stdio::from);
    let mut command = command(hook, limit);
    command
        .stdin(input)
        .stdout(both().step(step)?)
        .stderr(both().step(step)?);
    let mut child = command.spawn().step(step)?;
    match ended(&mut child, timeout).step(step)? {
        None => Err(Failure::failed(
            step(),
            format!("not done after {timeout:?}"),
        )),
        Some(status) if status.success() => Ok(()),
        Some(status) => {
            let why = format!("{}, output: {:?}", how(status), shown(output).trim());
            Err(Failure::failed(step(), why))
        }
    }
}

fn timeout(hook: &Hook, field: &str) -> Result<Duration> {
    let Some(seconds) = hook.timeout() else {
        return Ok(LONGEST);
    };
    let seconds = u64::try_from(seconds).ok().filter(|&seconds| seconds > 0);
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| Failure::bad(format!("{field}.timeout"), "must be above zero"))
}

fn command(hook: &Hook, limit: Option<&Identity>) -> Command {
    let mut command = Command::new(hook.path());
    let mut arguments = hook.args().iter().flatten();
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).env_clear();
    command.envs(
        hook.env()
            .iter()
            .flatten()
            .filter_map(|variable| variable.split_once('=')),
    );
    let limit = limit.cloned();
    {
        // Set even with nothing to limit. Otherwise glibc's posix_spawn would be used, which leaves
        // two signals of its own ignored in the hook.
        let limit = move || match &limit {
            Some(identity) => identity.limit_capabilities().map_err(std::io::Error::other),
            None => Ok(()),
        };
        // SAFETY: this process has one thread, so that the child can hold no lock that another
        // thread's copy has left behind: it may do what any process does.
        unsafe { command.pre_exec(limit) };
    }
    command
}

/// Waits for the end. `None`: the hook was late, and is killed.
fn ended(child: &mut Child, timeout: Duration) -> std::io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + timeout;
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(Some(status)),
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Ok(None);
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn how(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("killed by signal {signal}"),
        None => format!("exit status {}", status.code().unwrap_or(-1)),
    }
}

/// The beginning of what the hook has printed.
fn shown(mut output: File) -> String {
    let mut shown = String::new();
    let _ = output.seek(SeekFrom::Start(0));
    let _ = output.take(SHOWN).read_to_string(&mut shown);
    shown
}

fn memory(name: &str) -> std::io::Result<File> {
    Ok(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?.into())
}
