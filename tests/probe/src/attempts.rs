//! What the process tries to do, and with which result. Children make the attempts, as few children
//! as possible: under emulation a fork is expensive.

use std::ffi::{CStr, c_int, c_long, c_void};
use std::os::fd::RawFd;
use std::ptr::{null, null_mut};

use serde_json::{Map, Value};

use crate::{error_name, last_error};

/// Device numbers for which nodes are made and opened: (block, major, minor).
const DEVICES: [(bool, u32, u32); 22] = [
    (false, 1, 1),
    (false, 1, 2),
    (false, 1, 3),
    (false, 1, 4),
    (false, 1, 5),
    (false, 1, 7),
    (false, 1, 8),
    (false, 1, 9),
    (false, 1, 11),
    (false, 4, 64),
    (false, 5, 0),
    (false, 5, 1),
    (false, 5, 2),
    (false, 10, 200),
    (false, 10, 229),
    (false, 10, 232),
    (false, 10, 236),
    (false, 136, 0),
    (true, 7, 0),
    (true, 8, 0),
    (true, 253, 0),
    (true, 259, 0),
];

/// A name and an attempt; a negative result is a failure with errno.
type Attempt = (&'static str, fn() -> c_long);

/// A system call with integers and live addresses.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        // SAFETY: each address among the arguments below is that of a C string or of a live value,
        // or null, which the kernel refuses with an error.
        unsafe { libc::syscall(libc::$number $(, $argument)*) }
    };
}

/// Attempts that change their process if they succeed.
const LASTING: &[Attempt] = &[
    ("mount tmpfs", || mount(c"tmpfs", c"/tmp", c"tmpfs", 0)),
    ("mount proc", || mount(c"proc", c"/tmp", c"proc", 0)),
    ("mount sysfs", || mount(c"sysfs", c"/tmp", c"sysfs", 0)),
    ("mount cgroup2", || {
        mount(c"cgroup2", c"/tmp", c"cgroup2", 0)
    }),
    ("bind /", || mount(c"/", c"/tmp", c"", libc::MS_BIND)),
    ("remount / to write", || {
        mount(c"", c"/", c"", libc::MS_BIND | libc::MS_REMOUNT)
    }),
    ("remount /sys to write", || {
        mount(c"", c"/sys", c"", libc::MS_BIND | libc::MS_REMOUNT)
    }),
    ("make / shared", || mount(c"", c"/", c"", libc::MS_SHARED)),
    ("unmount /proc", || {
        call!(SYS_umount2, c"/proc".as_ptr(), libc::MNT_DETACH)
    }),
    ("unmount /data", || {
        call!(SYS_umount2, c"/data".as_ptr(), libc::MNT_DETACH)
    }),
    ("unshare mounts", || call!(SYS_unshare, libc::CLONE_NEWNS)),
    ("unshare users", || call!(SYS_unshare, libc::CLONE_NEWUSER)),
    ("unshare names", || call!(SYS_unshare, libc::CLONE_NEWUTS)),
    ("unshare network", || call!(SYS_unshare, libc::CLONE_NEWNET)),
    ("join own names", || {
        with_file(c"/proc/self/ns/uts", |file| call!(SYS_setns, file, 0))
    }),
    ("join the mounts of PID 1", || {
        with_file(c"/proc/1/ns/mnt", |file| call!(SYS_setns, file, 0))
    }),
    ("trace the parent", || {
        call!(SYS_ptrace, libc::PTRACE_SEIZE, libc::getppid(), 0, 0)
    }),
    ("be traced", || {
        call!(SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0)
    }),
    ("change the root", || call!(SYS_chroot, c"/".as_ptr())),
    ("pivot the root", || {
        call!(SYS_pivot_root, c"/".as_ptr(), c"/tmp".as_ptr())
    }),
    ("become user 12345", || call!(SYS_setuid, 12345)),
    ("become user 0", || call!(SYS_setuid, 0)),
    ("become group 12345", || call!(SYS_setgid, 12345)),
    ("have no groups", || {
        call!(SYS_setgroups, 0, null::<c_void>())
    }),
    ("leave the cgroup", || {
        write(c"/sys/fs/cgroup/cgroup.procs", b"0")
    }),
    ("raise the own limits", || {
        write(c"/sys/fs/cgroup/pids.max", b"max")
    }),
    ("protect from the OOM killer", || {
        write(c"/proc/self/oom_score_adj", b"-1000")
    }),
    ("more open files", || limit(libc::RLIMIT_NOFILE)),
    ("be nicer", || {
        call!(SYS_setpriority, libc::PRIO_PROCESS, 0, 10)
    }),
    ("be less nice", || {
        call!(SYS_setpriority, libc::PRIO_PROCESS, 0, -10)
    }),
    ("run in real time", || {
        let parameter = libc::sched_param { sched_priority: 1 };
        call!(
            SYS_sched_setscheduler,
            0,
            libc::SCHED_FIFO,
            &raw const parameter
        )
    }),
    ("lock memory", || call!(SYS_mlockall, libc::MCL_CURRENT)),
    ("be another personality", || {
        call!(SYS_personality, 8).min(0)
    }),
];

