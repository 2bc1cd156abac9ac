//! The record of what a pod consists of on the host, for the one who cleans up after a dead shim.
//!
//! Owned once for a pod and handed to those who make what it names. It is written when it has
//! changed (`shim.json` of the state folder).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use kata_like_config::state::{Process, Record, StandIn, StateFolder};
use kata_like_failure::Failure;
use kata_like_linux::lock;

/// A pod's record.
#[derive(Debug)]
pub struct Ledger {
    state: Arc<StateFolder>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// What is the pod's own.
    pod: Record,
    tasks: BTreeMap<String, Task>,
    written: Option<Record>,
    closed: bool,
}

/// What a container adds.
#[derive(Debug, Default)]
struct Task {
    stand_ins: Vec<Process>,
    cgroups: Vec<PathBuf>,
}

impl Ledger {
    /// A record that begins with `record`, which is written.
    pub fn open(state: Arc<StateFolder>, record: Record) -> Result<Self, Failure> {
        let ledger = Self {
            state,
            inner: Mutex::new(Inner {
                pod: record,
                tasks: BTreeMap::new(),
                written: None,
                closed: false,
            }),
        };
        ledger.change(|_| {})?;
        Ok(ledger)
    }

    /// Changes what is the pod's own.
    pub fn change(&self, change: impl FnOnce(&mut Record)) -> Result<(), Failure> {
        let mut inner = self.inner();
        change(&mut inner.pod);
        self.write(&mut inner)
    }

    /// Notes a task's stand-in, and the cgroups that were made for its container.
    pub fn add(&self, task: &str, stand_in: u32, cgroups: &[PathBuf]) {
        let mut inner = self.inner();
        let entry = inner.tasks.entry(task.to_owned()).or_default();
        entry.stand_ins.extend(process_of(stand_in));
        entry.cgroups.extend_from_slice(cgroups);
        self.note(&mut inner);
    }

    /// A task's stand-in has ended.
    pub fn remove_stand_in(&self, task: &str, stand_in: u32) {
        let mut inner = self.inner();
        if let Some(task) = inner.tasks.get_mut(task) {
            let other = |process: &Process| u32::try_from(process.pid) != Ok(stand_in);
            task.stand_ins.retain(other);
        }
        self.note(&mut inner);
    }

    /// Nothing of a container is left.
    pub fn remove(&self, task: &str) {
        let mut inner = self.inner();
        inner.tasks.remove(task);
        self.note(&mut inner);
    }

    /// The pod's processes, but for the shim.
    pub fn processes(&self) -> Vec<Process> {
        let inner = self.inner();
        let own = [inner.pod.vmm, inner.pod.fsd, inner.pod.proxy];
        let own = own.into_iter().flatten();
        let tasks = inner.tasks.values();
        own.chain(tasks.flat_map(|task| task.stand_ins.iter().copied()))
            .collect()
    }

    /// The state folder is about to be removed: nothing is written any more.
    pub fn close(&self) {
        self.inner().closed = true;
    }

    fn note(&self, inner: &mut Inner) {
        if let Err(error) = self.write(inner) {
            tracing::warn!("{}", error.one_line());
        }
    }

    /// Under the lock, so the last record written is the last one true.
    fn write(&self, inner: &mut Inner) -> Result<(), Failure> {
        let record = inner.whole();
        if inner.closed || inner.written.as_ref() == Some(&record) {
            return Ok(());
        }
        let written = self.state.write_record(&record);
        written.map_err(|cause| Failure::failed("keep the pod's state", cause))?;
        inner.written = Some(record);
        Ok(())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

impl Inner {
    /// A cgroup that several share is named once. A child comes before its parent.
    fn whole(&self) -> Record {
        let mut record = self.pod.clone();
        for (name, task) in &self.tasks {
            let stand_ins = task.stand_ins.iter().map(|process| StandIn {
                task: name.clone(),
                process: *process,
            });
            record.stand_ins.extend(stand_ins);
            for path in task.cgroups.iter().rev() {
                if !record.cgroups.contains(path) {
                    record.cgroups.insert(0, path.clone());
                }
            }
        }
        record
    }
}

/// A living process as the record names it.
pub fn process_of(pid: u32) -> Option<Process> {
    Process::of(i32::try_from(pid).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_follows_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("state");
        let state = Arc::new(StateFolder::create_under(&root, "ns", "pod").unwrap());
        let read = || state.read_record().unwrap().unwrap();
        let own = std::process::id();
        let mut record = Record::new("ns", "pod");
        record.cgroups = vec!["/pod".into()];
        let ledger = Ledger::open(Arc::clone(&state), record.clone()).unwrap();
        assert_eq!(read(), record);

        ledger.add("a", own, &["/pod/a".into(), "/pod".into()]);
        ledger.add("b", own, &["/pod/b".into(), "/pod".into()]);
        assert_eq!((read().stand_ins.len(), ledger.processes().len()), (2, 2));
        assert_eq!(read().cgroups.len(), 3);
        assert_eq!(read().cgroups.last(), Some(&PathBuf::from("/pod")));
        ledger.add("c", own, &["/other/c".into(), "/other".into()]);
        assert_eq!(
            read().cgroups[..2],
            ["/other/c", "/other"].map(PathBuf::from)
        );
        ledger.remove("c");
        ledger.remove_stand_in("a", own);
        assert_eq!(read().stand_ins[0].task, "b");
        ledger.remove("a");
        ledger.change(|pod| pod.uid = Some(7)).unwrap();
        assert_eq!((read().uid, read().cgroups.len()), (Some(7), 2));

        ledger.close();
        ledger.remove("b");
        assert_eq!(read().cgroups.len(), 2, "nothing is written any more");
    }
}
