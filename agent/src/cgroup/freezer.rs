//! Freezes and thaws all processes of a container by the freezer of cgroup v2, and waits until all
//! have gone.
//!
//! Called by `container/pause.rs` and `container/deletion.rs`. The kernel answers a write at once
//! and freezes step by step. It wakes the readers of `cgroup.events` when that is done
//! (cgroup-v2.rst, "Core Interface Files"). A frozen process can be killed by SIGKILL and moved;
//! everything else waits.

use std::fs::File;
use std::time::Duration;

use kata_like_failure::{Failure, Step, one_line};
use rustix::io::pread;
use tokio::io::Interest;
use tokio::time::timeout;

use super::Cgroup;
use super::file::write;
use crate::readiness::watch;

impl Cgroup {
    /// Freezes or thaws all processes in the cgroup and below. Returns when all of them are. A
    /// freeze that takes longer than `deadline` is taken back.
    pub async fn freeze(&self, frozen: bool, deadline: Duration) -> Result<(), Failure> {
        let what = if frozen { "freeze" } else { "thaw" };
        let doing = || format!("{what} cgroup {}", self.directory.display());
        write(&self.directory, "cgroup.freeze", number(frozen)).step(doing)?;
        let result = match timeout(deadline, self.becomes("frozen", frozen)).await {
            Ok(result) => result.step(doing),
            Err(_) => Err(Failure::late(doing(), deadline)),
        };
        if result.is_err()
            && frozen
            && let Err(error) = write(&self.directory, "cgroup.freeze", number(false))
        {
            log::warn!("take it back: {}", one_line(&error));
        }
        result
    }

    /// Waits until no process is in the cgroup or below. Each has then closed its files and given
    /// up its mappings and mounts (kernel/exit.c, do_exit: cgroup_exit comes after all that).
    pub async fn empty(&self) -> Result<(), Failure> {
        self.becomes("populated", false).await
    }

    /// Waits until a line of `cgroup.events` has the wanted value.
    async fn becomes(&self, key: &str, wanted: bool) -> Result<(), Failure> {
        let path = self.directory.join("cgroup.events");
        let step = || format!("watch the file {}", path.display());
        let file = File::open(&path).step(step)?;
        let events = watch(file, Interest::PRIORITY).step(step)?;
        // A few lines of a word and a number.
        let mut text = [0; 1024];
        loop {
            let length = pread(&events, &mut text, 0).step(step)?;
            let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
            match says(&text, key) {
                Some(now) if now == wanted => return Ok(()),
                Some(_) => {}
                None => {
                    let why = format!("it does not tell whether it is {key}");
                    return Err(Failure::failed(step(), why));
                }
            }
            let mut guard = events.ready(Interest::PRIORITY).await.step(step)?;
            guard.clear_ready();
        }
    }
}

fn number(frozen: bool) -> &'static str {
    if frozen { "1" } else { "0" }
}

fn says(events: &str, wanted: &str) -> Option<bool> {
    let mut lines = events.lines().filter_map(|line| line.split_once(' '));
    let (_, value) = lines.find(|(key, _)| *key == wanted)?;
    Some(value.trim() == "1")
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::cgroup::tests::Hierarchy;

    /// Runs a command in the cgroup from its first instruction on.
    fn spawn_in(cgroup: &Cgroup, script: &str) -> Child {
        let procs = cgroup.directory().join("cgroup.procs");
        let script = format!("echo $$ > {}; {script}", procs.display());
        Command::new("sh").args(["-c", &script]).spawn().unwrap()
    }

    async fn until(mut done: impl FnMut() -> bool) {
        let wait = async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, wait).await.unwrap();
    }

    fn frozen(cgroup: &Cgroup) -> Option<bool> {
        let events = std::fs::read_to_string(cgroup.directory().join("cgroup.events")).unwrap();
        says(&events, "frozen")
    }

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn all_of_a_container_stands_still_until_it_goes_on() {
        let hierarchy = Hierarchy::new();
        let cgroup = hierarchy.cgroup("frozen");
        let counter = tempfile::NamedTempFile::new().unwrap();
        let count = || std::fs::metadata(counter.path()).unwrap().len();
        let script = format!("while :; do echo >> {}; done", counter.path().display());
        let mut child = spawn_in(&cgroup, &script);
        until(|| count() > 0).await;
        cgroup.freeze(true, SOON).await.unwrap();
        let before = count();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!((count(), frozen(&cgroup)), (before, Some(true)));
        cgroup.freeze(false, SOON).await.unwrap();
        until(|| count() > before).await;
        cgroup.kill().unwrap();
        child.wait().unwrap();
        cgroup.remove(SOON).await.unwrap();
    }

    #[tokio::test]
    async fn a_frozen_container_can_be_killed_and_removed_with_all_below() {
        let hierarchy = Hierarchy::new();
        let cgroup = hierarchy.cgroup("killed");
        let nested = cgroup.directory().join("nested");
        std::fs::create_dir(&nested).unwrap();
        let mut child = spawn_in(&cgroup, "sleep 60 & wait");
        until(|| cgroup.pids().unwrap().len() == 2).await;
        let moved = cgroup.pids().unwrap()[1].to_string();
        std::fs::write(nested.join("cgroup.procs"), moved).unwrap();
        cgroup.freeze(true, SOON).await.unwrap();
        cgroup.remove(SOON).await.unwrap();
        assert!(!cgroup.directory().exists());
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn a_killed_container_is_empty_when_its_last_process_has_gone() {
        let hierarchy = Hierarchy::new();
        let cgroup = hierarchy.cgroup("emptied");
        let mut child = spawn_in(&cgroup, "sleep 60 & wait");
        until(|| cgroup.pids().unwrap().len() == 2).await;
        let early = timeout(Duration::from_millis(50), cgroup.empty()).await;
        assert!(early.is_err(), "it has two processes");
        cgroup.kill().unwrap();
        timeout(SOON, cgroup.empty()).await.unwrap().unwrap();
        assert_eq!(cgroup.pids().unwrap(), [0; 0]);
        child.wait().unwrap();
        cgroup.remove(SOON).await.unwrap();
    }

    #[tokio::test]
    async fn an_empty_container_is_frozen_at_once() {
        let hierarchy = Hierarchy::new();
        let cgroup = hierarchy.cgroup("empty");
        cgroup.freeze(true, SOON).await.unwrap();
        cgroup.freeze(true, SOON).await.unwrap();
        assert_eq!(frozen(&cgroup), Some(true));
        cgroup.freeze(false, SOON).await.unwrap();
        assert_eq!(frozen(&cgroup), Some(false));
    }

    #[tokio::test]
    async fn a_freeze_that_fails_is_taken_back() {
        let root = tempfile::tempdir().unwrap();
        let none = crate::cgroup::Limits::default();
        let cgroup = Cgroup::create_in(root.path(), "c", &none).unwrap();
        let file = |name: &str| cgroup.directory().join(name);
        std::fs::write(file("cgroup.freeze"), "0").unwrap();
        // A plain file wakes nobody, so it can't be watched.
        std::fs::write(file("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        let error = one_line(&cgroup.freeze(true, SOON).await.unwrap_err());
        assert!(error.starts_with("freeze cgroup "), "{error}");
        let text = std::fs::read_to_string(file("cgroup.freeze")).unwrap();
        assert_eq!(text, "0");
    }
}