/// Attempts that leave nothing.
const PASSING: &[Attempt] = &[
    ("kill PID 1 with 0", || call!(SYS_kill, 1, 0)),
    ("name the host", || call!(SYS_sethostname, c"".as_ptr(), 0)),
    ("give a file away", || {
        make(c"/tmp/probe-given", || {
            call!(SYS_chown, c"/tmp/probe-given".as_ptr(), 12345, 12345)
        })
    }),
    ("set the user's id on a file", || {
        make(c"/tmp/probe-suid", || {
            call!(SYS_chmod, c"/tmp/probe-suid".as_ptr(), 0o4755)
        })
    }),
    ("make a fifo", || node(c"/tmp/probe-fifo", libc::S_IFIFO, 0)),
    ("make a device in the root", || {
        node(c"/tmp/probe-null", libc::S_IFCHR, libc::makedev(1, 3))
    }),
    ("make a link in /proc", || {
        call!(SYS_symlink, c"x".as_ptr(), c"/proc/probe".as_ptr())
    }),
    ("write to the root", || make(c"/probe-made", || 0)),
    ("write to /etc", || make(c"/etc/probe-made", || 0)),
    ("write to /tmp", || make(c"/tmp/probe-made", || 0)),
    ("write to /dev", || make(c"/dev/probe-made", || 0)),
    ("write to /dev/shm", || make(c"/dev/shm/probe-made", || 0)),
    ("write to /run", || make(c"/run/probe-made", || 0)),
    ("write to /data", || make(c"/data/probe-made", || 0)),
    ("run a program in /dev/shm", || {
        run_copy(c"/dev/shm/probe-run")
    }),
    ("run a program in /tmp", || run_copy(c"/tmp/probe-run")),
    ("run a program in /data", || run_copy(c"/data/probe-run")),
    ("write a sysctl of the names", || {
        write(c"/proc/sys/kernel/hostname", b"")
    }),
    ("write a sysctl of ipc", || {
        write(c"/proc/sys/kernel/msgmax", b"8192")
    }),
    ("write a sysctl of the network", || {
        write(c"/proc/sys/net/ipv4/ip_forward", b"0")
    }),
    ("write a sysctl of the machine", || {
        write(c"/proc/sys/vm/swappiness", b"60")
    }),
    ("write to the cgroup", || {
        call!(SYS_mkdir, c"/sys/fs/cgroup/probe".as_ptr(), 0o755).min(0)
    }),
    ("use a low port", || bind_port(1..1024)),
    ("use a high port", || bind_port(1024..30000)),
    ("open a raw socket", || {
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
    }),
    ("open a packet socket", || {
        socket(libc::AF_PACKET, libc::SOCK_RAW, 0)
    }),
    ("open a netlink socket", || {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)
    }),
    ("read a key", || {
        call!(
            SYS_keyctl,
            libc::KEYCTL_GET_KEYRING_ID,
            libc::KEY_SPEC_SESSION_KEYRING,
            0
        )
        .min(0)
    }),
    ("add a key", || {
        call!(
            SYS_add_key,
            c"user".as_ptr(),
            c"probe".as_ptr(),
            c"x".as_ptr(),
            1,
            libc::KEY_SPEC_SESSION_KEYRING
        )
        .min(0)
    }),
    ("load a program", || {
        call!(SYS_bpf, 0xffff, null::<c_void>(), 0)
    }),
    ("count events", || {
        call!(SYS_perf_event_open, null::<c_void>(), 0, -1, -1, 0)
    }),
    ("handle page faults", || call!(SYS_userfaultfd, 0).min(0)),
    ("queue input and output", || {
        call!(SYS_io_uring_setup, 0, null::<c_void>())
    }),
    ("open by handle", || {
        call!(SYS_open_by_handle_at, -1, null::<c_void>(), 0)
    }),
    ("clone", || call!(SYS_clone3, null::<c_void>(), 0)),
    ("keep accounts", || {
        call!(SYS_acct, c"/no/such/file".as_ptr())
    }),
    ("swap", || call!(SYS_swapon, c"/no/such/file".as_ptr(), 0)),
    ("restart", || call!(SYS_reboot, 0, 0, 0, 0)),
    ("read the kernel's log", || {
        call!(SYS_syslog, 10, null::<c_void>(), 0).min(0)
    }),
    ("watch the file system", || {
        call!(SYS_fanotify_init, 0, 0).min(0)
    }),
];

