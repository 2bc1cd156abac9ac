//! The order of what is told, against a real ttrpc server in containerd's place. No guest is
//! needed for it: containers are entered as a creation would, and news comes as from a sandbox.

use std::time::{Instant, SystemTime};

use kata_like_failure::{Failure, Kind};

use super::process::{Exited, Freeze};
use super::*;
use crate::bundle::Role;
use crate::containerd::publish::{self, Publisher};

struct Fixture {
    pod: Arc<Pod>,
    publisher: Publisher,
    arrived: publish::tests::Arrived,
    _server: containerd_shim_protos::ttrpc::asynchronous::Server,
    directory: tempfile::TempDir,
}

impl Fixture {
    async fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("ttrpc");
        let (server, arrived) = publish::tests::containerd(&socket).await;
        let (events, happened) = Events::queue();
        let publisher = Publisher::start(Some(socket.display().to_string()), "ns", happened);
        Self {
            pod: Pod::new("ns", "pod", events, None, None),
            publisher,
            arrived,
            _server: server,
            directory,
        }
    }

    /// A container whose init runs.
    fn running(&self, id: &str) -> Arc<Container> {
        let mut life = Life::creating();
        life.created(100);
        life.begin_start().expect("a created init starts");
        life.started(100);
        self.container(id, life, Phase::Made)
    }

    fn container(&self, id: &str, life: Life, phase: Phase) -> Arc<Container> {
        let init = Process::new(id, "", StdioPaths::default(), Vec::new(), life);
        let bundle = self.directory.path().to_owned();
        let container = Arc::new(Container::new(id, bundle, Vec::new(), Role::Alone, init));
        let entry = Entry {
            container: Arc::clone(&container),
            phase,
        };
        self.pod.state().containers.insert(id.to_owned(), entry);
        container
    }

    fn register(&self, container: &str, exec: &str) -> Result<(), Failure> {
        self.pod.register_exec(ExecRegistration {
            container: container.to_owned(),
            exec: exec.to_owned(),
            process: b"{}".to_vec(),
            stdio: StdioPaths::default(),
        })
    }

    fn running_exec(&self, container: &str, exec: &str, pid: u32) {
        self.register(container, exec).expect("a new exec");
        let (_, process) = self.pod.find(container, exec).expect("registered");
        let mut life = process.life();
        life.begin_start().expect("a registered exec starts");
        life.started(pid);
    }

    async fn flushed(&self) {
        self.publisher.flush(Duration::from_secs(5)).await;
    }
}

fn gone(status: u32) -> Exited {
    Exited {
        exit: Exit {
            status,
            at: SystemTime::now(),
        },
        stdout_bytes: 0,
        stderr_bytes: 0,
        lost: false,
    }
}

#[tokio::test]
async fn an_init_s_exit_is_told_after_those_of_its_execs() {
    let fixture = Fixture::new().await;
    fixture.running("c");
    fixture.running_exec("c", "e1", 101);
    fixture.running_exec("c", "e2", 102);
    fixture.pod.exited("c", "", gone(0));
    tokio::time::sleep(Duration::from_millis(50)).await;
    fixture.pod.exited("c", "e2", gone(137));
    tokio::time::sleep(Duration::from_millis(50)).await;
    fixture.pod.exited("c", "e1", gone(137));
    let exit = fixture.pod.wait("c", "").await.expect("an exit");
    assert_eq!(exit.status, 0);
    fixture.flushed().await;
    let ids: Vec<_> = fixture.arrived.exits();
    let wanted = [("e2", 137), ("e1", 137), ("c", 0)];
    assert_eq!(ids, wanted.map(|(id, status)| (id.to_owned(), status)));
}

/// Both are gone at the same moment, told by threads of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_init_s_exit_overtakes_no_exec_s() {
    let fixture = Fixture::new().await;
    for round in 0..200 {
        let id = format!("c{round}");
        fixture.running(&id);
        fixture.running_exec(&id, "e", 101);
        fixture.pod.exited(&id, "e", gone(1));
        fixture.pod.exited(&id, "", gone(2));
        fixture.pod.wait(&id, "").await.expect("an exit");
    }
    fixture.flushed().await;
    let statuses: Vec<_> = fixture.arrived.exits();
    for (place, (id, status)) in statuses.iter().enumerate() {
        assert_eq!(*status, if place % 2 == 0 { 1 } else { 2 }, "{place} {id}");
    }
    assert_eq!(statuses.len(), 400);
}

