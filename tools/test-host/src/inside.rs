//! PID 1 of the emulated host: sets it up, runs the command, reports how it ended.
//!
//! The first root's init starts this program on this machine's root file system. `machine` has put
//! the request into the run directory, which is visible here under the same path: `argv`, `env`,
//! `shares` (NUL after each entry), `cwd`, `tools`, and `interactive` if the command gets an input.
//! Standard streams are virtio serial ports.
//! Threads copy them, so that the command has ordinary pipes.
//!
//! On the port `control` it writes a line for each of: `up`, `alive` every [`SIGN_OF_LIFE`],
//! `failed WHY`, `exit CODE`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::process::WaitOptions;

use crate::error::HostError;
use crate::setup;

/// The first argument that makes this program PID 1.
pub const ROLE: &str = "inside";

/// How long output may take to arrive after the command has ended: a daemon that it left may hold
/// the pipe.
const DRAIN: Duration = Duration::from_secs(2);

/// How often this host says that it is alive.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// Runs as PID 1 and never returns: the host's end is QEMU's end.
pub fn main(run: Option<OsString>) -> ExitCode {
    let run = PathBuf::from(run.unwrap_or_default());
    let mut control = None;
    let line = match host(&run, &mut control) {
        Ok(code) => format!("exit {code}\n"),
        Err(error) => format!("failed {}\n", error.one_line().replace('\n', " ")),
    };
    match control
        .as_mut()
        .map(|port: &mut File| port.write_all(line.as_bytes()))
    {
        Some(Ok(())) => {}
        _ => {
            let _ = fs::write("/dev/ttyS0", format!("test-host: {line}"));
        }
    }
    loop {
        reap(None);
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn host(run: &Path, control: &mut Option<File>) -> Result<i32, HostError> {
    setup::mount_kernel_file_systems()?;
    *control = Some(port("control")?);
    let (stdout, stderr) = (port("stdout")?, port("stderr")?);
    let interactive = run.join("interactive").exists();
    let input = interactive.then(|| port("stdin")).transpose()?;

    let tools = PathBuf::from(OsString::from_vec(read(&run.join("tools"))?));
    setup::load_modules(&tools)?;
    setup::start_keeper()?;
    setup::delegate_controllers()?;
    setup::allow_huge_pages()?;
    setup::loopback_up()?;
    for (index, target) in list(&run.join("shares"))?.iter().enumerate() {
        let options = c"trans=virtio,version=9p2000.L,msize=512000,cache=mmap";
        let target = Path::new(target);
        mount(
            format!("share{index}"),
            target,
            "9p",
            MountFlags::empty(),
            options,
        )
        .map_err(HostError::system(format!(
            "mount the shared {}",
            target.display()
        )))?;
    }
    setup::share_root()?;
    rustix::system::sethostname(b"test-host").map_err(HostError::system("set the host's name"))?;
    if let Some(port) = control {
        port.write_all(b"up\n")
            .map_err(HostError::system("say that the host is up"))?;
        let mut port = port
            .try_clone()
            .map_err(HostError::system("say that the host is alive"))?;
        std::thread::spawn(move || {
            while port.write_all(b"alive\n").is_ok() {
                std::thread::sleep(SIGN_OF_LIFE);
            }
        });
    }
    command(run, &tools, input, stdout, stderr)
}

/// Runs the command, whose standard streams are these ports.
fn command(
    run: &Path,
    tools: &Path,
    input: Option<File>,
    stdout: File,
    stderr: File,
) -> Result<i32, HostError> {
    let argv = list(&run.join("argv"))?;
    let (program, arguments) = argv
        .split_first()
        .ok_or_else(|| HostError::Usage("no command in the request".into()))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .current_dir(OsString::from_vec(read(&run.join("cwd"))?))
        .stdin(match input {
            Some(_) => Stdio::piped(),
            None => Stdio::null(),
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for entry in list(&run.join("env"))? {
        let mut parts = entry.as_bytes().splitn(2, |byte| *byte == b'=');
        if let (Some(name), Some(value)) = (parts.next(), parts.next()) {
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
    }
    command
        .env("TEST_HOST", "emulated")
        .env("TEST_HOST_TOOLS", tools)
        .env(kata_like_limits::VARIABLE, scale()?.to_string());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let mut stderr = stderr;
            let _ = writeln!(stderr, "test-host: {}: {error}", program.to_string_lossy());
            return Ok(127);
        }
    };
    if let (Some(mut from), Some(mut to)) = (input, child.stdin.take()) {
        std::thread::spawn(move || drop(std::io::copy(&mut from, &mut to)));
    }
    let (done, finished) = mpsc::channel();
    let streams: [(Option<Box<dyn Read + Send>>, File); 2] = [
        (child.stdout.take().map(|pipe| Box::new(pipe) as _), stdout),
        (child.stderr.take().map(|pipe| Box::new(pipe) as _), stderr),
    ];
    for (from, mut to) in streams {
        let done = done.clone();
        std::thread::spawn(move || {
            if let Some(mut from) = from {
                let _ = std::io::copy(&mut from, &mut to);
            }
            let _ = done.send(());
        });
    }
    let code = loop {
        if let Some(code) = reap(Some(child.id())) {
            break code;
        }
    };
    for _ in 0..2 {
        let _ = finished.recv_timeout(DRAIN);
    }
    Ok(code)
}

/// The scale of time limits here: the machine's own, or what the boot says if that is more.
fn scale() -> Result<f64, HostError> {
    let uptime =
        fs::read_to_string("/proc/uptime").map_err(HostError::file("read", "/proc/uptime"))?;
    let seconds = uptime.split(' ').next().and_then(|text| text.parse().ok());
    let boot = Duration::from_secs_f64(seconds.unwrap_or_default());
    kata_like_limits::slower(boot.div_duration_f64(kata_like_limits::BOOT));
    Ok(kata_like_limits::scale())
}

/// Reaps children: all that have ended, or with `until` one after the other until that one ends.
fn reap(until: Option<u32>) -> Option<i32> {
    loop {
        let how = match until {
            Some(_) => WaitOptions::empty(),
            None => WaitOptions::NOHANG,
        };
        // No `Child` of this process is waited for elsewhere, so no other wait loses its status.
        let Ok(Some((pid, status))) = rustix::process::wait(how) else {
            return None;
        };
        if until.is_some_and(|wanted| i64::from(wanted) == i64::from(pid.as_raw_pid())) {
            let signal = status.terminating_signal().unwrap_or_default();
            return Some(status.exit_status().unwrap_or(128 + signal));
        }
    }
}

/// Opens the virtio serial port of this name.
fn port(name: &str) -> Result<File, HostError> {
    let step = "look for a virtio serial port";
    let ports = "/sys/class/virtio-ports";
    for entry in fs::read_dir(ports)
        .map_err(HostError::file("read", ports))?
        .flatten()
    {
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim() == name {
            let path = Path::new("/dev").join(entry.file_name());
            return OpenOptions::new()
                .read(name == "stdin")
                .write(name != "stdin")
                .open(&path)
                .map_err(HostError::file("open", path));
        }
    }
    Err(HostError::Missing {
        step,
        why: format!("none is named {name}"),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, HostError> {
    fs::read(path).map_err(HostError::file("read", path))
}

fn list(path: &Path) -> Result<Vec<OsString>, HostError> {
    let bytes = read(path)?;
    let Some(entries) = bytes.strip_suffix(&[0]) else {
        return Ok(Vec::new());
    };
    Ok(entries
        .split(|byte| *byte == 0)
        .map(|entry| OsString::from_vec(entry.to_vec()))
        .collect())
}