/// Makes all attempts.
pub fn report() -> Value {
    let mut all = Map::new();
    for (attempts, lasting) in [(LASTING, true), (PASSING, false)] {
        let acts: Vec<_> = attempts
            .iter()
            .map(|(_, act)| *act as fn() -> c_long)
            .collect();
        let results = in_children(acts.len(), lasting, &|index| acts[index]());
        let names = attempts.iter().map(|(name, _)| (*name).to_owned());
        all.extend(names.zip(results.into_iter().map(Value::from)));
    }
    let results = in_children(DEVICES.len(), false, &|index| {
        let (block, major, minor) = DEVICES[index];
        device(block, libc::makedev(major, minor))
    });
    for ((block, major, minor), result) in DEVICES.into_iter().zip(results) {
        let letter = if block { 'b' } else { 'c' };
        // Which drivers exist is the kernel's business; a refusal counts as one.
        let result = match result.as_str() {
            "EPERM" => "refused when made",
            "EACCES" => "refused when opened",
            "done" | "ENXIO" | "ENODEV" | "EBUSY" | "EIO" => "allowed",
            other => other,
        };
        all.insert(format!("device {letter} {major}:{minor}"), result.into());
    }
    all.into()
}

/// The result of an attempt that no child has made yet.
const NOT_MADE: c_int = -1;

