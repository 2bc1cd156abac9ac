//! The places around the process: mounts, devices, files, sysctls and the cgroup.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde_json::{Map, Value, json};

use crate::process::text;
use crate::{error_name, last_error};

/// Paths that runtimes hide or protect, and those that the cases mount on or look into.
const PATHS: [&str; 51] = [
    "/",
    "/bin",
    "/data",
    "/data/below",
    "/data/file",
    "/dev",
    "/dev/core",
    "/dev/mqueue",
    "/dev/pts",
    "/dev/shm",
    "/etc",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/link",
    "/etc/passwd",
    "/etc/resolv.conf",
    "/etc/secret",
    "/home",
    "/made",
    "/made/by",
    "/made/by/the",
    "/made/by/the/mount",
    "/media",
    "/mnt",
    "/mnt/below",
    "/mnt/file",
    "/opt",
    "/proc/acpi",
    "/proc/asound",
    "/proc/bus",
    "/proc/fs",
    "/proc/interrupts",
    "/proc/irq",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/sys",
    "/proc/sys/kernel",
    "/proc/sysrq-trigger",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/run",
    "/srv",
    "/sys",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/cgroup",
    "/tmp",
    "/var",
];

/// Sysctls that a namespace of the container holds, and some that are the machine's own.
const SYSCTLS: [&str; 19] = [
    "kernel/domainname",
    "kernel/hostname",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shm_rmid_forced",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "fs/mqueue/msg_default",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/queues_max",
    "net/core/somaxconn",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_unprivileged_port_start",
    "net/ipv4/ping_group_range",
];

/// Files of the cgroup that hold limits.
const LIMITS: [&str; 26] = [
    "cgroup.controllers",
    "cgroup.freeze",
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cgroup.subtree_control",
    "cgroup.type",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.weight",
    "cpuset.cpus",
    "cpuset.mems",
    "hugetlb.2MB.max",
    "io.max",
    "io.weight",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.oom.group",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "pids.max",
    "rdma.max",
    "misc.max",
];

/// All of it.
pub fn report() -> Value {
    json!({
        "mounts": mounts(),
        "devices": tree("/dev"),
        "files": PATHS.iter().map(|path| ((*path).to_owned(), place(path))).collect::<Map<_, _>>(),
        "sysctls": SYSCTLS.iter()
            .map(|name| ((*name).to_owned(), words(text(&format!("/proc/sys/{name}")))))
            .collect::<Map<_, _>>(),
        "cgroup": LIMITS.iter()
            .map(|name| ((*name).to_owned(), text(&format!("/sys/fs/cgroup/{name}"))))
            .collect::<Map<_, _>>(),
        "hooks": hooks(),
        "interfaces": interfaces(),
    })
}

/// The network's, but not what they are.
fn interfaces() -> Value {
    let Value::String(table) = text("/proc/self/net/dev") else {
        return text("/proc/self/net/dev");
    };
    let rows = table.lines().filter_map(|line| line.split_once(':'));
    rows.map(|(name, _)| name.trim()).collect()
}

fn words(value: Value) -> Value {
    match value {
        Value::String(text) => text.split_whitespace().collect::<Vec<_>>().join(" ").into(),
        other => other,
    }
}

/// The names in a directory, in order.
pub fn names(path: &str) -> Value {
    match fs::read_dir(path) {
        Err(error) => error_name(&error).into(),
        Ok(entries) => {
            let names = entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned());
            let mut names: Vec<_> = names.collect();
            names.sort();
            names.into()
        }
    }
}

/// Each mount by its place; the second on the same place as `PLACE (2)`.
fn mounts() -> Value {
    let Ok(table) = fs::read_to_string("/proc/self/mountinfo") else {
        return text("/proc/self/mountinfo");
    };
    let mut all: Map<String, Value> = Map::new();
    for line in table.lines() {
        let Some((first, second)) = line.split_once(" - ") else {
            continue;
        };
        let (first, second): (Vec<_>, Vec<_>) =
            (first.split(' ').collect(), second.split(' ').collect());
        let ([_, _, _, root, place, options, tags @ ..], [kind, source, own]) =
            (&first[..], &second[..])
        else {
            continue;
        };
        let tags: Vec<_> = tags
            .iter()
            .map(|tag| tag.split(':').next().unwrap_or_default())
            .collect();
        let value = json!({
            "root": root, "options": sorted(options), "propagation": tags,
            "type": kind, "source": source, "file system": sorted(own),
        });
        let mut name = (*place).to_owned();
        let mut number = 1;
        while all.contains_key(&name) {
            number += 1;
            name = format!("{place} ({number})");
        }
        all.insert(name, value);
    }
    all.into()
}

