//! The host's limits of a pod: what shim, VMM, fs server and stand-ins may use together.
//!
//! Called by `pod` before the VMM is born. The limit is set on the cgroup of the sandbox's own
//! container, which holds all of them: their leaf can have none of its own, for the stand-in beside
//! it rules controllers out there (cgroup-v2.rst, "No Internal Process Constraint"). A container's
//! limits are the guest's to apply, never the host's: the VM as a whole is what the host sees.
//!
//! Every VM has a memory limit: neither a guest nor a helper that it has taken over can use more of
//! the host than that. It is the guest's memory and [`overhead`], so that in ordinary use nothing
//! of the pod is killed. A pod that nobody has given a limit has the guest's memory again, for what
//! the host's kernel holds for files that the guest knows: some 2 KiB for each, about twice what
//! the guest has. A tmpfs of the host that the pod may write to adds its size, since its files
//! count as memory of the pod that writes them, under every runtime. What exceeds the limit takes
//! the whole pod at once and not some part of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use kata_like_failure::one_line;
use kata_like_linux::lock;
use rustix::fs::{Mode, OFlags};

use super::{Cgroup, CgroupError, ROOT, io_error, is_marked};
use crate::file_systems::in_memory::InMemory;

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

/// The limits of a pod.
#[derive(Debug)]
pub struct Limits {
    /// The cgroup of the sandbox's own container.
    cgroup: PathBuf,
    /// Not if somebody else has made the cgroup, and set what it wants.
    is_ours: bool,
    guest_memory: u64,
    /// In bytes, without the room for file systems.
    memory: u64,
    /// The sizes of file systems in memory, by the numbers of their devices.
    room: Mutex<BTreeMap<u64, u64>>,
}

/// What the host may mount later in a volume that the pod has as an `rslave`. No file system has
/// this number.
pub const LATER: InMemory = InMemory {
    device: u64::MAX,
    size: 0,
};

impl Limits {
    /// Those of the pod whose sandbox container has this cgroup. `guest_memory` is in bytes,
    /// `is_limited` whether a limit has sized it.
    pub fn of(cgroup: &Cgroup, guest_memory: u64, is_limited: bool) -> Self {
        let again = if is_limited { 0 } else { guest_memory };
        Self {
            cgroup: cgroup.path.clone(),
            is_ours: is_marked(&cgroup.fd),
            guest_memory,
            memory: guest_memory
                .saturating_add(overhead(guest_memory))
                .saturating_add(again),
            room: Mutex::default(),
        }
    }

    /// Sets them. Where the host has no such controllers it is an error that nothing but a warning
    /// need come of.
    pub fn set(&self) -> Result<(), CgroupError> {
        if !self.is_ours {
            return Ok(());
        }
        if !self.cgroup.join("memory.max").exists() {
            enable(&self.cgroup);
        }
        self.write("memory.max", &self.memory.to_string())?;
        self.write("memory.oom.group", "1")?;
        self.write("pids.max", &MAX_PROCESSES.to_string())
    }

    /// Makes room for file systems that the pod may write to. It stays, as the files do.
    pub fn make_room(&self, for_them: impl IntoIterator<Item = InMemory>) {
        let mut room = lock(&self.room);
        let before = room.len();
        for found in for_them {
            let size = match found.size {
                0 => self.guest_memory,
                size => size,
            };
            room.entry(found.device).or_insert(size);
        }
        // Without the file there is no limit.
        if room.len() == before || !self.is_ours || !self.cgroup.join("memory.max").exists() {
            return;
        }
        let limit = room
            .values()
            .copied()
            .fold(self.memory, u64::saturating_add);
        if let Err(error) = self.write("memory.max", &limit.to_string()) {
            tracing::warn!("{}", one_line(&error));
        }
    }

    fn write(&self, file: &'static str, value: &str) -> Result<(), CgroupError> {
        let path = self.cgroup.join(file);
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let written = rustix::fs::open(&path, flags, Mode::empty())
            .and_then(|fd| rustix::io::write(&fd, value.as_bytes()));
        written
            .map(drop)
            .map_err(|errno| io_error("limit", &path, errno))
    }
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

    /// Not on a cgroup: files of its names take the same numbers.
    #[test]
    fn every_vm_has_a_limit_with_room_for_what_it_may_write() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("memory.max");
        let limits = |memory, again| Limits {
            cgroup: place.path().to_owned(),
            is_ours: true,
            guest_memory: memory,
            memory: memory + overhead(memory) + again,
            room: Mutex::default(),
        };
        for name in ["memory.max", "memory.oom.group", "pids.max"] {
            std::fs::write(place.path().join(name), "").unwrap();
        }
        let max = || {
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(&file, "").unwrap(); // a file of a cgroup is not appended to
            text.parse::<u64>().unwrap()
        };
        let guest = 256 * MIB;
        let own = limits(guest, 0);
        own.set().unwrap();
        let first = max();
        assert_eq!(first, guest + overhead(guest));
        let tmpfs = |device, size| InMemory { device, size };
        own.make_room([tmpfs(1, 10 * MIB), tmpfs(1, 10 * MIB)]);
        assert_eq!(max(), first + 10 * MIB);
        own.make_room([tmpfs(1, 10 * MIB)]);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "", "nothing new");
        own.make_room([tmpfs(2, 0), LATER]);
        assert_eq!(max(), first + 10 * MIB + 2 * guest);
        own.make_room([tmpfs(3, u64::MAX)]);
        assert_eq!(max(), u64::MAX);
        let foreign = Limits {
            is_ours: false,
            ..limits(guest, 0)
        };
        foreign.set().unwrap();
        foreign.make_room([tmpfs(1, MIB)]);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "");
    }
}
