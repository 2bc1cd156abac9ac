//! The machine itself as the test host, if its own KVM boots a kernel. That is tried.
//!
//! `main` asks `usable` and then calls `run`. `run` starts this program again (`ROLE`) in a mount,
//! PID and cgroup namespace with its own `/run`, so nothing that the command leaves stays. A
//! `/dev/kvm` alone proves nothing: some vendor modules offer one that can't run ordinary guests.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kata_like_limits::Patience;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

use crate::arguments::Args;
use crate::emulator;
use crate::error::{HOST_FAILED, HostError};
use crate::prepare::Prepared;
use crate::setup;

/// The first argument that makes this program the one inside the namespaces.
pub const ROLE: &str = "direct";

/// If KVM works a kernel boots in one or two seconds.
const BOOT_DEADLINE: Duration = Duration::from_secs(20);

/// Whether the command can run on this machine; the error says why not.
pub fn usable(prepared: &Prepared) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("not root here".into());
    }
    if !Path::new("/sys/module/kvm_intel").exists() && !Path::new("/sys/module/kvm_amd").exists() {
        return Err("neither kvm_intel nor kvm_amd is loaded".into());
    }
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Err("no cgroup v2 here".into());
    }
    boots(prepared)
}

/// Boots Debian's kernel under the machine's KVM to the first line of its init.
fn boots(prepared: &Prepared) -> Result<(), String> {
    let mut qemu = emulator::qemu(&prepared.root)
        .args([
            "-machine",
            "pc,usb=off",
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-m",
            "512",
        ])
        .arg("-kernel")
        .arg(prepared.path("vmlinuz"))
        .arg("-initrd")
        .arg(prepared.path("initrd.img"))
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 rdinit=/init host.probe",
        ])
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("start qemu-system-x86_64: {error}"))?;
    let (sender, lines) = mpsc::channel();
    if let Some(stdout) = qemu.stdout.take() {
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
    }
    let deadline = Patience::new(BOOT_DEADLINE);
    let mut last = String::from("nothing");
    let result = loop {
        match lines.recv_timeout(deadline.left()) {
            Ok(line) if line.contains("test-host: the kernel is up") => break Ok(()),
            Ok(line) => last = line,
            Err(RecvTimeoutError::Timeout) if !deadline.is_over() => {}
            Err(_) => {
                break Err(format!(
                    "a kernel does not boot under this machine's KVM; its last line: {last}"
                ));
            }
        }
    };
    let _ = qemu.kill();
    let _ = qemu.wait();
    result
}

/// Runs the command in namespaces of this machine and returns its exit code.
pub fn run(args: &Args, prepared: &Prepared) -> Result<u8, HostError> {
    let group = Path::new("/sys/fs/cgroup").join(format!("test-host.{}", std::process::id()));
    fs::create_dir(&group).map_err(HostError::file("create", &group))?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(ROLE)
        .args(&args.command)
        .env("TEST_HOST", "direct")
        .env("TEST_HOST_TOOLS", &prepared.root)
        .stdin(match args.interactive {
            true => Stdio::inherit(),
            false => Stdio::null(),
        });
    let procs = group.join("cgroup.procs");
    // SAFETY: only system calls, and a file write whose path was made before the fork.
    unsafe {
        command.pre_exec(move || {
            fs::write(&procs, "0")?;
            rustix::thread::unshare_unsafe(
                UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWCGROUP,
            )?;
            Ok(())
        });
    }
    let mut child = command
        .spawn()
        .map_err(HostError::system("start the command's namespaces"))?;
    let deadline = Patience::new(args.deadline);
    let result = loop {
        match child
            .try_wait()
            .map_err(HostError::system("wait for the command"))?
        {
            Some(status) => break Ok(status.code().map_or(u8::MAX, |code| code as u8)),
            None if deadline.is_over() => {
                break Err(HostError::Deadline {
                    deadline: args.deadline,
                });
            }
            None => thread::sleep(Duration::from_millis(50)),
        }
    };
    let _ = fs::write(group.join("cgroup.kill"), "1");
    let _ = child.wait();
    for _ in 0..100 {
        if fs::remove_dir(&group).is_ok() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    result
}

/// Inside the namespaces: forks the PID namespace's first process, which sets up the host and runs
/// the command.
pub fn main(command: Vec<OsString>) -> ExitCode {
    match inside(&command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("test-host: {}", error.one_line());
            ExitCode::from(HOST_FAILED)
        }
    }
}

fn inside(command: &[OsString]) -> Result<u8, HostError> {
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .map_err(HostError::system("detach from the machine's mounts"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    for target in ["/run", "/var/lib/containerd"] {
        fs::create_dir_all(target).map_err(HostError::file("create", target))?;
        mount("tmpfs", target, "tmpfs", flags, c"mode=755")
            .map_err(HostError::system(format!("mount a tmpfs on {target}")))?;
    }
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", flags, c"")
        .map_err(HostError::system("mount the cgroup namespace"))?;
    // A cgroup with controllers for its children can't hold processes itself.
    fs::create_dir("/sys/fs/cgroup/runner").map_err(HostError::file("create", "runner"))?;
    fs::write("/sys/fs/cgroup/runner/cgroup.procs", "0")
        .map_err(HostError::file("enter", "runner"))?;
    setup::delegate_controllers()?;
    setup::allow_huge_pages()?;
    setup::share_root()?;
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| HostError::Usage("no command given".into()))?;
    // The first child of the new PID namespace mounts /proc for itself, then becomes the command.
    let script = "mount -t proc proc /proc && exec \"$@\"";
    let status = Command::new("/bin/sh")
        .args(["-c", script, "sh"])
        .arg(program)
        .args(arguments)
        .status()
        .map_err(HostError::system(format!(
            "run {}",
            program.to_string_lossy()
        )))?;
    Ok(status.code().map_or(u8::MAX, |code| code as u8))
}
