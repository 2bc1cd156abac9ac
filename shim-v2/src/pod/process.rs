//! One process of a container, an init or an exec: created → running → exited.
//!
//! [`Life`] is the state machine alone, without time, guest or lock; `pod` drives it and does what
//! it answers. It keeps one promise that clients depend on: an exit is told after the start. An
//! exit that is seen while a call that makes the process is under way is held back, and handed out
//! when that call has been answered.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// From containerd's "no time", 0001-01-01T00:00:00Z, to 1970, in seconds.
pub const NO_TIME: u64 = 62_135_596_800;

/// How a process ended, as it is told to containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 + signal.
    pub status: u32,
    pub at: SystemTime,
}

impl Exit {
    /// What is told of an exec that never was a process, in the words of runc's shim.
    pub fn of_nothing() -> Self {
        let no_time = UNIX_EPOCH.checked_sub(Duration::from_secs(NO_TIME));
        Self {
            status: 0,
            at: no_time.unwrap_or(UNIX_EPOCH),
        }
    }
}

/// The guest's news that a process has exited; its output may still be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exited {
    /// What is to be told.
    pub exit: Exit,
    /// How much standard output belongs before the exit.
    pub stdout_bytes: u64,
    /// How much standard error belongs before the exit.
    pub stderr_bytes: u64,
    /// The VM ended under it: nobody knows how much output there was.
    pub lost: bool,
}

/// Where a process is, as containerd's `State` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Known, but without its first instruction.
    Created,
    /// Running, or its last output is under way.
    Running,
    /// Its container is being frozen.
    Pausing,
    /// Its container stands still.
    Paused,
    Stopped,
}

/// Whether a container's processes may run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freeze {
    #[default]
    Thawed,
    /// The guest has been asked to freeze them.
    Pausing,
    Paused,
    /// The guest has been asked to let them go on.
    Resuming,
}

impl Freeze {
    /// The word for it in a refusal; none where nothing is to be refused.
    pub fn word(self) -> Option<&'static str> {
        match self {
            Self::Thawed => None,
            Self::Pausing => Some("pausing"),
            Self::Paused | Self::Resuming => Some("paused"),
        }
    }
}

/// Why a process can't do what is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It has been started, or is being started.
    Started,
    /// It has exited.
    Stopped,
    /// An exec whose start has failed: there is no second try.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// An init whose creation is under way.
    Creating,
    /// An exec that containerd knows and the guest does not.
    Registered,
    /// An init that waits for its start.
    Created,
    /// The start is under way.
    Starting,
    Running,
    /// It has exited, but what it wrote is still on its way to the reader.
    Draining,
    Told(Exit),
    /// An exec whose start has failed: it never was a process.
    NeverRan,
}

/// The state machine of one process.
#[derive(Debug)]
pub struct Life {
    stage: Stage,
    pid: u32,
    held: Option<Exited>,
}

impl Life {
    /// An init whose creation begins.
    pub fn creating() -> Self {
        Self {
            stage: Stage::Creating,
            pid: 0,
            held: None,
        }
    }

    /// An exec that is known, and no process yet.
    pub fn registered() -> Self {
        Self {
            stage: Stage::Registered,
            pid: 0,
            held: None,
        }
    }

    /// The host pid that containerd sees; 0 while there is none.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// As `State` tells it.
    pub fn status(&self) -> Status {
        match self.stage {
            Stage::Creating
            | Stage::Registered
            | Stage::Created
            | Stage::Starting
            | Stage::NeverRan => Status::Created,
            Stage::Running | Stage::Draining => Status::Running,
            Stage::Told(_) => Status::Stopped,
        }
    }

    /// How it ended, once it may be told.
    pub fn exit(&self) -> Option<Exit> {
        match self.stage {
            Stage::Told(exit) => Some(exit),
            Stage::NeverRan => Some(Exit::of_nothing()),
            _ => None,
        }
    }

    /// Whether it has exited, told or not.
    pub fn has_exited(&self) -> bool {
        self.held.is_some() || matches!(self.stage, Stage::Draining | Stage::Told(_))
    }

    /// Whether it has a start behind it, or under way, and no told exit: its end is to be awaited.
    pub fn is_under_way(&self) -> bool {
        matches!(
            self.stage,
            Stage::Starting | Stage::Running | Stage::Draining
        )
    }

    /// The creation has succeeded and been told. An exit held back is handed out: it is to be told.
    pub fn created(&mut self, pid: u32) -> Option<Exited> {
        self.pid = pid;
        self.stage = Stage::Created;
        self.release()
    }

    /// A start begins.
    pub fn begin_start(&mut self) -> Result<(), Refusal> {
        match self.stage {
            Stage::Registered | Stage::Created => {
                self.stage = Stage::Starting;
                Ok(())
            }
            Stage::Creating | Stage::Starting | Stage::Running => Err(Refusal::Started),
            Stage::Draining | Stage::Told(_) => Err(Refusal::Stopped),
            Stage::NeverRan => Err(Refusal::Failed),
        }
    }