#[tokio::test]
async fn a_lost_guest_ends_every_task_within_a_second() {
    let fixture = Fixture::new().await;
    let containers = [fixture.running("a"), fixture.running("b")];
    fixture.running_exec("a", "e", 103);
    fixture.register("a", "never-started").expect("a new exec");
    let begin = Instant::now();
    fixture.pod.lose_tasks(&containers);
    for (id, exec) in [("a", ""), ("a", "e"), ("b", "")] {
        let exit = fixture.pod.wait(id, exec).await.expect("an exit");
        assert_eq!(exit.status, 137, "{id} {exec}");
    }
    assert!(begin.elapsed() < Duration::from_secs(1));
    fixture.flushed().await;
    assert_eq!(fixture.arrived.exits().len(), 3);
}

#[tokio::test]
async fn an_exit_is_told_once() {
    let fixture = Fixture::new().await;
    let container = fixture.running("c");
    fixture.pod.exited("c", "", gone(3));
    fixture.pod.exited("c", "", gone(4));
    fixture.pod.lose_tasks(&[container]);
    assert_eq!(fixture.pod.wait("c", "").await.expect("an exit").status, 3);
    fixture.flushed().await;
    assert_eq!(fixture.arrived.exits(), [("c".to_owned(), 3)]);
}

#[tokio::test]
async fn a_finished_process_can_t_be_killed_but_all_is_fine() {
    let fixture = Fixture::new().await;
    fixture.running("c");
    fixture.pod.exited("c", "", gone(0));
    fixture.pod.wait("c", "").await.expect("an exit");
    let kill = |all| Arc::clone(&fixture.pod).kill("c".into(), String::new(), 15, all);
    match kill(false).await {
        Err(error) if error.kind() == Kind::NotFound => {
            assert_eq!(error.to_string(), "process already finished");
        }
        other => panic!("{other:?}"),
    }
    kill(true).await.expect("with all it is no error");
    let stopped = fixture.register("c", "e").expect_err("no exec any more");
    assert_eq!(stopped.to_string(), "cannot exec in a stopped state");
}

#[tokio::test]
async fn what_runs_or_never_ran_is_refused_as_runc_does() {
    let fixture = Fixture::new().await;
    fixture.running("c");
    fixture.register("c", "e").expect("a new exec");
    assert!(matches!(
        fixture.register("c", "e"),
        Err(error) if error.kind() == Kind::AlreadyExists
    ));
    assert!(matches!(
        fixture.register("c", "../e"),
        Err(error) if error.kind() == Kind::BadRequest
    ));
    let pod = || Arc::clone(&fixture.pod);
    assert!(matches!(
        pod().kill("c".into(), "e".into(), 9, false).await,
        Err(error) if error.kind() == Kind::WrongState
    ));
    assert!(matches!(
        pod().delete("c".into(), String::new()).await,
        Err(error) if error.kind() == Kind::Failed
    ));
    assert!(matches!(
        pod().start("c".into(), String::new()).await,
        Err(error) if error.kind() == Kind::Failed
    ));
    pod()
        .delete("c".into(), "e".into())
        .await
        .expect("an exec that never ran");
    assert!(matches!(
        pod().delete("c".into(), "e".into()).await,
        Err(error) if error.kind() == Kind::NotFound
    ));
}

#[tokio::test]
async fn a_container_in_the_making_is_not_there() {
    let fixture = Fixture::new().await;
    fixture.container("c", Life::creating(), Phase::Making);
    assert!(matches!(
        fixture.pod.process_state("c", ""),
        Err(error) if error.kind() == Kind::NotFound
    ));
    assert_eq!(fixture.pod.init_pid("c"), 0);
    let deleted = Arc::clone(&fixture.pod).delete("c".into(), String::new());
    assert!(matches!(
        deleted.await,
        Err(error) if error.kind() == Kind::NotFound
    ));
    let phase = fixture.pod.state().containers["c"].phase;
    assert_eq!(phase, Phase::Abandoned, "it is undone when it is made");
}

