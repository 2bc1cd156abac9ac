//! The VMM's process and its VM: how far it has come, what it answers, why it ended.
//!
//! Called by `machine` and `agent`. One task follows the VMM's reports to their end (`reports`).

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kata_like_boot::{Figures, Pace, VmBoot, VmCommand, VmFds, VmReport};
use kata_like_linux::watch::Watched;
use tokio::sync::{oneshot, watch};

use super::child::{Control, OWN_START, clean, getting_on, start};
use super::guest_log::GuestLog;
use super::parts::Parts;
use super::reports::{Pending, Phase, VmmEnd, follow, in_error};
use crate::spawn::Child;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;

/// How long a VMM may take to tell something.
const ANSWER: Duration = Duration::from_secs(2);
/// How long it may take to fill or empty a slot.
const SLOT: Duration = Duration::from_secs(30);
/// The longest boot, whatever the configuration says: a kubelet gives a pod four minutes, and is to
/// hear from us why it has none.
const LONGEST_BOOT: Duration = Duration::from_secs(210);
/// The longest line about where a VM stands: enough for four vCPUs and the queues of a few devices.
const STATE_LINE: usize = 8192;

/// The VMM and its VM. Clones refer to the same one; the last one dropped kills it.
#[derive(Clone, Debug)]
pub struct Vmm(Arc<Running>);

#[derive(Debug)]
struct Running {
    child: Child,
    control: Arc<Watched<Control>>,
    pending: Arc<Pending>,
    phase: watch::Receiver<Phase>,
    over: watch::Receiver<Option<VmmEnd>>,
    log: Arc<GuestLog>,
}

impl Vmm {
    /// Starts it and waits until the VM is made and the jail is closed.
    pub async fn start(
        parts: &Parts,
        cgroup: BorrowedFd<'_>,
        boot: &VmBoot,
        resources: Resources,
    ) -> Result<Self, Failure> {
        Self::start_in(parts, Some(cgroup), boot, resources).await
    }

