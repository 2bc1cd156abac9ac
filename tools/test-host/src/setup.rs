//! Makes a freshly booted kernel, or a set of fresh namespaces, a host for containers.
//!
//! `inside` calls all of it as PID 1 of the emulated host, `direct` the part that a namespace
//! needs. It does what systemd does on a real host: kernel file systems, cgroup v2 with all
//! controllers, a shared `/`, loopback up.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use crate::error::HostError;
use crate::keeper;
use crate::packages::output;

/// Modules that udev or a service would load on a real host. None of vhost: nothing here may need
/// one.
const MODULES: [&str; 16] = [
    "kvm_amd",
    "tun",
    "fuse",
    "overlay",
    "veth",
    "dummy",
    "bonding",
    "macvlan",
    "macvtap",
    "ipvlan",
    "8021q",
    "bridge",
    "sch_ingress",
    "act_mirred",
    "cls_u32",
    "loop",
];

/// Mounts the kernel's file systems and tmpfs on a root that has none yet.
pub fn mount_kernel_file_systems() -> Result<(), HostError> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let devices = MountFlags::NOSUID | MountFlags::NOEXEC;
    let wanted: [(&str, &str, MountFlags, &str); 10] = [
        ("proc", "/proc", plain, ""),
        ("sysfs", "/sys", plain, ""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, "mode=755"),
        ("devpts", "/dev/pts", devices, "mode=620,gid=5,ptmxmode=666"),
        (
            "tmpfs",
            "/dev/shm",
            MountFlags::NOSUID | MountFlags::NODEV,
            "mode=1777",
        ),
        ("mqueue", "/dev/mqueue", plain, ""),
        (
            "tmpfs",
            "/run",
            MountFlags::NOSUID | MountFlags::NODEV,
            "mode=755",
        ),
        (
            "tmpfs",
            "/var/lib/containerd",
            MountFlags::NOSUID | MountFlags::NODEV,
            "mode=711",
        ),
        ("debugfs", "/sys/kernel/debug", plain, ""),
        (
            "cgroup2",
            "/sys/fs/cgroup",
            plain,
            "nsdelegate,memory_recursiveprot",
        ),
    ];
    for (kind, target, flags, data) in wanted {
        fs::create_dir_all(target).map_err(HostError::file("create", target))?;
        let data = std::ffi::CString::new(data).unwrap_or_default();
        mount(kind, target, kind, flags, data.as_c_str())
            .map_err(HostError::system(format!("mount {kind} on {target}")))?;
    }
    Ok(())
}

/// Makes `/` and all below shared, as systemd does.
pub fn share_root() -> Result<(), HostError> {
    mount_change(
        "/",
        MountPropagationFlags::SHARED | MountPropagationFlags::REC,
    )
    .map_err(HostError::system("make / shared"))
}

/// Hands every controller down from the root cgroup.
pub fn delegate_controllers() -> Result<(), HostError> {
    let root = Path::new("/sys/fs/cgroup");
    let available = root.join("cgroup.controllers");
    let names = fs::read_to_string(&available).map_err(HostError::file("read", &available))?;
    let control = root.join("cgroup.subtree_control");
    for name in names.split_whitespace() {
        fs::write(&control, format!("+{name}")).map_err(HostError::file("write", &control))?;
    }
    Ok(())
}

/// Makes the kernel's modules findable and loads those that tests need.
pub fn load_modules(tools: &Path) -> Result<(), HostError> {
    let modules = tools.join("lib/modules");
    for entry in fs::read_dir(&modules)
        .map_err(HostError::file("read", &modules))?
        .flatten()
    {
        let link = Path::new("/lib/modules").join(entry.file_name());
        if link.exists() {
            continue;
        }
        fs::create_dir_all("/lib/modules").map_err(HostError::file("create", "/lib/modules"))?;
        std::os::unix::fs::symlink(entry.path(), &link).map_err(HostError::file("link", &link))?;
    }
    output(
        "load modules",
        Command::new("modprobe").arg("-a").args(MODULES),
    )?;
    Ok(())
}

/// Lets a memfd have 2 MiB pages if it asks for them, as `make install` does on a real host.
pub fn allow_huge_pages() -> Result<(), HostError> {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    fs::write(path, "advise").map_err(HostError::file("write", path))
}

/// Brings loopback up.
pub fn loopback_up() -> Result<(), HostError> {
    output(
        "bring loopback up",
        Command::new("ip").args(["link", "set", "lo", "up"]),
    )
    .map(drop)
}

/// Starts the keeper and waits until it holds its VM.
pub fn start_keeper() -> Result<(), HostError> {
    let step = "start the keeper of a VM";
    let mut child = Command::new("/proc/self/exe")
        .arg(keeper::ROLE)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(HostError::system(step))?;
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout)
            .read_line(&mut answer)
            .map_err(HostError::system(step))?;
    }
    if answer.trim() != "holding" {
        return Err(HostError::Missing {
            step,
            why: answer.trim().to_owned(),
        });
    }
    Ok(())
}