#[tokio::test]
async fn a_shutdown_is_remembered_until_the_last_container_has_exited() {
    let fixture = Fixture::new().await;
    fixture.running("c");
    fixture.pod.shutdown();
    let done = tokio::time::timeout(Duration::from_millis(100), fixture.pod.done());
    assert!(done.await.is_err());
    fixture.pod.exited("c", "", gone(0));
    fixture.pod.wait("c", "").await.expect("an exit");
    Arc::clone(&fixture.pod)
        .delete("c".into(), String::new())
        .await
        .expect("an exited container");
    fixture.pod.shutdown();
    let done = tokio::time::timeout(Duration::from_secs(1), fixture.pod.done());
    done.await.expect("nothing is left");
    fixture.flushed().await;
    assert_eq!(fixture.arrived.topics(), ["/tasks/exit", "/tasks/delete"]);
}

/// A caller of containerd's that has given up asks again; "not found" would make it take the rest
/// away.
#[tokio::test]
async fn a_second_deletion_waits_for_the_first() {
    let fixture = Fixture::new().await;
    let container = fixture.running("c");
    fixture.pod.exited("c", "", gone(0));
    fixture.pod.wait("c", "").await.expect("an exit");
    if let Some(entry) = fixture.pod.state().containers.get_mut("c") {
        entry.phase = Phase::Deleting;
    }
    let delete = || Arc::clone(&fixture.pod).delete("c".into(), String::new());
    let mut second = std::pin::pin!(delete());
    let short = Duration::from_millis(50);
    assert!(tokio::time::timeout(short, &mut second).await.is_err());
    fixture.pod.forget("c");
    assert!(matches!(second.await, Err(error) if error.kind() == Kind::NotFound));

    // Where the first has failed, the second is one by itself.
    fixture.running("d");
    fixture.pod.exited("d", "", gone(0));
    fixture.pod.wait("d", "").await.expect("an exit");
    let entry = |phase| {
        if let Some(entry) = fixture.pod.state().containers.get_mut("d") {
            entry.phase = phase;
            entry.container.deleted.send_replace(());
        }
    };
    entry(Phase::Deleting);
    let mut second = std::pin::pin!(Arc::clone(&fixture.pod).delete("d".into(), String::new()));
    assert!(tokio::time::timeout(short, &mut second).await.is_err());
    entry(Phase::Made);
    second.await.expect("an exited container");
    drop(container);
}