    pub(super) async fn start_in(
        parts: &Parts,
        cgroup: Option<BorrowedFd<'_>>,
        boot: &VmBoot,
        resources: Resources,
    ) -> Result<Self, Failure> {
        let copy = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(|cause| Failure::failed("copy a descriptor for the VMM", cause))
        };
        let fds = VmFds {
            kvm: copy(&parts.kvm)?,
            kernel: copy(&parts.kernel)?,
            initrd: copy(&parts.initrd)?,
            agent: resources.agent,
            streams: resources.streams,
            shares: resources.shares,
        };
        let (child, control) = start("VMM", &parts.vmm, cgroup, &parts.place)?;
        let (tell_phase, phase) = watch::channel(Phase::Starting);
        let (tell_over, over) = watch::channel(None);
        let vmm = Self(Arc::new(Running {
            child: child.clone(),
            control: Arc::new(control),
            pending: Arc::default(),
            phase,
            over,
            log: Arc::new(GuestLog::new(resources.log)),
        }));
        boot.send(&fds, vmm.0.control.get_ref())
            .map_err(|cause| Failure::failed("send the boot request to the VMM", cause))?;
        drop(fds);
        let control = Arc::clone(&vmm.0.control);
        let pending = Arc::clone(&vmm.0.pending);
        let log = Arc::clone(&vmm.0.log);
        tokio::spawn(async move {
            let mut over = follow(&control, &pending, &tell_phase, &log, &child).await;
            // A VMM that could not say it itself has left what it had told.
            if !over.has_log {
                over.why
                    .push_str(&in_error(&log.tail().unwrap_or_default()));
            }
            lock(&pending).clear();
            tell_over.send_replace(Some(over));
        });
        let made = vmm.reached(|phase| *phase != Phase::Starting);
        getting_on("VMM", "the VM is made", vmm.child(), OWN_START, made).await??;
        Ok(vmm)
    }

    pub fn child(&self) -> &Child {
        &self.0.child
    }

    /// Waits for the VM's end, and tells why it came.
    pub fn ended(&self) -> impl Future<Output = String> + Send + 'static + use<> {
        let mut over = self.0.over.clone();
        async move {
            match over.wait_for(Option::is_some).await {
                Ok(over) => over.as_ref().map_or_else(String::new, |it| it.why.clone()),
                Err(_) => "its watcher is gone".to_owned(),
            }
        }
    }

    /// Whether the VM has ended because it, or the host, had no memory left.
    pub fn lacked_memory(&self) -> impl Fn() -> bool + Send + 'static + use<> {
        let over = self.0.over.clone();
        move || over.borrow().as_ref().is_some_and(|it| it.for_memory)
    }

    /// Whether the VM has ended.
    pub fn has_ended(&self) -> bool {
        self.0.over.borrow().is_some() || self.0.child.exit().is_some()
    }

    async fn reached(&self, is_it: impl Fn(&Phase) -> bool + Send) -> Result<Phase, Failure> {
        let mut phase = self.0.phase.clone();
        tokio::select! {
            biased;
            reached = wait_for_phase(&mut phase, is_it) => match reached {
                Some(phase) => Ok(phase),
                // The following task has ended, and says why right away.
                None => Err(ended(&self.ended().await)),
            },
            why = self.ended() => Err(ended(&why)),
        }
    }

    /// Waits for the agent's dial, for as long as the guest gets on with its boot: `patience` is
    /// how long it may show no progress, ten times that or [`LONGEST_BOOT`] the end in any case.
    pub async fn agent_dialled(&self, patience: Duration) -> Result<Figures, Failure> {
        let (begin, mut progress) = (Instant::now(), Progress::default());
        let (mut changed, mut told) = (begin, false);
        let longest = (patience * 10).min(LONGEST_BOOT).max(patience);
        // A look costs CPU time, of which guests that boot at once have little.
        let step = (patience / 10).max(Duration::from_millis(50));
        loop {
            let dialled = self.reached(|phase| matches!(phase, Phase::Connected(_)));
            if let Ok(reached) = tokio::time::timeout(step, dialled).await
                && let Phase::Connected(figures) = reached?
            {
                // So the whole boot is in the log's file, even if nobody ever asks again.
                self.write_log().await;
                return Ok(figures);
            }
            let now = self.progress().await.of_boot();
            if now != progress {
                (progress, changed) = (now, Instant::now());
            }
            let why = if changed.elapsed() >= patience {
                format!("the guest has shown no progress for {patience:?}")
            } else if begin.elapsed() >= longest {
                self.still_boots(begin)
            } else {
                if !told && begin.elapsed() >= patience {
                    told = true;
                    tracing::warn!("{}", self.still_boots(begin));
                }
                continue;
            };
            let why = self.with_state(&format!("wait for the agent: {why}")).await;
            return Err(Failure::new(
                Kind::DeadlineExceeded,
                // Looking for progress has just had the log written.
                format!("{why}{}", in_error(&self.0.log.tail().unwrap_or_default())),
            ));
        }
    }

    /// What is said of a guest that gets on with its boot, but slowly.
    fn still_boots(&self, begin: Instant) -> String {
        let elapsed = begin.elapsed();
        let text = format!("the guest still boots after {elapsed:.1?}");
        match Pace::of(self.child().pid, elapsed, true) {
            Ok(pace) => format!("{text}: {pace}"),
            Err(_) => text,
        }
    }

    /// What changes while a guest works.
    pub async fn progress(&self) -> Progress {
        let log_length = self.write_log().await;
        match self.command(VmCommand::Figures).await {
            Ok(VmReport::Figures(figures)) => Progress {
                exits: figures.exits,
                page_faults: figures.page_faults,
                user_exits: figures.user_exits,
                resident_bytes: figures.resident_bytes,
                log_length,
            },
            _ => Progress {
                log_length,
                ..Progress::default()
            },
        }
    }

    /// Has what is new of the guest's log written to its file; answers the file's length.
    async fn write_log(&self) -> u64 {
        while !self.0.log.is_full() {
            match self.command(VmCommand::ReadLog).await {
                Ok(VmReport::Log { text, more: true }) if !text.is_empty() => {}
                _ => break,
            }
        }
        self.0.log.length()
    }

    /// An error's text, which ends with what the vCPUs do of a VM whose guest gets no further. The
    /// log has how far its queues have come as well.
    pub async fn with_state(&self, error: &str) -> String {
        match self.command(VmCommand::State).await {
            Ok(VmReport::State(state)) => {
                let line = kata_like_failure::clean(&state.to_string(), STATE_LINE);
                tracing::warn!("{error}; {line}");
                format!("{error}; {}", clean(&state.short()))
            }
            Ok(other) => format!(
                "{error}; {}",
                refused("ask where it stands", &other).one_line()
            ),
            Err(why) => format!("{error}; where it stands is not known: {}", why.one_line()),
        }
    }

    /// Writes what the VMM counts to the log; who looks for figures sets its level to debug.
    pub async fn log_figures(&self, moment: &str) {
        if let Ok(VmReport::Figures(figures)) = self.command(VmCommand::Figures).await {
            log_figures(moment, &figures);
        }
    }

    /// Puts a disk into a free slot; answers N of the guest's `virtio-mmio.N`.
    pub async fn add_disk(&self, disk: &DiskFile) -> Result<u32, Failure> {
        let command = VmCommand::AddDisk {
            read_only: disk.read_only,
            bytes: disk.bytes,
            block_size: disk.block_size,
        };
        let file = disk.file.as_fd();
        match self.command_within(SLOT, command, &[file]).await? {
            VmReport::SlotFilled { slot } => Ok(slot),
            other => Err(refused("add a disk to the virtual machine", &other)),
        }
    }

    /// Empties a disk's slot, which the guest's driver has let go.
    pub async fn remove_disk(&self, slot: u32) -> Result<(), Failure> {
        let command = VmCommand::RemoveDisk { slot };
        match self.command_within(SLOT, command, &[]).await? {
            VmReport::SlotEmptied => Ok(()),
            other => Err(refused("take a disk from the virtual machine", &other)),
        }
    }

    /// Puts an interface over a tap into a free slot; answers N of the guest's `virtio-mmio.N`.
    pub async fn add_interface(
        &self,
        tap: &OwnedFd,
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<u32, Failure> {
        let command = VmCommand::AddInterface { mac, mtu };
        match self.command_within(SLOT, command, &[tap.as_fd()]).await? {
            VmReport::SlotFilled { slot } => Ok(slot),
            other => Err(refused("add an interface to the virtual machine", &other)),
        }
    }

    /// Empties an interface's slot, which the guest's driver has let go; the VM's end of the tap is
    /// closed.
    pub async fn remove_interface(&self, slot: u32) -> Result<(), Failure> {
        match self.command(VmCommand::RemoveInterface { slot }).await? {
            VmReport::SlotEmptied => Ok(()),
            other => {
                let what = "take an interface from the virtual machine";
                Err(refused(what, &other))
            }
        }
    }

    async fn command(&self, command: VmCommand) -> Result<VmReport, Failure> {
        self.command_within(ANSWER, command, &[]).await
    }

    async fn command_within(
        &self,
        deadline: Duration,
        command: VmCommand,
        fds: &[BorrowedFd<'_>],
    ) -> Result<VmReport, Failure> {
        let (tell, answer) = oneshot::channel();
        {
            // Both under the lock: answers come in the order of the commands.
            let mut pending = lock(&self.0.pending);
            let sent = self.0.control.get_ref().send(&command, fds);
            sent.map_err(|cause| Failure::failed("send a command to the VMM", cause))?;
            pending.push_back(tell);
        }
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(report)) => Ok(report),
            Ok(Err(_)) => Err(Failure::new(Kind::Failed, "ask the VMM: it has ended")),
            Err(_) => Err(Failure::new(
                Kind::DeadlineExceeded,
                format!("ask the VMM: no answer within {deadline:?}"),
            )),
        }
    }

    /// Ends the VM: by command, then by force. Returns when the process is gone, or after `limit`
    /// twice.
    pub async fn stop(&self, limit: Duration) {
        if !self.has_ended() {
            let _ = self.0.control.get_ref().send(&VmCommand::Stop, &[]);
            let _ = tokio::time::timeout(limit, self.0.child.exited()).await;
        }
        self.0.child.end(limit).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill();
    }
}

