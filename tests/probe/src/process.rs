//! The process itself: who it is, what it may do, what it was given.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs;
use std::os::fd::AsRawFd;

use serde_json::{Map, Value, json};

use crate::{error_name, last_error};

/// All of it.
pub fn report() -> Value {
    json!({
        "status": status(),
        "limits": limits(),
        "args": std::env::args().collect::<Vec<_>>(),
        "env": std::env::vars_os()
            .map(|(key, value)| format!("{}={}", key.to_string_lossy(), value.to_string_lossy()))
            .collect::<Vec<_>>(),
        "cwd": std::env::current_dir().map_err(|error| error_name(&error)).unwrap_or_else(Into::into),
        "hostname": host_name(),
        "domainname": names_of_host().1,
        "oom_score_adj": text("/proc/self/oom_score_adj"),
        "coredump_filter": text("/proc/self/coredump_filter"),
        "uid_map": table("/proc/self/uid_map"),
        "gid_map": table("/proc/self/gid_map"),
        "setgroups": text("/proc/self/setgroups"),
        "time_offsets": table("/proc/self/timens_offsets"),
        "cgroup": text("/proc/self/cgroup"),
        "namespaces": namespaces(),
        "scheduling": scheduling(),
        "modes": modes(),
        "session": session(),
        "files": open_files(),
        "terminal": terminal(),
        "keyring": keyring(),
        "pids": pids(),
    })
}

/// A file's text without surrounding white space, or the error's name.
pub fn text(path: &str) -> Value {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).trim().into(),
        Err(error) => error_name(&error).into(),
    }
}

/// A file's lines, with one space between columns.
fn table(path: &str) -> Value {
    let Value::String(text) = text(path) else {
        return Value::Null;
    };
    let line = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text.lines().map(line).collect()
}

/// Users, groups, capabilities, signals and confinement, as the kernel prints them.
pub fn status() -> Value {
    const WANTED: [&str; 20] = [
        "Name",
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "Threads",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "ShdPnd",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "NStgid",
        "CoreDumping",
        "Seccomp_filters",
    ];
    let Value::String(status) = text("/proc/self/status") else {
        return Value::Null;
    };
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    let wanted = lines.filter(|(name, _)| WANTED.contains(name));
    wanted
        .map(|(name, value)| {
            let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
            // A process of a shared PID namespace has one number among many.
            let value = if name == "NStgid" && value != "1" {
                "many".into()
            } else {
                value
            };
            (name.to_owned(), Value::from(value))
        })
        .collect::<Map<_, _>>()
        .into()
}

fn limits() -> Value {
    const NAMES: [&str; 16] = [
        "cpu",
        "fsize",
        "data",
        "stack",
        "core",
        "rss",
        "nproc",
        "nofile",
        "memlock",
        "as",
        "locks",
        "sigpending",
        "msgqueue",
        "nice",
        "rtprio",
        "rttime",
    ];
    let all = (0..).zip(NAMES).map(|(number, name)| {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the kernel writes one rlimit to the live structure.
        let value = match unsafe { libc::getrlimit(number, &mut limit) } {
            0 => format!(
                "{} {}",
                unlimited(limit.rlim_cur),
                unlimited(limit.rlim_max)
            ),
            _ => last_error(),
        };
        (name.to_owned(), value.into())
    });
    all.collect::<Map<_, _>>().into()
}

fn unlimited(value: u64) -> String {
    if value == libc::RLIM_INFINITY {
        "unlimited".into()
    } else {
        value.to_string()
    }
}

/// The host's name.
pub fn host_name() -> String {
    names_of_host().0
}

fn names_of_host() -> (String, String) {
    // SAFETY: plain bytes, for which all zero is valid.
    let mut names: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the live structure.
    unsafe { libc::uname(&mut names) };
    let text = |name: &[libc::c_char]| {
        // SAFETY: the kernel ends each name with a zero byte, within its array, which is live.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        name.to_string_lossy().into_owned()
    };
    (text(&names.nodename), text(&names.domainname))
}

/// For each kind: whether it is the machine's first one, and whether it is that of PID 1.
fn namespaces() -> Value {
    // PROC_USER_INIT_INO and its like (linux/proc_ns.h); mnt and net have no fixed number.
    const FIRST: [(&str, &str); 6] = [
        ("ipc", "ipc:[4026531839]"),
        ("uts", "uts:[4026531838]"),
        ("user", "user:[4026531837]"),
        ("pid", "pid:[4026531836]"),
        ("cgroup", "cgroup:[4026531835]"),
        ("time", "time:[4026531834]"),
    ];
    let link = |pid: &str, kind: &str| {
        fs::read_link(format!("/proc/{pid}/ns/{kind}"))
            .map(|link| link.to_string_lossy().into_owned())
            .unwrap_or_else(|error| error_name(&error))
    };
    let mut all = Map::new();
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"] {
        let (own, first) = (link("self", kind), link("1", kind));
        let known = FIRST.iter().any(|(_, number)| *number == own);
        let which = match own.contains('[') {
            true if known => "the machine's",
            true => "another",
            false => own.as_str(),
        };
        let same = if own == first {
            "of PID 1"
        } else {
            "not of PID 1"
        };
        all.insert(kind.into(), format!("{which}, {same}").into());
    }
    all.into()
}

