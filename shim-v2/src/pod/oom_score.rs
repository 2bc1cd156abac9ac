//! What the host kills first when memory runs out: the score of the pod's processes.
//!
//! The VMM holds the memory that the pod's containers use, so it has the highest oom_score_adj of
//! them; fs server and stand-ins have the same. All are born with the first container's, and follow
//! as containers come and go. The shim keeps its own, which is containerd's + 1: it holds little,
//! and tells how the others have ended.
//!
//! A container whose spec has none counts as 0, as a process of a host that sets nothing. CRI's
//! pause container counts for nothing: its -998 is for a process that uses no memory. Without any
//! other container the score stays as it was, since what the last one has used is still there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use kata_like_linux::lock;

use crate::vm::ledger::Ledger;

/// The least score, a kubelet's for a container with guaranteed memory: no pod is kept longer than
/// the daemons that look after all of them (containerd -999, kubelet -999, shims -998).
const LEAST: i32 = -997;
const MOST: i32 = 1000;

/// What a pod is born with whose first container asks for `wanted`.
pub(super) fn at_birth(wanted: Option<i32>, placeholder: bool) -> i32 {
    match placeholder {
        true => 0,
        false => counted(wanted),
    }
}

/// Numbers that no kernel takes are refused in the guest.
fn counted(wanted: Option<i32>) -> i32 {
    wanted.unwrap_or(0).clamp(LEAST, MOST)
}

/// The score of a pod's processes.
#[derive(Debug)]
pub(super) struct OomScore {
    ledger: Arc<Ledger>,
    scores: Mutex<Scores>,
}

#[derive(Debug)]
struct Scores {
    /// By containers, without placeholders.
    wanted: HashMap<String, i32>,
    now: i32,
}

impl Scores {
    /// Whether the pod's score is another now.
    fn follow(&mut self) -> bool {
        let before = self.now;
        self.now = self.wanted.values().copied().max().unwrap_or(before);
        self.now != before
    }
}

impl OomScore {
    /// That of a pod whose processes, which `ledger` names, were born with `now`.
    pub(super) fn new(ledger: Arc<Ledger>, now: i32) -> Self {
        let wanted = HashMap::new();
        let scores = Mutex::new(Scores { wanted, now });
        Self { ledger, scores }
    }

    /// What a process of the pod is to be born with.
    pub(super) fn now(&self) -> i32 {
        self.scores().now
    }

    /// A container comes.
    pub(super) fn add(&self, container: &str, wanted: Option<i32>) {
        let mut scores = self.scores();
        scores.wanted.insert(container.into(), counted(wanted));
        if scores.follow() {
            self.apply(&scores);
        }
    }

    /// A container has gone.
    pub(super) fn remove(&self, container: &str) {
        let mut scores = self.scores();
        if scores.wanted.remove(container).is_some() && scores.follow() {
            self.apply(&scores);
        }
    }

    /// A process that was born with `score` is in the ledger now.
    pub(super) fn catch_up(&self, score: i32) {
        let scores = self.scores();
        if scores.now != score {
            self.apply(&scores);
        }
    }

    /// Under the lock, so the last score written is the last one wanted.
    fn apply(&self, scores: &Scores) {
        for process in self.ledger.processes() {
            if let Err(error) = process.set_oom_score(scores.now) {
                let pid = process.pid;
                tracing::warn!("set oom_score_adj of process {pid}: {error}");
            }
        }
    }

    fn scores(&self) -> MutexGuard<'_, Scores> {
        lock(&self.scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_like_config::state::{Record, StateFolder};

    #[test]
    fn the_processes_follow_the_highest_of_the_containers() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("state");
        let state = Arc::new(StateFolder::create_under(&root, "ns", "pod").unwrap());
        let ledger = Arc::new(Ledger::open(state, Record::new("ns", "pod")).unwrap());
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id();
        let score = || std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        // Above what a test may be born with, so that nobody needs a capability for it.
        let oom_score = OomScore::new(Arc::clone(&ledger), at_birth(None, true));
        assert_eq!(oom_score.now(), 0);
        ledger.add("a", pid, &[]);
        oom_score.add("a", Some(999));
        assert_eq!(score(), "999\n");
        oom_score.add("b", Some(1000));
        oom_score.add("c", Some(-998));
        assert_eq!((score().as_str(), oom_score.now()), ("1000\n", 1000));
        oom_score.remove("a");
        oom_score.remove("nobody");
        assert_eq!(oom_score.now(), 1000);
        oom_score.remove("b");
        assert_eq!(oom_score.now(), LEAST, "that of c, but never so low");
        oom_score.remove("c");
        assert_eq!(oom_score.now(), LEAST, "it stays as it was");
        child.kill().unwrap();
        child.wait().unwrap();
        oom_score.add("d", None); // the process is gone
        assert_eq!(oom_score.now(), 0);
    }

    #[test]
    fn a_pod_is_born_with_its_first_container_s() {
        let cases = [
            (None, false, 0),
            (Some(1000), false, 1000),
            (Some(-997), false, -997),
            (Some(-1000), false, -997),
            (Some(2000), false, 1000),
            (Some(-998), true, 0),
            (Some(500), true, 0),
        ];
        for (wanted, placeholder, score) in cases {
            assert_eq!(at_birth(wanted, placeholder), score, "{wanted:?}");
        }
    }
}