#[tokio::test]
async fn an_exited_init_keeps_its_pid_until_it_is_deleted() {
    let fixture = Fixture::new().await;
    fixture.running("c");
    fixture.running_exec("c", "e", 104);
    let pids = |pod: &Pod| -> Vec<_> {
        let processes = pod.pids("c").expect("a container");
        processes.into_iter().map(|process| process.pid).collect()
    };
    assert_eq!(pids(&fixture.pod), [100, 104]);
    fixture.pod.exited("c", "e", gone(0));
    fixture.pod.exited("c", "", gone(0));
    fixture.pod.wait("c", "").await.expect("an exit");
    assert_eq!(pids(&fixture.pod), [100]);
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, Failure>) -> String {
    match answer {
        Err(error) if error.kind() == Kind::Failed => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_frozen_container_refuses_as_runc_does_and_still_dies() {
    let fixture = Fixture::new().await;
    let container = fixture.running("c");
    fixture.register("c", "e").expect("a new exec");
    fixture.running_exec("c", "f", 101);
    let pod = || Arc::clone(&fixture.pod);
    for (freeze, word, status) in [
        (Freeze::Pausing, "pausing", Status::Pausing),
        (Freeze::Paused, "paused", Status::Paused),
    ] {
        *lock(&container.freeze) = freeze;
        for exec in ["", "e", "f"] {
            let state = fixture.pod.process_state("c", exec).expect("a process");
            assert_eq!(state.status, status, "{exec}");
        }
        let wanted = format!("cannot pause a {word} container");
        assert_eq!(refusal(pod().pause("c".into()).await), wanted);
        let wanted = format!("cannot exec in a {word} state");
        assert_eq!(refusal(fixture.register("c", "g")), wanted);
        let wanted = format!("cannot exec in a {word} container");
        assert_eq!(refusal(pod().start("c".into(), "e".into()).await), wanted);
        let wanted = format!("cannot start a {word} process");
        assert_eq!(
            refusal(pod().start("c".into(), String::new()).await),
            wanted
        );
        let wanted = format!("cannot delete a {word} process");
        assert_eq!(
            refusal(pod().delete("c".into(), String::new()).await),
            wanted
        );
    }
    // The exec that was refused can still be started.
    *lock(&container.freeze) = Freeze::Thawed;
    let state = fixture.pod.process_state("c", "e").expect("an exec");
    assert_eq!(state.status, Status::Created);
    *lock(&container.freeze) = Freeze::Paused;
    fixture.pod.exited("c", "f", gone(137));
    fixture.pod.exited("c", "", gone(137));
    fixture.pod.wait("c", "").await.expect("an exit");
    let state = fixture.pod.process_state("c", "").expect("a container");
    assert_eq!(state.status, Status::Stopped);
    let stopped = "cannot resume a stopped container";
    assert_eq!(refusal(pod().resume("c".into()).await), stopped);
    pod()
        .delete("c".into(), String::new())
        .await
        .expect("an exited container");
}

#[tokio::test]
async fn what_does_not_run_is_neither_paused_nor_resumed() {
    let fixture = Fixture::new().await;
    let mut life = Life::creating();
    life.created(100);
    fixture.container("created", life, Phase::Made);
    fixture.running("running");
    let pod = || Arc::clone(&fixture.pod);
    for (id, pause, resume) in [(
        "created",
        "cannot pause task in created state",
        "cannot resume task in created state",
    )] {
        assert_eq!(refusal(pod().pause(id.into()).await), pause);
        assert_eq!(refusal(pod().resume(id.into()).await), resume);
    }
    let running = "cannot resume a running process";
    assert_eq!(refusal(pod().resume("running".into()).await), running);
    fixture.pod.exited("running", "", gone(0));
    let stopped = "cannot pause a stopped container";
    assert_eq!(refusal(pod().pause("running".into()).await), stopped);
    let stopped = "cannot update a stopped container";
    let update = pod().update("running".into(), b"{}".to_vec());
    assert_eq!(refusal(update.await), stopped);
    assert!(matches!(
        pod().pause("nobody".into()).await,
        Err(error) if error.kind() == Kind::NotFound
    ));
}

/// A pause that the guest could not do leaves the container running.
#[tokio::test]
async fn a_failed_pause_leaves_the_container_as_it_was() {
    let fixture = Fixture::new().await;
    fixture.running("c");
    let paused = Arc::clone(&fixture.pod).pause("c".into()).await;
    assert!(
        matches!(&paused, Err(error) if error.kind() == Kind::WrongState),
        "{paused:?}"
    );
    let state = fixture.pod.process_state("c", "").expect("a container");
    assert_eq!(state.status, Status::Running);
    fixture.flushed().await;
    assert!(fixture.arrived.topics().is_empty());
}

#[tokio::test]
async fn an_exec_whose_start_failed_is_as_runc_leaves_it() {
    let fixture = Fixture::new().await;
    fixture.running("c");
    fixture.register("c", "e").expect("a new exec");
    let pod = || Arc::clone(&fixture.pod);
    // There is no sandbox here, so nothing can be run.
    pod()
        .start("c".into(), "e".into())
        .await
        .expect_err("nothing runs");
    let state = fixture.pod.process_state("c", "e").expect("an exec");
    assert_eq!((state.status, state.pid), (Status::Created, 0));
    let exit = fixture.pod.wait("c", "e").await.expect("at once");
    assert_eq!(exit, Exit::of_nothing());
    let again = refusal(pod().start("c".into(), "e".into()).await);
    assert!(again.contains("its start has failed before"), "{again}");
    assert!(matches!(
        pod().kill("c".into(), "e".into(), 9, false).await,
        Err(error) if error.kind() == Kind::WrongState
    ));
    let deleted = pod().delete("c".into(), "e".into()).await;
    assert_eq!(deleted.expect("a deletion").exit.status, 0);
    fixture.flushed().await;
    assert_eq!(fixture.arrived.topics(), ["/tasks/exec-added"]);
}