fn scheduling() -> Value {
    let mut parameter = libc::sched_param { sched_priority: -1 };
    // SAFETY: each call takes integers, or a structure that is live and is filled or only read.
    unsafe {
        let policy = libc::sched_getscheduler(0);
        libc::sched_getparam(0, &mut parameter);
        *libc::__errno_location() = 0;
        let nice = libc::getpriority(libc::PRIO_PROCESS, 0);
        let io = libc::syscall(libc::SYS_ioprio_get, 1, 0);
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        let online = libc::sysconf(libc::_SC_NPROCESSORS_ONLN);
        json!({
            "policy": policy,
            "priority": parameter.sched_priority,
            "nice": nice,
            "io": if io < 0 { last_error().into() } else { Value::from(io) },
            "all CPUs": libc::c_long::from(libc::CPU_COUNT(&set)) == online,
            "timer slack": libc::prctl(libc::PR_GET_TIMERSLACK),
        })
    }
}

fn modes() -> Value {
    // SAFETY: integers, or the address of one that is live.
    unsafe {
        let mut death = -1;
        libc::prctl(libc::PR_GET_PDEATHSIG, &mut death);
        let mut reaper = -1;
        libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &mut reaper);
        json!({
            "personality": libc::personality(0xffff_ffff),
            "dumpable": libc::prctl(libc::PR_GET_DUMPABLE),
            "keeps capabilities": libc::prctl(libc::PR_GET_KEEPCAPS),
            "secure bits": libc::prctl(libc::PR_GET_SECUREBITS),
            "no large pages": libc::prctl(libc::PR_GET_THP_DISABLE),
            "signal at the parent's death": death,
            "reaps": reaper,
        })
    }
}

fn session() -> Value {
    // SAFETY: integers only.
    unsafe {
        let pid = libc::getpid();
        json!({
            "is PID 1": pid == 1,
            "leads its session": libc::getsid(0) == pid,
            "leads its group": libc::getpgrp() == pid,
            "has a parent": libc::getppid() != 0,
        })
    }
}

/// The open files, except the one that lists them: what each is, and whether it can be read and
/// written.
fn open_files() -> Value {
    let mut all = BTreeMap::new();
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return text("/proc/self/fd");
    };
    let numbers: Vec<i32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for number in numbers {
        // SAFETY: plain numbers, for which all zero is valid.
        let mut status: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the live structure; a closed number is an error.
        if unsafe { libc::fstat(number, &mut status) } != 0 {
            continue; // The directory that was read.
        }
        // SAFETY: integers only.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFL) };
        let kind = match status.st_mode & libc::S_IFMT {
            libc::S_IFIFO => "pipe",
            libc::S_IFCHR => "character device",
            libc::S_IFREG => "file",
            libc::S_IFSOCK => "socket",
            libc::S_IFDIR => "directory",
            _ => "another",
        };
        // How /dev/null was opened for an unwanted stream says nothing.
        let access = match kind {
            "character device" => None,
            _ => ["read", "write", "both"].get((flags & libc::O_ACCMODE) as usize),
        };
        all.insert(
            number.to_string(),
            json!({"kind": kind, "access": access, "owner": status.st_uid,
                   "number": if kind == "character device" { status.st_rdev } else { 0 }}),
        );
    }
    json!(all)
}

fn terminal() -> Value {
    // SAFETY: integers only.
    let (is, group) = unsafe {
        let is: Vec<bool> = (0..3).map(|number| libc::isatty(number) == 1).collect();
        (is, libc::tcgetpgrp(0) == libc::getpgrp())
    };
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/tty");
    json!({
        "is": is,
        "in the foreground": group,
        "size": terminal_size(),
        "/dev/tty": opened.map(|_| "opened".to_owned()).unwrap_or_else(|error| error_name(&error)),
        "name": if is_terminal() { fs::read_link("/proc/self/fd/0").ok() } else { None },
    })
}

fn is_terminal() -> bool {
    // SAFETY: an integer only.
    unsafe { libc::isatty(0) == 1 }
}

/// Columns and rows of the controlling terminal.
pub fn terminal_size() -> Value {
    let Ok(file) = fs::File::open("/dev/tty") else {
        return Value::Null;
    };
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel fills the structure, which is live, as is the file.
    unsafe { libc::ioctl(file.as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    json!([size.ws_col, size.ws_row])
}

/// The session keyring, without its number and the container's name.
fn keyring() -> Value {
    let mut described = [0u8; 256];
    // SAFETY: the kernel writes at most the length that is passed to the live buffer.
    let length = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_DESCRIBE,
            libc::KEY_SPEC_SESSION_KEYRING,
            described.as_mut_ptr(),
            described.len(),
        )
    };
    let Ok(length) = usize::try_from(length) else {
        return last_error().into();
    };
    let text = String::from_utf8_lossy(&described[..length.min(described.len())]).into_owned();
    let text = text.trim_end_matches('\0');
    match text.rsplit_once(';') {
        Some((rest, name)) if name.starts_with("_ses.") => format!("{rest};_ses.NAME").into(),
        _ => text.into(),
    }
}

fn pids() -> Value {
    let own = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    json!({
        "many": own.count() > 1,
        "/proc/1/root": fs::read_link("/proc/1/root").map_err(|error| error_name(&error)).unwrap_or_else(Into::into),
        "/proc/1/environ": fs::read("/proc/1/environ").map(|_| "read".into()).unwrap_or_else(|error| error_name(&error)),
        "/proc/1/comm": text("/proc/1/comm"),
    })
}
