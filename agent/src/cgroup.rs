//! Control groups in the guest: one for each container, one for the agent.
//!
//! Called once by `init.rs`, and by `container.rs`. A container's cgroup is `/sys/fs/cgroup/_NAME`.
//! The kernel never begins the name of a file of its own with an underscore (cgroup-v2.rst,
//! "Namespace"), so no container's name can collide with one. Cgroups that the container makes
//! below belong to it, and are removed with it.

mod apply;
mod file;
mod freezer;
mod huge_pages;
mod limits;
mod resources;
mod stats;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use kata_like_agent_protocol::agent::StatsResponse;
use kata_like_failure::{Failure, Step};
use rustix::io::pread;
use tokio::io::Interest;

pub use limits::Limits;
pub use resources::Change;

use crate::readiness::watch;
use file::write;

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// The agent's own leaf, and the memory that nothing in the guest may take from it.
const AGENT: &str = "/sys/fs/cgroup/agent";
const AGENT_MEMORY: &str = "33554432";

/// How deep a container's cgroups may nest before their removal gives up, and how many processes we
/// list.
const MAX_DEPTH: usize = 64;
const MAX_PIDS: usize = 1 << 16;

/// Moves the agent into its leaf, and gives all controllers to the containers.
pub fn prepare() -> Result<(), Failure> {
    let root = Path::new(ROOT);
    let agent = Path::new(AGENT);
    fs::create_dir(agent).step(|| format!("make cgroup {AGENT}"))?;
    write(agent, "cgroup.procs", "0")?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))
        .step(|| format!("read the controllers of {ROOT}"))?;
    // In one write: the kernel stops all processes' forks and waits for each.
    let all: Vec<_> = controllers
        .split_whitespace()
        .map(|it| format!("+{it}"))
        .collect();
    write(root, "cgroup.subtree_control", &all.join(" "))?;
    write(agent, "memory.min", AGENT_MEMORY)
}

/// Finds the cgroup that a process is in.
fn cgroup_of(pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(ROOT).join(path))
}

/// A container's cgroup. Dropping it changes nothing: see [`Cgroup::remove`].
#[derive(Debug)]
pub struct Cgroup {
    directory: PathBuf,
    oom_kills: Mutex<u64>,
}

impl Cgroup {
    /// Makes the cgroup of `container` and sets its limits. A failure leaves nothing behind.
    pub fn create(container: &str, limits: &Limits) -> Result<Self, Failure> {
        Self::create_in(Path::new(ROOT), container, limits)
    }

    fn create_in(root: &Path, container: &str, limits: &Limits) -> Result<Self, Failure> {
        let directory = root.join(format!("_{container}"));
        let name = || format!("make cgroup {}", directory.display());
        fs::DirBuilder::new()
            .mode(0o755)
            .create(&directory)
            .step(name)?;
        if let Err(error) = apply::apply(&directory, limits) {
            let _ = fs::remove_dir(&directory);
            return Err(error);
        }
        huge_pages::limits_changed(root, limits);
        Ok(Self {
            directory,
            oom_kills: Mutex::new(0),
        })
    }

    /// Changes the limits, all or none. This may take a while, in which the kernel frees memory.
    pub fn update(&self, change: &Change) -> Result<(), Failure> {
        apply::check_use(&self.directory, change.only_below)?;
        apply::apply(&self.directory, &change.limits)?;
        huge_pages::limits_changed(self.root(), &change.limits);
        Ok(())
    }

