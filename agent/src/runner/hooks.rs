//! The hooks that run in the guest: `startContainer`, in the container, just before its command.
//!
//! Called by `mod` in the container's process after the start. Their programs are found in the container's
//! root and run with its user's rights; they get the container's state on stdin (OCI runtime-spec,
//! config.md, "POSIX-platform Hooks").

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};

use super::error::{Result, RunnerError, Step};

/// For a hook without a timeout of its own.
const LONGEST: Duration = Duration::from_secs(30);
/// How much of what a hook has printed goes into an error.
const SHOWN: u64 = 512;

/// Runs them in their order; the first that fails ends it.
pub(super) fn start_container(container: &str, spec: &Spec) -> Result<()> {
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.start_container().as_ref());
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        let field = format!("hooks.startContainer[{index}]");
        run(hook, &state(container, spec), &field)?;
    }
    Ok(())
}

fn state(container: &str, spec: &Spec) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": spec.version(),
        "id": container,
        "status": "created",
        "pid": std::process::id(),
        "bundle": "/",
        "annotations": spec.annotations().clone().unwrap_or_default(),
    })
}

fn run(hook: &Hook, state: &serde_json::Value, field: &str) -> Result<()> {
    if !hook.path().is_absolute() {
        return Err(RunnerError::invalid(
            format!("{field}.path"),
            "is not an absolute path",
        ));
    }
    let timeout = match hook.timeout() {
        None => LONGEST,
        Some(seconds) => {
            let seconds = u64::try_from(seconds).ok().filter(|&seconds| seconds > 0);
            seconds.map(Duration::from_secs).ok_or_else(|| {
                RunnerError::invalid(format!("{field}.timeout"), "must be above zero")
            })?
        }
    };
    let step = || format!("{field}: run {}", hook.path().display());
    // Files, not pipes: a hook that reads or prints otherwise than expected blocks nobody.
    let mut input = memory("state").step(step)?;
    input.write_all(state.to_string().as_bytes()).step(step)?;
    input.rewind().step(step)?;
    let mut output = memory("output").step(step)?;
    let both = || output.try_clone().map(Stdio::from);

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
    command
        .stdin(input)
        .stdout(both().step(step)?)
        .stderr(both().step(step)?);
    let mut child = command.spawn().step(step)?;
    let deadline = Instant::now() + timeout;
    let status = loop {
        match child.try_wait().step(step)? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(RunnerError::failed(format!(
                    "{}: not done after {timeout:?}",
                    step()
                )));
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut shown = String::new();
    let _ = output.seek(SeekFrom::Start(0));
    let _ = (&mut output).take(SHOWN).read_to_string(&mut shown);
    let how = match status.signal() {
        Some(signal) => format!("killed by signal {signal}"),
        None => format!("exit status {}", status.code().unwrap_or(-1)),
    };
    Err(RunnerError::failed(format!(
        "{}: {how}, output: {:?}",
        step(),
        shown.trim()
    )))
}

fn memory(name: &str) -> std::io::Result<File> {
    Ok(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?.into())
}
