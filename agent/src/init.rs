//! Turns the kernel's bare initramfs into a machine that containers can run in, and ends it.
//!
//! Called by `main`, before any thread. The order matters. The root comes first: pivot_root(2) is
//! refused on the initramfs itself, and a runner needs it. `/dev` comes next: without it nobody
//! hears of a failure. From then on the root file system is read-only, with the agent's own program
//! on it, so a container can't write what it reaches of it through a runner's `/proc/PID/exe`.

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

/// A file system of the kernel's own, and its place.
struct Kernel {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: Option<&'static CStr>,
}

const NO_SUID: MountFlags = MountFlags::NOSUID;
const NO_EXEC: MountFlags = NO_SUID.union(MountFlags::NOEXEC);
const INERT: MountFlags = NO_EXEC.union(MountFlags::NODEV);

/// Mounted in this order, with the options of an ordinary systemd host.
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

/// What kubelet and the distributions set on a host of containers, and what keeps a container from
/// learning about the kernel that it shares with its pod, or from wearing it out.
///
/// What the kernel derives from the size of memory, or systemd raises, is as large as a large
/// host's: a container may ask for whatever it may ask for there, and the pod's memory bounds it.
const SYSCTLS: [(&str, &str); 28] = [
    ("fs/file-max", "9223372036854775807"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "1048576"),
    ("fs/nr_open", "1073741816"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/kptr_restrict", "2"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/pid_max", "4194304"),
    ("kernel/printk_devkmsg", "on"),
    ("kernel/threads-max", THREADS),
    ("kernel/unprivileged_bpf_disabled", "2"),
    ("net/core/bpf_jit_harden", "1"),
    ("net/ipv4/tcp_max_syn_backlog", "4096"),
    ("user/max_cgroup_namespaces", NAMESPACES),
    ("user/max_ipc_namespaces", NAMESPACES),
    ("user/max_mnt_namespaces", NAMESPACES),
    ("user/max_net_namespaces", NAMESPACES),
    ("user/max_pid_namespaces", NAMESPACES),
    ("user/max_time_namespaces", NAMESPACES),
    ("user/max_user_namespaces", NAMESPACES),
    ("user/max_uts_namespaces", NAMESPACES),
    // What a process has stored through a mapping is on the host after two seconds. No timer runs
    // while nothing is dirty.
    ("vm/dirty_expire_centisecs", "100"),
    ("vm/dirty_writeback_centisecs", "100"),
    ("vm/max_map_count", "1048576"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];

/// As many threads as there are pids.
const THREADS: &str = "4194304";
/// Of each kind: half as many as threads, which is the kernel's own rule (kernel/fork.c,
/// `fork_init`).
const NAMESPACES: &str = "2097152";
/// Pending signals of a user, by the same rule.
const SIGNALS: u64 = 2_097_152;

/// The agent's own limit of open files: five for each process of a container, and more.
const OPEN_FILES: u64 = 1 << 20;

/// Makes an ordinary Linux machine of what the kernel has started.
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
    // All that a container needs comes first. A missing key here is only worth a line in the log.
    for (key, value) in SYSCTLS {
        // Some handlers count the newline (kernel/printk/printk.c, devkmsg_sysctl_set_loglvl).
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

/// Binds the root onto itself and enters it, so that it has a parent and can be pivoted away from.
/// Then makes it read-only.
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

/// Begins the log. A panic of the agent ends the machine: PID 1 exits, the kernel panics, and the
/// host reads the reason in the log's last lines.
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
    setrlimit(Resource::Sigpending, limit(Some(SIGNALS)))
        .step(|| format!("allow {SIGNALS} pending signals"))?;
    // No process inherits it: the runner sets a score for each.
    fs::write("/proc/self/oom_score_adj", "-1000").step(|| "exempt PID 1 from the OOM killer")
}

/// Whether the kernel's generator is seeded. `entropy_avail` is then the size of the pool, 256
/// bits.
fn seeded() -> bool {
    fs::read_to_string("/proc/sys/kernel/random/entropy_avail")
        .is_ok_and(|bits| bits.trim().parse::<u32>().is_ok_and(|bits| bits >= 256))
}

/// Ends the machine as a failure: PID 1 exits and the kernel panics.
pub fn fail(why: &str) -> ! {
    log::error!("{why}");
    std::process::exit(101)
}

/// Resets the machine: an end that the host knows of.
pub fn restart() -> ! {
    let error = reboot(RebootCommand::Restart);
    fail(&format!("reset the machine: {error:?}"))
}
