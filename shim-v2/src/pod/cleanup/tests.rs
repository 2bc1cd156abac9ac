//! State folders as a dead or a living shim would have left them, with processes that sleep.

use std::process::{Child, Command};

use kata_like_config::state::StandIn;

use super::*;

const NETWORK: NetworkId = NetworkId {
    device: 4,
    inode: 4_026_531_840,
};

fn sleeper() -> (Child, Process) {
    let child = Command::new("sleep").arg("600").spawn().unwrap();
    let process = Process::of(child.id() as i32).unwrap();
    (child, process)
}

struct Planted {
    place: tempfile::TempDir,
    record: Record,
    children: Vec<Child>,
}

/// A pod of processes that sleep, as a dead shim would have left it.
fn plant() -> Planted {
    let place = tempfile::tempdir().unwrap();
    let state = StateFolder::create_under(&place.path().join("state"), "ns", "pod").unwrap();
    let mut record = Record::new("ns", "pod");
    let mut children = Vec::new();
    let mut sleep = || {
        let (child, process) = sleeper();
        children.push(child);
        process
    };
    record.vmm = Some(sleep());
    record.fsd = Some(sleep());
    record.stand_ins = vec![StandIn {
        task: "pod".into(),
        process: sleep(),
    }];
    state.create_directory("share").unwrap();
    record.network_id = Some(NETWORK);
    state.write_record(&record).unwrap();
    let taken = NetworkLock::take_under(&place.path().join("state"), NETWORK, "ns", "pod");
    match taken.unwrap() {
        Occupied::Free(lock) => lock.hand_over(), // to nobody, as if its shim were killed
        other => panic!("{other:?}"),
    }
    Planted {
        place,
        record,
        children,
    }
}

impl Planted {
    fn root(&self) -> PathBuf {
        self.place.path().join("state")
    }

    fn write(&self) {
        let state = StateFolder::open_under(&self.root(), "ns", "pod")
            .unwrap()
            .unwrap();
        state.write_record(&self.record).unwrap();
    }

    fn delete(&self, id: &str) -> Deleted {
        delete_under(&self.root(), "ns", id, self.place.path()).unwrap()
    }

    fn living(&mut self) -> usize {
        let alive = |child: &mut Child| child.try_wait().unwrap().is_none();
        self.children
            .iter_mut()
            .filter_map(|child| alive(child).then_some(()))
            .count()
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_dead_shim_s_pod_is_taken_down_once_and_again() {
    let mut pod = plant();
    let begin = Instant::now();
    let deleted = pod.delete("pod");
    assert!(begin.elapsed() < Duration::from_secs(2));
    assert_eq!(deleted.status, 137);
    assert_eq!(deleted.pid, pod.record.stand_ins[0].process.pid as u32);
    assert_eq!(pod.living(), 0);
    assert_eq!(std::fs::read_dir(pod.root()).unwrap().count(), 0);
    assert_eq!(pod.delete("pod").pid, 0);
}

#[test]
fn a_living_pod_is_not_touched() {
    let mut pod = plant();
    // Another container of the pod has no folder.
    pod.delete("other");
    assert_eq!(pod.living(), 3);
    // The sandbox's own task is deleted, others are left; the shim serves.
    let (child, process) = sleeper();
    pod.children.push(child);
    pod.record.shim = Some(process);
    pod.record.stand_ins[0].task = "other".into();
    pod.write();
    assert_eq!(pod.delete("pod").pid, 0);
    assert_eq!(pod.living(), 4);
    assert!(pod.root().join("ns:pod").exists());
    // No task is left, and the shim hangs: it goes with the rest.
    pod.record.stand_ins.clear();
    pod.write();
    pod.delete("pod");
    assert_eq!(pod.living(), 1, "the one that is no longer recorded");
    assert!(!pod.root().join("ns:pod").exists());
}

#[test]
fn a_new_pod_of_the_name_replaces_a_dead_one_only() {
    let mut pod = plant();
    let state = StateFolder::open_under(&pod.root(), "ns", "pod")
        .unwrap()
        .unwrap();
    let lock = state.try_lock().unwrap();
    assert!(!remove_dead_under(&pod.root(), "ns", "pod").unwrap());
    assert_eq!(pod.living(), 3);
    drop(lock);
    assert!(remove_dead_under(&pod.root(), "ns", "pod").unwrap());
    assert_eq!(pod.living(), 0);
    assert_eq!(std::fs::read_dir(pod.root()).unwrap().count(), 0);
}

#[test]
fn a_pid_that_is_another_s_by_now_is_spared() {
    let mut pod = plant();
    let vmm = pod.record.vmm.as_mut().unwrap();
    vmm.start_time += 1;
    pod.write();
    pod.delete("pod");
    assert_eq!(pod.living(), 1);
}

#[test]
fn a_folder_without_a_readable_record_goes_too() {
    let pod = plant();
    std::fs::write(pod.root().join("ns:pod/shim.json"), "{").unwrap();
    pod.delete("pod");
    assert!(!pod.root().join("ns:pod").exists());
}

/// For a pod whose shim is gone, and not for one that was taken down in order; one that hangs is
/// given up before containerd's patience ends.
#[test]
fn the_hooks_that_undo_run_once_the_rest_is_gone() {
    let planted = plant();
    let bundle = planted.place.path();
    let done = bundle.join("done");
    let hook =
        |script: String| serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
    let spec = serde_json::json!({"ociVersion": "1.2.0", "hooks": {"poststop": [
        hook(format!("cat >{}", done.display())),
        hook("exec sleep 600".to_owned()),
    ]}});
    std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    hooks::owe_poststop(bundle).unwrap();
    let begin = Instant::now();
    planted.delete("pod");
    assert!(begin.elapsed() < Duration::from_secs(5));
    let state = std::fs::read_to_string(&done).unwrap();
    let wanted = r#"{"ociVersion":"1.2.0","id":"pod","status":"stopped","bundle":"#;
    assert!(state.starts_with(wanted), "{state}");
    std::fs::remove_file(&done).unwrap();
    planted.delete("pod");
    assert!(!done.exists());
}

/// A container that lives in a pod has no state folder: its hooks are run if its pod's shim is
/// gone.
#[test]
fn poststop_hooks_of_a_pods_container_run_once_its_shim_is_gone() {
    let mut planted = plant();
    let bundle = planted.place.path().to_owned();
    let done = bundle.join("done");
    let script = format!("touch {}", done.display());
    let spec = serde_json::json!({"ociVersion": "1.2.0",
        "annotations": {"io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "pod"},
        "hooks": {"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]}});
    std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    // After an ordinary deletion nothing is due.
    planted.delete("other");
    assert!(!done.exists());
    hooks::owe_poststop(&bundle).unwrap();
    let (mut shim, record) = sleeper();
    planted.record.shim = Some(record);
    planted.write();
    planted.delete("other");
    assert!(!done.exists(), "the shim lives");
    shim.kill().unwrap();
    shim.wait().unwrap();
    planted.delete("other");
    assert!(done.exists());
    std::fs::remove_file(&done).unwrap();
    planted.delete("other");
    assert!(!done.exists(), "a second time");
    assert_eq!(planted.living(), 3, "the pod is not touched");
}