async fn wait_for_phase(
    phase: &mut watch::Receiver<Phase>,
    is_it: impl Fn(&Phase) -> bool,
) -> Option<Phase> {
    let reached = phase.wait_for(|phase| is_it(phase)).await;
    reached.ok().map(|phase| phase.clone())
}

/// An open block device, and what the VMM may not ask of it.
#[derive(Debug)]
pub struct DiskFile {
    /// Open for reading and, unless `read_only`, for writing.
    pub file: OwnedFd,
    /// Its size.
    pub bytes: u64,
    /// The size of its own blocks in bytes.
    pub block_size: u32,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// The descriptors that a VM gets beside those of [`Parts`].
#[derive(Debug)]
pub struct Resources {
    /// The file of the guest's log.
    pub log: File,
    /// The end of a connected socket that becomes the agent's.
    pub agent: OwnedFd,
    /// The listening socket for streams.
    pub streams: OwnedFd,
    /// A connected vhost-user socket for each share.
    pub shares: Vec<OwnedFd>,
}

/// One line for one moment.
pub fn log_figures(moment: &str, figures: &Figures) {
    tracing::debug!(
        moment,
        elapsed_ms = figures.elapsed_ns / 1_000_000,
        exits = figures.exits,
        user_exits = figures.user_exits,
        page_faults = figures.page_faults,
        huge_pages = figures.huge_pages,
        resident_bytes = figures.resident_bytes,
        "figures"
    );
}

/// Figures that change while a guest works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    exits: u64,
    page_faults: u64,
    user_exits: u64,
    resident_bytes: u64,
    log_length: u64,
}

impl Progress {
    /// Without the exits: a timer makes them in a guest that boots no further.
    fn of_boot(self) -> Self {
        Self { exits: 0, ..self }
    }
}

fn refused(step: &str, answer: &VmReport) -> Failure {
    let why = match answer {
        VmReport::Refused { why } => clean(why),
        _ => "the VMM's answer is of another kind".to_owned(),
    };
    Failure::new(Kind::Failed, format!("{step}: {why}"))
}

fn ended(why: &str) -> Failure {
    Failure::new(Kind::Failed, format!("run the VM: {why}"))
}
