//! One container of the pod, with its execs: what is known of it, and where it is in its life.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::host_side::HostSide;
use super::process::{Exit, Freeze, Life, Status};
use super::sandbox::Sandbox;
use super::stats::Stats;
use crate::bundle::Role;
use crate::share::RootfsMount;
use crate::stand_in::StandIn;
use crate::stdio::{Stdio, StdioPaths};
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;

/// The least time between two reports that a container ran out of memory.
const OUT_OF_MEMORY: Duration = Duration::from_millis(100);

/// An init or an exec.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) container: String,
    /// Empty: the container's init.
    pub(super) exec: String,
    pub(super) paths: StdioPaths,
    /// The OCI `process` object of an exec.
    pub(super) spec: Vec<u8>,
    life: Mutex<Life>,
    pub(super) exit: watch::Sender<Option<Exit>>,
    pub(super) stdio: OnceLock<Stdio>,
    /// An exec's. An init's is on its container's host side.
    pub(super) stand_in: Mutex<Option<StandIn>>,
    /// The terminal's size, if it was set before the start.
    pub(super) size: Mutex<(u32, u32)>,
    /// `CloseIO` came before the streams were there.
    pub(super) stdin_closed: AtomicBool,
    /// An init's: it was killed in the guest, and its exit is waited for.
    pub(super) kill_expected: AtomicBool,
}

impl Process {
    pub(super) fn new(
        container: &str,
        exec: &str,
        paths: StdioPaths,
        spec: Vec<u8>,
        life: Life,
    ) -> Self {
        Self {
            container: container.to_owned(),
            exec: exec.to_owned(),
            paths,
            spec,
            life: Mutex::new(life),
            exit: watch::Sender::new(None),
            stdio: OnceLock::new(),
            stand_in: Mutex::default(),
            size: Mutex::new((0, 0)),
            stdin_closed: AtomicBool::new(false),
            kill_expected: AtomicBool::new(false),
        }
    }

    pub(super) fn life(&self) -> MutexGuard<'_, Life> {
        lock(&self.life)
    }

    pub(super) fn is_init(&self) -> bool {
        self.exec.is_empty()
    }
}

/// One container and its execs.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) rootfs: Vec<RootfsMount>,
    pub(super) role: Role,
    pub(super) sandbox: OnceLock<Arc<Sandbox>>,
    pub(super) host_side: HostSide,
    pub(super) init: Arc<Process>,
    pub(super) execs: Mutex<HashMap<String, Arc<Process>>>,
    pub(super) freeze: Mutex<Freeze>,
    pub(super) stats: Stats,
    /// When it was last told that the container ran out of memory.
    out_of_memory: Mutex<Option<Instant>>,
    /// Told when a deletion has ended.
    pub(super) deleted: watch::Sender<()>,
}

impl Container {
    pub(super) fn new(
        id: &str,
        bundle: PathBuf,
        rootfs: Vec<RootfsMount>,
        role: Role,
        init: Process,
    ) -> Self {
        Self {
            id: id.to_owned(),
            bundle,
            rootfs,
            role,
            sandbox: OnceLock::new(),
            host_side: HostSide::default(),
            init: Arc::new(init),
            execs: Mutex::default(),
            freeze: Mutex::default(),
            stats: Stats::default(),
            out_of_memory: Mutex::default(),
            deleted: watch::Sender::new(()),
        }
    }

    pub(super) fn sandbox(&self) -> Result<&Arc<Sandbox>, Failure> {
        self.sandbox.get().ok_or_else(|| {
            Failure::new(
                Kind::WrongState,
                format!("container {:?} has no sandbox", self.id),
            )
        })
    }

    pub(super) fn execs(&self) -> Vec<Arc<Process>> {
        lock(&self.execs).values().cloned().collect()
    }

    pub(super) fn process(&self, exec: &str) -> Option<Arc<Process>> {
        if exec.is_empty() {
            return Some(Arc::clone(&self.init));
        }
        lock(&self.execs).get(exec).cloned()
    }

    /// Whether its processes may run.
    pub(super) fn freeze(&self) -> Freeze {
        *lock(&self.freeze)
    }

    /// A process's state as clients see it: while a container is frozen, all that live in it are.
    pub(super) fn status_of(&self, process: &Process) -> Status {
        let own = process.life().status();
        if own == Status::Stopped || self.init.life().has_exited() {
            return own;
        }
        match self.freeze() {
            Freeze::Thawed => own,
            Freeze::Pausing => Status::Pausing,
            Freeze::Paused | Freeze::Resuming => Status::Paused,
        }
    }

    /// Whether it is to be told now that the container ran out of memory: not in a flood.
    pub(super) fn tells_out_of_memory(&self) -> bool {
        let last = lock(&self.out_of_memory).replace(Instant::now());
        last.is_none_or(|last| last.elapsed() >= OUT_OF_MEMORY)
    }

    /// Ends the stand-in of an exec.
    pub(super) async fn end_stand_in(&self, exec: &Process) {
        let stand_in = lock(&exec.stand_in).take();
        let Some(stand_in) = stand_in else {
            return;
        };
        let pid = stand_in.pid();
        stand_in.end().await;
        if let Some(sandbox) = self.sandbox.get() {
            sandbox.ledger.remove_stand_in(&self.id, pid);
        }
    }

    /// Takes the container away: in the guest, its mounts on the host, its stand-ins. Succeeds with
    /// a dead VM, and for a container that was never made.
    pub(super) async fn end_host_side(&self) {
        for exec in self.execs() {
            self.end_stand_in(&exec).await;
        }
        self.host_side.end().await;
    }
}
