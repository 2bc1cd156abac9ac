//! The state of a host in all places where a pod could leave something.
//!
//! A test takes one before and one after; `Host::leaves_nothing` compares them. Zombies don't
//! count, since PID 1 of some hosts reaps late; kernel threads are the kernel's business.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::process::Process;

/// What exists, by place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint(BTreeMap<&'static str, BTreeSet<String>>);

impl Footprint {
    /// Looks everywhere. `containerd` is the directory of containerd's state.
    pub fn take(containerd: &Path) -> Self {
        let processes = Process::all();
        Self(BTreeMap::from([
            (
                "processes",
                processes
                    .iter()
                    .map(|process| format!("{} {}", process.pid, process.arguments.join(" ")))
                    .collect(),
            ),
            ("mounts", mounts(&processes)),
            ("cgroups", tree(Path::new("/sys/fs/cgroup"), true)),
            ("sockets", sockets()),
            ("links", names(Path::new("/sys/class/net"))),
            ("/run/kata-like", tree(Path::new("/run/kata-like"), false)),
            (
                "containerd's tasks",
                tree(
                    &containerd.join("state/io.containerd.runtime.v2.task"),
                    false,
                ),
            ),
            (
                "containerd's work",
                tree(
                    &containerd.join("root/io.containerd.runtime.v2.task"),
                    false,
                ),
            ),
            ("network namespaces", names(Path::new("/run/netns"))),
            ("BPF links", bpf_links()),
        ]))
    }

    /// What `later` has more or less; empty if they are equal.
    pub fn difference(&self, later: &Self) -> String {
        let mut text = String::new();
        for (place, before) in &self.0 {
            let after = &later.0[place];
            for (sign, left, right) in [("gone", before, after), ("left behind", after, before)] {
                for entry in left.difference(right) {
                    text.push_str(&format!("\n  {place}: {sign}: {entry}"));
                }
            }
        }
        text
    }
}

/// The mounts of every mount namespace that a process is in.
fn mounts(processes: &[Process]) -> BTreeSet<String> {
    let mut namespaces = BTreeMap::new();
    for process in processes {
        let link = fs::read_link(format!("/proc/{}/ns/mnt", process.pid));
        let Ok(namespace) = link else { continue };
        namespaces.entry(namespace).or_insert(process.pid);
    }
    let mut all = BTreeSet::new();
    for (namespace, pid) in namespaces {
        let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        for line in table.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let kind = line.split_once(" - ").map_or("", |(_, rest)| rest);
            let place = fields.get(4).copied().unwrap_or_default();
            let id = fields.first().copied().unwrap_or_default();
            all.insert(format!("{} {id} {place} ({kind})", namespace.display()));
        }
    }
    all
}

/// Bound UNIX sockets, including those in the abstract namespace.
fn sockets() -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7))
        .map(str::to_owned)
        .collect()
}

fn names(directory: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return BTreeSet::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// The numbers of BPF links, by which programs are attached.
fn bpf_links() -> BTreeSet<String> {
    const BPF_LINK_GET_NEXT_ID: libc::c_long = 31;
    /// `union bpf_attr` of that command.
    #[repr(C)]
    struct Next {
        after: u32,
        next: u32,
        flags: u32,
    }
    let mut all = BTreeSet::new();
    let mut ask = Next {
        after: 0,
        next: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads and writes `ask`, of the size that it is told; it lives.
    while unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_GET_NEXT_ID,
            std::ptr::from_mut(&mut ask),
            size_of::<Next>(),
        )
    } == 0
    {
        all.insert(ask.next.to_string());
        ask.after = ask.next;
    }
    all
}

/// Everything below a directory, links not followed.
fn tree(root: &Path, directories_only: bool) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(directory) = open.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_directory {
                open.push(entry.path());
            }
            if is_directory || !directories_only {
                found.insert(entry.path().display().to_string());
            }
        }
    }
    found
}
