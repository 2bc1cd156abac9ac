//! The host's limits of a pod: what shim, VMM, fs server and stand-ins may use together.
//!
//! Called by `pod` before the VMM is born. The limit is set on the cgroup of the sandbox's own
//! container, which holds all of them: their leaf can have none of its own, for the stand-in beside
//! it rules controllers out there (cgroup-v2.rst, "No Internal Process Constraint"). A container's
//! limits are the guest's to apply, never the host's: the VM as a whole is what the host sees.
//!
//! The memory limit is the guest's memory and [`overhead`]. All of the first may be used, and the
//! second has room for the rest, so that in ordinary use nothing of the pod is killed. What exceeds
//! it takes the whole pod at once and not some part of it: a runaway helper, or files on a tmpfs of
//! the host, which count as memory of the pod that writes them, under every runtime. So a pod
//! without a limit of its own gets none here either, and one that has such a volume to write to
//! loses it.

use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::{Cgroup, CgroupError, ROOT, io_error, is_marked};

const MIB: u64 = 1 << 20;

/// Shim, VMM, fs server and stand-ins of a pod, and what a logging program or a hook needs beside
/// them, in bytes. Measured: a guest of 258 MiB that had dirtied all of it, with one container,
/// took 6 MiB more than that at its peak (memory.peak), anonymous memory 3, kernel 1.6; the rest is
/// room.
const PROCESSES: u64 = 96 * MIB;
/// A part of the guest's memory for page tables: 8 bytes for each 4 KiB page in each of three
/// tables (the VMM's, the fs server's, the nested ones of KVM) are a 170th.
const TABLES: u64 = 128;
/// Processes and threads of a pod on the host. A running exec costs one: its stand-in.
const MAX_PROCESSES: u64 = 8192;

/// What the host needs for a pod beside the guest's memory, in bytes.
pub fn overhead(guest_memory: u64) -> u64 {
    PROCESSES + guest_memory / TABLES
}

/// Limits the pod whose sandbox container has this cgroup; `guest_memory` is that of a guest that
/// was sized by a limit. Where the host has no such controllers it is an error that nothing but a
/// warning need come of.
pub fn set(cgroup: &Cgroup, guest_memory: Option<u64>) -> Result<(), CgroupError> {
    if !is_marked(&cgroup.fd) {
        // Somebody else made it, and has set what it wants.
        return Ok(());
    }
    if !cgroup.path.join("memory.max").exists() {
        enable(&cgroup.path);
    }
    if let Some(memory) = guest_memory {
        let limit = memory.saturating_add(overhead(memory));
        write(cgroup, "memory.max", &limit.to_string())?;
    }
    write(cgroup, "memory.oom.group", "1")?;
    write(cgroup, "pids.max", &MAX_PROCESSES.to_string())
}

/// Enables the controllers from the root down to the cgroup's parent, as far as that is possible.
fn enable(path: &Path) {
    let mut parents: Vec<_> = path
        .ancestors()
        .skip(1)
        .take_while(|parent| parent.starts_with(ROOT))
        .collect();
    parents.reverse();
    for parent in parents {
        for controller in ["+memory", "+pids"] {
            // What can't be enabled shows in the file that is then missing.
            let _ = std::fs::write(parent.join("cgroup.subtree_control"), controller);
        }
    }
}

/// Takes the memory limit away again: the pod may write to a tmpfs of the host, whose files count
/// as its memory and have their own size as a limit.
pub fn lift(cgroup: &Path) {
    // Without the file there is no limit.
    if cgroup.join("memory.max").exists()
        && let Err(error) = std::fs::write(cgroup.join("memory.max"), "max")
    {
        tracing::warn!("lift the memory limit of {}: {error}", cgroup.display());
    }
}

/// Whether the pod whose sandbox container has this cgroup was killed for a limit on the host: a
/// line that says which.
pub fn killed(cgroup: &Path) -> Option<String> {
    let events = std::fs::read_to_string(cgroup.join("memory.events")).ok()?;
    let kills = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))?;
    let limit = std::fs::read_to_string(cgroup.join("memory.max")).unwrap_or_default();
    (kills != "0").then(|| {
        format!(
            "the host killed the pod for lack of memory: memory.max of {} is {}",
            cgroup.display(),
            limit.trim_end()
        )
    })
}

fn write(cgroup: &Cgroup, file: &'static str, value: &str) -> Result<(), CgroupError> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let written = rustix::fs::openat(&cgroup.fd, file, flags, Mode::empty())
        .and_then(|fd| rustix::io::write(&fd, value.as_bytes()));
    written
        .map(drop)
        .map_err(|errno| io_error("limit", &cgroup.path.join(file), errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_on_the_host_names_the_limit() {
        let cgroup = tempfile::tempdir().unwrap();
        let kills = |count| {
            let events = format!("low 0\noom 1\noom_kill {count}\noom_group_kill 1\n");
            std::fs::write(cgroup.path().join("memory.events"), events).unwrap();
            killed(cgroup.path())
        };
        std::fs::write(cgroup.path().join("memory.max"), "4096\n").unwrap();
        assert_eq!(kills(0), None);
        assert_eq!(killed(Path::new("/nowhere")), None);
        let line = kills(2).unwrap();
        assert!(line.ends_with(" is 4096"), "{line}");
    }

    #[test]
    fn the_overhead_covers_the_page_tables() {
        let gib = 1 << 30;
        for memory in [gib / 4, 2 * gib, 256 * gib] {
            let tables = 3 * memory / 512;
            assert!(overhead(memory) > tables, "{memory}");
        }
        assert_eq!(overhead(2 * gib), 112 * MIB);
    }
}