/// Makes `count` attempts in children. A child goes on until an attempt has changed it or killed
/// it.
fn in_children(count: usize, lasting: bool, act: &dyn Fn(usize) -> c_long) -> Vec<String> {
    let length = count * size_of::<c_int>();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let shared = unsafe {
        libc::mmap(
            null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if shared == libc::MAP_FAILED {
        return vec![format!("no memory: {}", last_error()); count];
    }
    // SAFETY: the mapping has this length, is aligned to a page, and lives until the process ends.
    // A child writes to it only while this process waits for that child.
    let results = unsafe { std::slice::from_raw_parts_mut(shared.cast::<c_int>(), count) };
    results.fill(NOT_MADE);
    let mut told = Vec::new();
    while told.len() < count {
        // SAFETY: there is one thread, so the child's copy holds no lock of another one.
        let child = unsafe { libc::fork() };
        if child < 0 {
            told.push(format!("no child: {}", last_error()));
            continue;
        }
        if child == 0 {
            for (index, result) in results.iter_mut().enumerate().skip(told.len()) {
                let failed = act(index) < 0;
                let error = std::io::Error::last_os_error().raw_os_error();
                *result = if failed { error.unwrap_or(0) } else { 0 };
                if lasting && !failed {
                    break;
                }
            }
            // SAFETY: an integer only.
            unsafe { libc::_exit(0) }
        }
        let mut status = 0;
        // SAFETY: the kernel writes to the live integer.
        unsafe { libc::waitpid(child, &mut status, 0) };
        let made = results
            .iter()
            .skip(told.len())
            .take_while(|result| **result != NOT_MADE);
        let made: Vec<_> = made.map(|error| name(*error)).collect();
        let none = made.is_empty();
        told.extend(made);
        if libc::WIFSIGNALED(status) && told.len() < count {
            told.push(format!("killed by signal {}", libc::WTERMSIG(status)));
        } else if none {
            told.push("lost".into());
        }
    }
    told
}

fn name(error: c_int) -> String {
    match error {
        0 => "done".into(),
        error => error_name(&std::io::Error::from_raw_os_error(error)),
    }
}

fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: libc::c_ulong) -> c_long {
    call!(
        SYS_mount,
        source.as_ptr(),
        target.as_ptr(),
        kind.as_ptr(),
        flags,
        null::<c_void>()
    )
}

fn open(path: &CStr, flags: c_int) -> c_long {
    call!(
        SYS_openat,
        libc::AT_FDCWD,
        path.as_ptr(),
        flags | libc::O_CLOEXEC,
        0o700
    )
}

fn with_file(path: &CStr, act: fn(RawFd) -> c_long) -> c_long {
    match open(path, libc::O_RDONLY) {
        ..0 => -1,
        file => act(file as RawFd),
    }
}

/// Makes a file, runs `act` on it, and removes it.
fn make(path: &CStr, act: fn() -> c_long) -> c_long {
    if open(path, libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY) < 0 {
        return -1;
    }
    keep_error(act, path)
}

/// The result and the error of `act`; the file is removed afterwards.
fn keep_error(act: impl Fn() -> c_long, path: &CStr) -> c_long {
    let result = act();
    let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    call!(SYS_unlink, path.as_ptr());
    // SAFETY: the address of this thread's own errno.
    unsafe { *libc::__errno_location() = error };
    result
}

fn node(path: &CStr, kind: libc::mode_t, number: libc::dev_t) -> c_long {
    keep_error(
        || {
            call!(
                SYS_mknodat,
                libc::AT_FDCWD,
                path.as_ptr(),
                kind | 0o600,
                number
            )
        },
        path,
    )
}

/// EPERM: the node was not made. EACCES: it was made, but opening it was denied.
fn device(block: bool, number: libc::dev_t) -> c_long {
    let path = c"/dev/probe-device";
    let kind = if block { libc::S_IFBLK } else { libc::S_IFCHR };
    if call!(
        SYS_mknodat,
        libc::AT_FDCWD,
        path.as_ptr(),
        kind | 0o600,
        number
    ) < 0
    {
        return -1;
    }
    let result = keep_error(
        || open(path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY),
        path,
    );
    if result < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM) {
        // SAFETY: the address of this thread's own errno.
        unsafe { *libc::__errno_location() = libc::EACCES };
    }
    result
}

fn write(path: &CStr, bytes: &[u8]) -> c_long {
    let file = open(path, libc::O_WRONLY);
    if file < 0 || bytes.is_empty() {
        return file.min(0);
    }
    call!(SYS_write, file, bytes.as_ptr(), bytes.len())
}

/// Copies a script without an interpreter to `path` and runs it: ENOEXEC if the mount allows
/// programs, else EACCES.
fn run_copy(path: &CStr) -> c_long {
    let file = open(path, libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY);
    if file < 0 {
        return -1;
    }
    call!(SYS_close, file);
    keep_error(
        || {
            call!(
                SYS_execve,
                path.as_ptr(),
                null::<c_void>(),
                null::<c_void>()
            )
        },
        path,
    )
}

fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_long {
    call!(SYS_socket, family, kind, protocol).min(0)
}

/// Binds any free port of the range: other containers of the pod try at the same time.
fn bind_port(ports: std::ops::Range<u16>) -> c_long {
    let socket = call!(SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0);
    let mut result = -1;
    for port in ports {
        let address = libc::sockaddr_in {
            sin_family: libc::AF_INET as u16,
            sin_port: port.to_be(),
            sin_addr: libc::in_addr { s_addr: 0 },
            sin_zero: [0; 8],
        };
        result = call!(
            SYS_bind,
            socket,
            &raw const address,
            size_of::<libc::sockaddr_in>()
        );
        if result == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::EADDRINUSE) {
            break;
        }
    }
    result
}

fn limit(resource: libc::__rlimit_resource_t) -> c_long {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    call!(SYS_prlimit64, 0, resource, null::<c_void>(), &raw mut limit);
    limit.rlim_max += 1;
    call!(
        SYS_prlimit64,
        0,
        resource,
        &raw const limit,
        null_mut::<c_void>()
    )
}