fn sorted(options: &str) -> String {
    let mut options: Vec<_> = options.split(',').collect();
    options.sort_unstable();
    options.join(",")
}

/// Everything below a directory, two levels deep.
fn tree(path: &str) -> Value {
    let mut all = BTreeMap::new();
    let mut open = vec![(path.to_owned(), 0)];
    while let Some((directory, depth)) = open.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = format!("{directory}/{}", entry.file_name().to_string_lossy());
            if depth < 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push((path.clone(), depth + 1));
            }
            all.insert(path.clone(), node(&path));
        }
    }
    json!(all)
}

/// What kind of file it is, whose, and where it leads.
fn node(path: &str) -> Value {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) => return error_name(&error).into(),
    };
    let kind = found.file_type();
    let what = if kind.is_symlink() {
        let target = fs::read_link(path).unwrap_or_default();
        return format!(
            "link to {} of {}:{}",
            target.display(),
            found.uid(),
            found.gid()
        )
        .into();
    } else if kind.is_dir() {
        "directory".into()
    } else if kind.is_file() {
        "file".into()
    } else if kind.is_fifo() {
        "fifo".into()
    } else if kind.is_socket() {
        "socket".into()
    } else {
        let letter = if kind.is_char_device() { 'c' } else { 'b' };
        format!(
            "{letter} {}:{}",
            libc::major(found.rdev()),
            libc::minor(found.rdev())
        )
    };
    format!(
        "{what} {:o} of {}:{}",
        found.mode() & 0o7777,
        found.uid(),
        found.gid()
    )
    .into()
}

/// A path, and what comes of reading it and of writing to it.
fn place(path: &str) -> Value {
    let node = node(path);
    if node == "ENOENT" || node == "ENOTDIR" {
        return node;
    }
    let is_directory = fs::metadata(path).is_ok_and(|found| found.is_dir());
    let read = if is_directory {
        match names(path) {
            Value::Array(names) if names.is_empty() => "empty".into(),
            Value::Array(_) => "names".into(),
            other => other,
        }
    } else {
        content(path)
    };
    let written = if is_directory {
        create_in(path)
    } else {
        open_to_write(path)
    };
    json!({"is": node, "read": read, "write": written})
}

/// The text of a small file of the container's own; of the kernel's only whether there is any.
fn content(path: &str) -> Value {
    if path.starts_with("/etc/") || path.starts_with("/data/") || path.starts_with("/mnt/") {
        return text(path);
    }
    let mut byte = [0; 1];
    let read = fs::File::open(path).and_then(|mut file| std::io::Read::read(&mut file, &mut byte));
    match read {
        Ok(0) => "empty".into(),
        Ok(_) => "something".into(),
        Err(error) => error_name(&error).into(),
    }
}

fn create_in(path: &str) -> Value {
    let name = format!("{path}/probe.{}", std::process::id());
    match fs::create_dir(&name) {
        Ok(()) => {
            let _ = fs::remove_dir(&name);
            "created".into()
        }
        Err(error) => error_name(&error).into(),
    }
}

fn open_to_write(path: &str) -> Value {
    let Ok(path) = CString::new(path) else {
        return Value::Null;
    };
    // SAFETY: the path is a C string that outlives the call.
    let file = unsafe {
        libc::open(
            path.as_ptr(),
            libc::O_WRONLY | libc::O_NONBLOCK | libc::O_CLOEXEC,
        )
    };
    if file < 0 {
        return last_error().into();
    }
    // SAFETY: it has just been opened, and nobody else knows it.
    unsafe { libc::close(file) };
    "opened".into()
}

/// What the hooks have kept.
fn hooks() -> Value {
    let entries = fs::read_dir("/tmp").into_iter().flatten().flatten();
    let kept = entries.filter_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        // Nothing else is read: an image may have put anything there.
        let kept = name
            .starts_with("hook-")
            .then(|| fs::read(entry.path()).ok())??;
        Some((name, serde_json::from_slice(&kept).unwrap_or(Value::Null)))
    });
    kept.collect::<Map<_, _>>().into()
}