    /// The start has succeeded and been told. An exit held back is handed out: it is to be told.
    pub fn started(&mut self, pid: u32) -> Option<Exited> {
        self.pid = pid;
        self.stage = Stage::Running;
        self.release()
    }

    /// An init's start has failed: it is created, as before. An exit held back is handed out.
    pub fn start_failed(&mut self) -> Option<Exited> {
        self.stage = Stage::Created;
        self.release()
    }

    /// An exec's start has failed: it never was a process, so there is no exit to be told.
    pub fn never_ran(&mut self) {
        self.held = None;
        self.pid = 0;
        self.stage = Stage::NeverRan;
    }

    /// The process has exited. Handed back if its exit is to be told now; not if it is held back,
    /// or known already.
    pub fn exited(&mut self, news: Exited) -> Option<Exited> {
        match self.stage {
            Stage::Creating | Stage::Starting => {
                self.held.get_or_insert(news);
                None
            }
            Stage::Created | Stage::Running => {
                self.stage = Stage::Draining;
                Some(news)
            }
            // The guest can't know of an exec that was not started.
            Stage::Registered | Stage::Draining | Stage::Told(_) | Stage::NeverRan => None,
        }
    }

    /// The exit is told from now on.
    pub fn told(&mut self, exit: Exit) {
        self.stage = Stage::Told(exit);
    }

    fn release(&mut self) -> Option<Exited> {
        let news = self.held.take()?;
        self.stage = Stage::Draining;
        Some(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone(status: u32) -> Exited {
        Exited {
            exit: Exit {
                status,
                at: SystemTime::UNIX_EPOCH,
            },
            stdout_bytes: 0,
            stderr_bytes: 0,
            lost: false,
        }
    }

    #[test]
    fn an_init_goes_from_created_to_exited() {
        let mut life = Life::creating();
        assert_eq!(life.created(7), None);
        assert_eq!((life.status(), life.pid()), (Status::Created, 7));
        life.begin_start().expect("a created process starts");
        assert_eq!(life.status(), Status::Created);
        assert_eq!(life.started(7), None);
        assert_eq!(life.status(), Status::Running);
        assert_eq!(life.exited(gone(3)), Some(gone(3)));
        assert_eq!((life.status(), life.exit()), (Status::Running, None));
        life.told(gone(3).exit);
        assert_eq!(life.status(), Status::Stopped);
        assert_eq!(life.exit(), Some(gone(3).exit));
    }

    #[test]
    fn an_exit_during_the_start_is_told_after_it() {
        let mut life = Life::registered();
        life.begin_start().expect("a registered exec starts");
        assert_eq!(life.exited(gone(0)), None);
        assert!(life.has_exited());
        assert_eq!(life.started(9), Some(gone(0)));
        assert_eq!(life.exited(gone(0)), None, "an exit is told once");
    }

    #[test]
    fn an_exit_during_the_creation_is_told_after_it() {
        let mut life = Life::creating();
        assert_eq!(life.exited(gone(137)), None);
        assert_eq!(life.created(5), Some(gone(137)));
    }

    #[test]
    fn a_created_process_may_exit_without_a_start() {
        let mut life = Life::creating();
        life.created(5);
        assert_eq!(life.exited(gone(137)), Some(gone(137)));
        assert_eq!(life.begin_start(), Err(Refusal::Stopped));
    }

    #[test]
    fn a_process_is_started_once() {
        let mut life = Life::registered();
        life.begin_start().expect("first");
        assert_eq!(life.begin_start(), Err(Refusal::Started));
        life.started(1);
        assert_eq!(life.begin_start(), Err(Refusal::Started));
    }

    #[test]
    fn an_exec_that_never_ran_has_no_exit_to_tell() {
        let mut life = Life::registered();
        life.begin_start().expect("first");
        life.never_ran();
        assert_eq!((life.status(), life.pid()), (Status::Created, 0));
        assert_eq!(life.exit().map(|exit| exit.status), Some(0));
        assert!(!life.has_exited() && !life.is_under_way());
        assert_eq!(life.exited(gone(0)), None);
        assert_eq!(life.begin_start(), Err(Refusal::Failed));
    }

    #[test]
    fn a_failed_start_leaves_an_init_created() {
        let mut life = Life::creating();
        life.created(5);
        life.begin_start().expect("first");
        assert_eq!(life.start_failed(), None);
        assert_eq!((life.status(), life.pid()), (Status::Created, 5));
        life.begin_start().expect("again");
        assert_eq!(life.exited(gone(137)), None);
        assert_eq!(life.start_failed(), Some(gone(137)));
    }
}
