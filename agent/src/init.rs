//! From the kernel's bare initramfs to a machine that containers can run in; and its end.
//!
//! Called by `main`, before any thread. The order matters: the root first (pivot_root(2) is refused
//! on the initramfs itself, and a runner needs it), `/dev` next, for without it nobody hears of a
//! failure. From then on the root file system is read-only, the agent's own image included: what a
//! container could reach of it through a runner's `/proc/PID/exe` can't be written.

use std::ffi::CStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::panic;
use std::path::Path;

use kata_like_failure::{Failure, Step};
use kata_like_netlink::loopback_up;
use rustix::fs::Mode;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move, mount_remount};
use rustix::process::{Resource, Rlimit, chdir, chroot, setrlimit, umask};
use rustix::system::{RebootCommand, reboot};

use crate::cgroup;
use crate::kmsg;
use crate::storage::SHARES;

/// A file system of the kernel's own and where it belongs.
struct Kernel {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: Option<&'static CStr>,
}

const NO_SUID: MountFlags = MountFlags::NOSUID;
const NO_EXEC: MountFlags = NO_SUID.union(MountFlags::NOEXEC);
const INERT: MountFlags = NO_EXEC.union(MountFlags::NODEV);

/// In the order of mounting. The options are those of an ordinary systemd host.
#[rustfmt::skip]
const MOUNTS: [Kernel; 7] = [
    Kernel { kind: "devtmpfs", target: "/dev", flags: NO_SUID, data: Some(c"mode=755") },
    Kernel { kind: "proc", target: "/proc", flags: INERT, data: None },
    Kernel { kind: "sysfs", target: "/sys", flags: INERT, data: None },
    Kernel { kind: "devpts", target: "/dev/pts", flags: NO_EXEC, data: Some(c"gid=5,mode=620,ptmxmode=666") },
    Kernel { kind: "tmpfs", target: "/dev/shm", flags: INERT, data: Some(c"mode=1777") },
    Kernel { kind: "tmpfs", target: "/run", flags: INERT, data: Some(c"mode=755") },
    Kernel { kind: "cgroup2", target: cgroup::ROOT, flags: INERT, data: Some(c"nsdelegate,memory_recursiveprot") },
];

/// What a host of containers sets, as kubelet and the distributions do; and what keeps a container
/// from learning about or wearing out the kernel that it shares with its pod.
const SYSCTLS: [(&str, &str); 16] = [
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "524288"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/kptr_restrict", "2"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/pid_max", "4194304"),
    ("kernel/printk_devkmsg", "on"),
    ("kernel/unprivileged_bpf_disabled", "2"),
    ("net/core/bpf_jit_harden", "1"),
    // What was stored through a mapping is on the host after two seconds. No timer runs while nothing is dirty.
    ("vm/dirty_expire_centisecs", "100"),
    ("vm/dirty_writeback_centisecs", "100"),
    ("vm/max_map_count", "1048576"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];

/// The agent's own limit of open files: five for each process of a container and more.
const OPEN_FILES: u64 = 1 << 20;

/// Makes an ordinary Linux machine out of what the kernel has started.
pub fn prepare() -> Result<(), Failure> {
    umask(Mode::from_raw_mode(0o022));
    replace_root()?;
    for file_system in &MOUNTS {
        mount_kernel(file_system)?;
        if file_system.target == "/dev" {
            start_log()?;
            log::info!("the agent has begun");
        }
    }
    log::info!("file systems are mounted");
    for share in SHARES {
        fs::create_dir_all(share.target).step(|| format!("make {}", share.target))?;
    }
    // What a container can't do without comes first; a missing key of these is only worth a line.
    for (key, value) in SYSCTLS {
        // With the newline that some handlers count (kernel/printk/printk.c, devkmsg_sysctl_set_loglvl).
        if let Err(error) = fs::write(Path::new("/proc/sys").join(key), format!("{value}\n")) {
            log::warn!("set sysctl {key} to {value}: {error}");
        }
    }
    loopback_up().step(|| "bring the loopback interface up")?;
    limits()?;
    cgroup::prepare()?;
    if !seeded() {
        log::warn!("no entropy yet: getrandom(2) waits for the entropy device");
    }
    Ok(())
}

/// Puts a bind of the root on the root and goes there, so that it has a parent and can be pivoted
/// away from; then takes the right to write to it from everybody.
fn replace_root() -> Result<(), Failure> {
    const BIND: &str = "/root";
    for directory in ["/dev", "/proc", "/sys", "/run", BIND] {
        match fs::create_dir(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).step(|| format!("make {directory}"));
            }
            _ => {}
        }
    }
    mount_bind("/", BIND).step(|| "bind / on itself")?;
    chdir(BIND).step(|| "enter the bound root")?;
    mount_move(".", "/").step(|| "move the bound root to /")?;
    chroot(".").step(|| "change the root")?;
    chdir("/").step(|| "enter the root")?;
    mount_remount("/", MountFlags::RDONLY, c"").step(|| "make the root read-only")
}

fn mount_kernel(it: &Kernel) -> Result<(), Failure> {
    if it.target.starts_with("/dev/") {
        fs::create_dir_all(it.target).step(|| format!("make {}", it.target))?;
    }
    mount(it.kind, it.target, it.kind, it.flags, it.data)
        .step(|| format!("mount {} on {}", it.kind, it.target))
}

/// From here on there is somebody to tell. A panic of the agent is the end of the machine: its
/// exit makes the kernel panic, and the host reads why in the log's last lines.
fn start_log() -> Result<(), Failure> {
    let device = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .step(|| "open /dev/kmsg")?;
    kmsg::start(device);
    panic::set_hook(Box::new(|panic| fail(&format!("{panic}"))));
    Ok(())
}

fn limits() -> Result<(), Failure> {
    let limit = |most| Rlimit {
        current: most,
        maximum: most,
    };
    setrlimit(Resource::Nofile, limit(Some(OPEN_FILES)))
        .step(|| format!("allow {OPEN_FILES} open files"))?;
    setrlimit(Resource::Nproc, limit(None)).step(|| "lift the limit of processes")?;
    // The runner sets its own for every process of a container: it is never inherited.
    fs::write("/proc/self/oom_score_adj", "-1000").step(|| "exempt PID 1 from the OOM killer")
}

/// Whether the kernel's generator is seeded: `entropy_avail` is then the pool's size, 256 bits.
fn seeded() -> bool {
    fs::read_to_string("/proc/sys/kernel/random/entropy_avail")
        .is_ok_and(|bits| bits.trim().parse::<u32>().is_ok_and(|bits| bits >= 256))
}

/// Ends the machine as a failure: PID 1 exits, the kernel panics.
pub fn fail(why: &str) -> ! {
    log::error!("{why}");
    std::process::exit(101)
}

/// Resets the machine: the end that the host has been told of, or has brought about.
pub fn restart() -> ! {
    let error = reboot(RebootCommand::Restart);
    fail(&format!("reset the machine: {error:?}"))
}