    /// Where all containers' cgroups are.
    fn root(&self) -> &Path {
        self.directory.parent().unwrap_or(Path::new(ROOT))
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Kills every process in the cgroup and below.
    pub fn kill(&self) -> Result<(), Failure> {
        write(&self.directory, "cgroup.kill", "1")
    }

    /// Lists the processes in the cgroup and below, in the order of their directories.
    pub fn pids(&self) -> Result<Vec<u32>, Failure> {
        let mut pids = Vec::new();
        for directory in self.tree() {
            let text = match fs::read_to_string(directory.join("cgroup.procs")) {
                Ok(text) => text,
                // The directory may have gone meanwhile, and a threaded cgroup has no list of its
                // own.
                Err(_) if directory != self.directory => continue,
                Err(error) => {
                    let directory = directory.display();
                    return Err(error).step(|| format!("list the processes of cgroup {directory}"));
                }
            };
            // 0 is a process that this PID namespace can't see.
            let found = text.lines().filter_map(|line| line.parse::<u32>().ok());
            pids.extend(found.filter(|pid| *pid != 0).take(MAX_PIDS - pids.len()));
        }
        Ok(pids)
    }

    /// Whether a process is in the cgroup or below.
    pub fn holds(&self, pid: u32) -> bool {
        cgroup_of(pid).is_some_and(|path| path.starts_with(&self.directory))
    }

    /// Finds the cgroup of one of its processes. The container may have made it below.
    pub fn of(&self, pid: u32) -> PathBuf {
        cgroup_of(pid)
            .filter(|path| path.starts_with(&self.directory))
            .unwrap_or_else(|| self.directory.clone())
    }

    pub fn stats(&self) -> StatsResponse {
        stats::read(&self.directory)
    }

    /// Whether the kernel has killed processes for lack of memory since the last call.
    pub fn killed_for_memory(&self) -> bool {
        let file = self.directory.join("memory.events");
        fs::read_to_string(file).is_ok_and(|events| self.more_kills(&events))
    }

    fn more_kills(&self, events: &str) -> bool {
        let now = stats::oom_kills(events);
        let Ok(mut before) = self.oom_kills.lock() else {
            return false;
        };
        let more = now > *before;
        *before = now.max(*before);
        more
    }

    /// Reports each OOM kill in the cgroup once.
    ///
    /// The kernel wakes the readers of `memory.events` by POLLPRI (kernfs_notify).
    /// [`Cgroup::killed_for_memory`] finds a kill in the last instant before an exit instead.
    pub async fn watch_memory(&self, mut killed: impl FnMut()) -> Result<(), Failure> {
        let path = self.directory.join("memory.events");
        let step = || format!("watch the file {}", path.display());
        let file = File::open(&path).step(step)?;
        let events = watch(file, Interest::PRIORITY).step(step)?;
        // Some ten lines of a word and a number.
        let mut text = [0; 1024];
        loop {
            let length = pread(&events, &mut text, 0).step(step)?;
            let text = text.get(..length).unwrap_or_default();
            if self.more_kills(&String::from_utf8_lossy(text)) {
                killed();
            }
            let mut guard = events.ready(Interest::PRIORITY).await.step(step)?;
            guard.clear_ready();
        }
    }

    /// Kills what is left, and removes the cgroup with all below. Tries again while processes go
    /// away.
    pub async fn remove(&self, deadline: Duration) -> Result<(), Failure> {
        let end = tokio::time::Instant::now() + deadline;
        let mut pause = Duration::from_millis(1);
        loop {
            let result = self.kill_and_remove();
            match result {
                Ok(()) => {
                    huge_pages::cgroup_gone(self.root());
                    return Ok(());
                }
                Err(error) if tokio::time::Instant::now() >= end => {
                    let directory = self.directory.display();
                    return Err(error).step(|| format!("remove cgroup {directory}"));
                }
                Err(_) => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn kill_and_remove(&self) -> io::Result<()> {
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        match fs::write(self.directory.join("cgroup.kill"), "1") {
            Err(error) if gone(&error) => return Ok(()),
            result => result?,
        }
        // The deepest first.
        for directory in self.tree().iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if !gone(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Its directory and all below, parents first.
    fn tree(&self) -> Vec<PathBuf> {
        let mut found = vec![self.directory.clone()];
        let (mut next, base) = (0, self.directory.components().count());
        while let Some(directory) = found.get(next).cloned() {
            next += 1;
            if directory.components().count() - base >= MAX_DEPTH {
                continue;
            }
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            let below = entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path());
            found.extend(below);
        }
        found
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Where this machine has its cgroup v2.
    pub fn hierarchy() -> String {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut mounts = mounts.lines().map(|line| line.split(' '));
        let found = mounts.find_map(|mut fields| {
            let (target, kind) = (fields.nth(1)?, fields.next()?);
            (kind == "cgroup2").then(|| target.to_owned())
        });
        found.expect("a mounted cgroup v2 hierarchy")
    }

    /// A place in this machine's cgroup v2 hierarchy, for tests that need a real one; removed with
    /// what is left in it. It needs root.
    pub struct Hierarchy(PathBuf);

    impl Hierarchy {
        pub fn new() -> Self {
            let directory = tempfile::Builder::new()
                .prefix("agent-test-")
                .tempdir_in(hierarchy())
                .unwrap();
            Self(directory.keep())
        }

        pub fn cgroup(&self, name: &str) -> Cgroup {
            Cgroup::create_in(&self.0, name, &Limits::default()).unwrap()
        }
    }

    impl Drop for Hierarchy {
        fn drop(&mut self) {
            let all = Cgroup {
                directory: self.0.clone(),
                oom_kills: Mutex::new(0),
            };
            let removed = || all.kill_and_remove().is_ok();
            // The killed take a moment to go.
            (0..1000).any(|_| {
                std::thread::sleep(Duration::from_millis(1));
                removed()
            });
        }
    }

    fn fake() -> (tempfile::TempDir, Cgroup) {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create_in(root.path(), "c1", &Limits::default()).unwrap();
        (root, cgroup)
    }

    #[test]
    fn a_container_named_like_a_file_of_the_kernel_gets_its_cgroup() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.procs"), "").unwrap();
        assert!(Cgroup::create_in(root.path(), "cgroup.procs", &Limits::default()).is_ok());
    }

    #[test]
    fn a_limit_that_fails_leaves_no_cgroup() {
        let root = tempfile::tempdir().unwrap();
        let limits = |resources| Limits::of(&serde_json::from_value(resources).unwrap()).unwrap();
        let optional = limits(serde_json::json!({"memory": {"limit": 0, "swap": -1}}));
        assert!(Cgroup::create_in(root.path(), "good", &optional).is_ok());
        let needed = limits(serde_json::json!({"pids": {"limit": 1}}));
        let error = Cgroup::create_in(root.path(), "bad", &needed).unwrap_err();
        assert!(
            error.to_string().starts_with("linux.resources.pids.limit "),
            "{error}"
        );
        assert!(!root.path().join("_bad").exists());
    }

    #[test]
    fn a_kill_for_memory_is_reported_once() {
        let (_root, cgroup) = fake();
        let put = |text: &str| fs::write(cgroup.directory().join("memory.events"), text).unwrap();
        assert!(!cgroup.killed_for_memory());
        put("oom 5\noom_kill 0\n");
        assert!(!cgroup.killed_for_memory(), "oom alone killed nobody");
        put("oom 5\noom_kill 2\n");
        assert!(cgroup.killed_for_memory());
        assert!(!cgroup.killed_for_memory());
    }

    #[test]
    fn processes_of_nested_cgroups_are_the_containers() {
        let (_root, cgroup) = fake();
        let nested = cgroup.directory().join("a/b");
        fs::create_dir_all(&nested).unwrap();
        fs::write(cgroup.directory().join("cgroup.procs"), "7\n0\n").unwrap();
        fs::write(nested.join("cgroup.procs"), "9\n").unwrap();
        assert_eq!(cgroup.pids().unwrap(), [7, 9]);
    }
}
