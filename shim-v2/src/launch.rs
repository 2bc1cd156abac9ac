//! The VMM and the fs server: started with open descriptors, and watched.
//!
//! Called by `sandbox`. Each child is born in the pod's cgroup with one socket, descriptor 3; all it
//! is to use comes over that socket (`kata_like_boot`), opened here, so a missing file or a lack of
//! permission is found and told before anything runs. A child that ends closes its socket and makes
//! its pidfd readable; what it said last, or how it ended, is the reason that [`Vmm::over`] and
//! [`Fsd::over`] give. Dropped, a child is killed.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kata_like_boot::{
    Channel, ChannelError, End, EndReason, Figures, FsdBoot, FsdFds, FsdReport, PrintkLayout,
    VmBoot, VmCommand, VmFds, VmReport,
};
use kata_like_config::Config;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use crate::error::{SandboxError, SandboxErrorKind, one_line};
use crate::spawn::{Birth, Child, Exit, Network, birth};

/// The device that virtual machines are made by.
const KVM: &str = "/dev/kvm";
/// VMMs have user ids from here on, each that of its shim's pid: no range that systemd documents
/// reaches here, and no two living shims share a pid.
const FIRST_UID: u32 = 1_900_000_000;
/// How long a child may take for what is no work of the guest's: its own start and jail.
const OWN_START: Duration = Duration::from_secs(30);
/// How long a VMM may take to answer a command.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a child may live on after it has closed its socket.
const LAST_ACT: Duration = Duration::from_secs(1);
/// As much of what a child says is taken for one line.
const MAX_LINE: usize = 400;
/// As many lines of the guest's log go into an error.
const TAIL_IN_ERROR: usize = 3;

/// Whatever a VM is started from, open.
#[derive(Debug)]
pub struct Parts {
    vmm: PathBuf,
    fsd: PathBuf,
    kvm: OwnedFd,
    kernel: OwnedFd,
    initrd: OwnedFd,
    printk: Option<PrintkLayout>,
}

impl Parts {
    /// Opens all of it, or tells what is missing.
    pub fn open(config: &Config) -> Result<Self, SandboxError> {
        for (what, path) in [("VMM", &config.vmm), ("fs server", &config.fsd)] {
            rustix::fs::access(path, rustix::fs::Access::EXEC_OK).map_err(|errno| {
                SandboxError::failed(
                    format!("find the {what} {}", path.display()),
                    io::Error::from(errno),
                )
            })?;
        }
        Ok(Self {
            vmm: config.vmm.clone(),
            fsd: config.fsd.clone(),
            kvm: open_kvm(Path::new(KVM))?,
            kernel: open("guest kernel", &config.kernel)?.into(),
            initrd: open("guest image", &config.initrd)?.into(),
            printk: read_printk(&config.printk)?,
        })
    }

    /// The layout of the guest's log, if this kernel's was recorded.
    pub fn printk(&self) -> Option<PrintkLayout> {
        self.printk.clone()
    }
}

/// The user id of this shim's VMM.
pub fn vmm_uid() -> u32 {
    FIRST_UID + std::process::id()
}

fn open_kvm(path: &Path) -> Result<OwnedFd, SandboxError> {
    let opened = File::options().read(true).write(true).open(path);
    opened.map(OwnedFd::from).map_err(|cause| {
        let uid = rustix::process::geteuid().as_raw();
        let hint = match cause.kind() {
            io::ErrorKind::NotFound => {
                "; load kvm_intel or kvm_amd; in a virtual machine, its host must allow nesting"
                    .to_owned()
            }
            io::ErrorKind::PermissionDenied => format!("; the shim runs as uid {uid}"),
            _ => String::new(),
        };
        let step = format!("open {} to run virtual machines{hint}", path.display());
        SandboxError::failed(step, cause)
    })
}

fn open(what: &str, path: &Path) -> Result<File, SandboxError> {
    let failed = |cause| SandboxError::failed(format!("open the {what} {}", path.display()), cause);
    let file = File::open(path).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    match about.is_file() {
        true => Ok(file),
        false => Err(failed(io::Error::other("it is not a file"))),
    }
}

/// A kernel without the record has no log, and runs.
fn read_printk(path: &Path) -> Result<Option<PrintkLayout>, SandboxError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            tracing::warn!("no {}: the guest's log can't be read", path.display());
            return Ok(None);
        }
        Err(cause) => {
            let step = format!("open the layout of the guest's log {}", path.display());
            return Err(SandboxError::failed(step, cause));
        }
    };
    serde_json::from_reader(io::BufReader::new(file))
        .map(Some)
        .map_err(|cause| {
            let step = format!("read the layout of the guest's log {}", path.display());
            SandboxError::failed(step, cause)
        })
}

/// The shim's end of a child's control socket, for the event loop.
#[derive(Debug)]
struct Control(Channel);

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Starts a program with a control socket.
fn start(
    what: &str,
    program: &Path,
    cgroup: Option<BorrowedFd>,
) -> Result<(Child, AsyncFd<Control>), SandboxError> {
    let failed = |step: &str| format!("{step} of the {what}");
    let (ours, theirs) = Channel::pair()
        .map_err(|cause| SandboxError::failed(failed("make the control socket"), cause))?;
    let stderr = io::stderr();
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let newborn = birth(&Birth {
        program,
        arguments: &[&name],
        environment: &[],
        directory: Path::new("/"),
        cgroup,
        network: Network::Inherited,
        descriptors: &[None, None, Some(stderr.as_fd()), Some(theirs.as_fd())],
    })
    .map_err(|cause| SandboxError::failed(format!("start the {what}"), cause))?;
    let child = Child::watch(newborn)
        .map_err(|cause| SandboxError::failed(failed("watch the process"), cause))?;
    // SAFETY: `Control` owns the one descriptor of the socket and neither closes nor changes it
    // while it lives, and the AsyncFd owns the `Control`.
    let control = unsafe { AsyncFd::register(Control(ours)) }.map_err(|cause| {
        child.kill();
        SandboxError::failed(failed("watch the control socket"), io::Error::from(cause))
    })?;
    Ok((child, control))
}

/// The next message of a child, whenever it comes.
async fn next<T: DeserializeOwned>(control: &AsyncFd<Control>) -> Result<T, ChannelError> {
    loop {
        let mut ready = control
            .readable()
            .await
            .map_err(|source| ChannelError::Io {
                step: "wait for a message",
                source,
            })?;
        match control.get_ref().0.receive_within::<T>(Duration::ZERO) {
            Ok((message, _)) => return Ok(message),
            // Somebody else's readiness, or a stale one.
            Err(ChannelError::TimedOut(_)) => ready.clear_ready(),
            Err(error) => return Err(error),
        }
    }
}

/// Waits for a child that has closed its socket; one that lingers is killed.
async fn last_act(child: &Child) -> Exit {
    if let Ok(exit) = tokio::time::timeout(LAST_ACT, child.exited()).await {
        return exit;
    }
    child.kill();
    child.exited().await
}

/// A line from a jailed child, which may be the guest's by now: no control characters, not long.
fn clean(line: &str) -> String {
    line.chars()
        .map(|char| if char.is_control() { ' ' } else { char })
        .take(MAX_LINE)
        .collect()
}

/// The fs server.
#[derive(Debug)]
pub struct Fsd {
    child: Child,
    over: watch::Receiver<Option<String>>,
}

impl Fsd {
    /// Starts it and waits until it serves every share.
    pub async fn start(
        parts: &Parts,
        cgroup: BorrowedFd<'_>,
        boot: &FsdBoot,
        fds: FsdFds,
    ) -> Result<Self, SandboxError> {
        let (child, control) = start("fs server", &parts.fsd, Some(cgroup))?;
        let (tell, over) = watch::channel(None);
        let fsd = Self { child, over };
        boot.send(&fds, &control.get_ref().0).map_err(|cause| {
            SandboxError::failed("send the boot request to the fs server", cause)
        })?;
        drop(fds);
        let first = tokio::time::timeout(OWN_START, next::<FsdReport>(&control)).await;
        match first {
            Ok(Ok(FsdReport::Serving)) => {}
            Ok(Ok(FsdReport::Failed { why })) => {
                return Err(SandboxError::new(
                    SandboxErrorKind::Failed,
                    format!("start the fs server: {}", clean(&why)),
                ));
            }
            Ok(Err(cause)) => {
                let exit = last_act(&fsd.child).await;
                let step = format!("wait for the fs server, which {exit}");
                return Err(SandboxError::failed(step, cause));
            }
            Err(_) => return Err(silent("fs server", "it serves the pod's share")),
        }
        let child = fsd.child.clone();
        tokio::spawn(async move {
            let mut why = None;
            while let Ok(report) = next::<FsdReport>(&control).await {
                if let FsdReport::Failed { why: line } = report {
                    why = Some(clean(&line));
                }
            }
            let exit = last_act(&child).await;
            tell.send_replace(Some(match why {
                Some(why) => format!("the fs server failed: {why}"),
                None => format!("the fs server {exit}"),
            }));
        });
        Ok(fsd)
    }

    /// Its process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Waits for its end, and tells why it came.
    pub fn over(&self) -> impl Future<Output = String> + Send + 'static + use<> {
        wait_for(self.over.clone())
    }
}

impl Drop for Fsd {
    fn drop(&mut self) {
        self.child.kill();
    }
}

fn silent(what: &str, wanted: &str) -> SandboxError {
    SandboxError::new(
        SandboxErrorKind::DeadlineExceeded,
        format!("wait until {wanted}: no word from the {what} within {OWN_START:?}"),
    )
}

async fn wait_for(mut over: watch::Receiver<Option<String>>) -> String {
    match over.wait_for(Option::is_some).await {
        Ok(why) => why.clone().unwrap_or_default(),
        Err(_) => "its watcher is gone".to_owned(),
    }
}

/// How far a VM has come.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Running,
    Connected(Figures),
}

/// Who waits for an answer of the VMM, in the order of the commands.
type Pending = Mutex<VecDeque<oneshot::Sender<VmReport>>>;

/// The VMM and its VM. Clones refer to the same one; the last one dropped kills it.
#[derive(Clone, Debug)]
pub struct Vmm(Arc<Running>);

#[derive(Debug)]
struct Running {
    child: Child,
    control: Arc<AsyncFd<Control>>,
    pending: Arc<Pending>,
    phase: watch::Receiver<Phase>,
    over: watch::Receiver<Option<String>>,
    log: File,
}

impl Vmm {
    /// Starts it and waits until the VM is made and the jail is closed. `log` is the file of the
    /// guest's log, to be read here.
    pub async fn start(
        parts: &Parts,
        cgroup: BorrowedFd<'_>,
        boot: &VmBoot,
        resources: Resources,
    ) -> Result<Self, SandboxError> {
        Self::start_in(parts, Some(cgroup), boot, resources).await
    }

    async fn start_in(
        parts: &Parts,
        cgroup: Option<BorrowedFd<'_>>,
        boot: &VmBoot,
        resources: Resources,
    ) -> Result<Self, SandboxError> {
        let copy = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(|cause| SandboxError::failed("copy a descriptor for the VMM", cause))
        };
        let log_copy = resources.log.try_clone().map_err(|cause| {
            SandboxError::failed("copy the descriptor of the guest's log", cause)
        })?;
        let fds = VmFds {
            kvm: copy(&parts.kvm)?,
            kernel: copy(&parts.kernel)?,
            initrd: copy(&parts.initrd)?,
            guest_log: log_copy.into(),
            agent: resources.agent,
            streams: resources.streams,
            shares: resources.shares,
        };
        let (child, control) = start("VMM", &parts.vmm, cgroup)?;
        let (tell_phase, phase) = watch::channel(Phase::Starting);
        let (tell_over, over) = watch::channel(None);
        let vmm = Self(Arc::new(Running {
            child: child.clone(),
            control: Arc::new(control),
            pending: Arc::default(),
            phase,
            over,
            log: resources.log,
        }));
        boot.send(&fds, &vmm.0.control.get_ref().0)
            .map_err(|cause| SandboxError::failed("send the boot request to the VMM", cause))?;
        drop(fds);
        let control = Arc::clone(&vmm.0.control);
        let pending = Arc::clone(&vmm.0.pending);
        tokio::spawn(async move {
            let why = follow(&control, &pending, &tell_phase, &child).await;
            lock(&pending).clear();
            tell_over.send_replace(Some(why));
        });
        vmm.reached("the VM is made", OWN_START, |phase| {
            *phase != Phase::Starting
        })
        .await?;
        Ok(vmm)
    }

    /// Its process.
    pub fn child(&self) -> &Child {
        &self.0.child
    }

    /// Waits for the VM's end, and tells why it came.
    pub fn over(&self) -> impl Future<Output = String> + Send + 'static + use<> {
        wait_for(self.0.over.clone())
    }

    /// Whether the VM has ended.
    pub fn is_over(&self) -> bool {
        self.0.over.borrow().is_some() || self.0.child.exit().is_some()
    }

    async fn reached(
        &self,
        wanted: &str,
        deadline: Duration,
        is_it: impl Fn(&Phase) -> bool + Send,
    ) -> Result<Phase, SandboxError> {
        let mut phase = self.0.phase.clone();
        tokio::select! {
            biased;
            reached = wait_for_phase(&mut phase, is_it) => match reached {
                Some(phase) => Ok(phase),
                // The following task has ended, and says why right away.
                None => Err(ended(&self.over().await)),
            },
            why = self.over() => Err(ended(&why)),
            () = tokio::time::sleep(deadline) => Err(silent("VMM", wanted)),
        }
    }

    /// Waits for the agent's dial, for as long as the guest gets on with its boot: `patience` is
    /// how long it may show no progress, ten times that the end in any case.
    pub async fn agent_dialled(&self, patience: Duration) -> Result<Figures, SandboxError> {
        let (begin, mut progress) = (Instant::now(), Progress::default());
        let mut changed = begin;
        loop {
            let step = (patience / 10).clamp(Duration::from_millis(50), Duration::from_secs(1));
            match self
                .reached("", step, |phase| matches!(phase, Phase::Connected(_)))
                .await
            {
                Ok(Phase::Connected(figures)) => return Ok(figures),
                Err(error) if error.kind() != SandboxErrorKind::DeadlineExceeded => {
                    return Err(error);
                }
                _ => {}
            }
            let now = self.progress().await;
            if now != progress {
                (progress, changed) = (now, Instant::now());
            }
            let why = if changed.elapsed() >= patience {
                format!("the guest has shown no progress for {patience:?}")
            } else if begin.elapsed() >= patience * 10 {
                format!("the guest still boots after {:?}", begin.elapsed())
            } else {
                continue;
            };
            return Err(SandboxError::new(
                SandboxErrorKind::DeadlineExceeded,
                format!(
                    "wait for the agent: {why}{}",
                    in_error(&self.log_tail().await)
                ),
            ));
        }
    }

    /// What changes while a guest works. Exits alone do not count: a timer makes them in an idle
    /// one.
    pub async fn progress(&self) -> Progress {
        let log_length = match self.command(VmCommand::WriteLog).await {
            Ok(_) => self.0.log.metadata().map_or(0, |about| about.len()),
            Err(_) => 0,
        };
        match self.command(VmCommand::Figures).await {
            Ok(VmReport::Figures(figures)) => Progress {
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

    async fn command(&self, command: VmCommand) -> Result<VmReport, SandboxError> {
        let (tell, answer) = oneshot::channel();
        {
            // Both under the lock: answers come in the order of the commands.
            let mut pending = lock(&self.0.pending);
            let sent = self.0.control.get_ref().0.send(&command, &[]);
            sent.map_err(|cause| SandboxError::failed("send a command to the VMM", cause))?;
            pending.push_back(tell);
        }
        match tokio::time::timeout(ANSWER, answer).await {
            Ok(Ok(report)) => Ok(report),
            Ok(Err(_)) => Err(SandboxError::new(
                SandboxErrorKind::Failed,
                "ask the VMM: it has ended",
            )),
            Err(_) => Err(SandboxError::new(
                SandboxErrorKind::DeadlineExceeded,
                format!("ask the VMM: no answer within {ANSWER:?}"),
            )),
        }
    }

    /// The last lines of the guest's log.
    pub async fn log_tail(&self) -> Vec<String> {
        let _ = self.command(VmCommand::WriteLog).await;
        tail_of(&self.0.log).unwrap_or_default()
    }

    /// Ends the VM: by command, then by force. Returns when the process is gone, or after `limit`
    /// twice.
    pub async fn stop(&self, limit: Duration) {
        if !self.is_over() {
            let _ = self.0.control.get_ref().0.send(&VmCommand::Stop, &[]);
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

/// Figures that change while a guest works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    page_faults: u64,
    user_exits: u64,
    resident_bytes: u64,
    log_length: u64,
}

fn lock(pending: &Pending) -> MutexGuard<'_, VecDeque<oneshot::Sender<VmReport>>> {
    // Nothing panics while it is held; and if it did, the queue would still be whole.
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ended(why: &str) -> SandboxError {
    SandboxError::new(SandboxErrorKind::Failed, format!("run the VM: {why}"))
}

/// Follows a VMM's reports to its end, and tells why it ended.
async fn follow(
    control: &AsyncFd<Control>,
    pending: &Pending,
    phase: &watch::Sender<Phase>,
    child: &Child,
) -> String {
    let mut last = None;
    let broken = loop {
        match next::<VmReport>(control).await {
            Ok(VmReport::Running) => {
                phase.send_replace(Phase::Running);
            }
            Ok(VmReport::AgentConnected(figures)) => {
                phase.send_replace(Phase::Connected(figures));
            }
            Ok(VmReport::Ended(end)) => last = Some(end),
            Ok(answer) => {
                let waiting = lock(pending).pop_front();
                if let Some(waiting) = waiting {
                    let _ = waiting.send(answer);
                }
            }
            Err(ChannelError::Closed) => break None,
            Err(error) => {
                // What can't be understood is not obeyed further.
                child.kill();
                break Some(one_line(&error));
            }
        }
    };
    let exit = last_act(child).await;
    match (last, broken) {
        (Some(end), _) => reason(&end),
        (None, Some(broken)) => format!("the VMM sent what can't be read: {}", clean(&broken)),
        (None, None) => format!("the VMM {exit}, without a reason"),
    }
}

/// The reason of an end, with the last lines of the guest's log; all of them go to the shim's log.
fn reason(end: &End) -> String {
    if end.reason == EndReason::Stopped {
        return clean(&end.detail);
    }
    for line in end.log_tail.iter().take(200) {
        tracing::warn!("guest: {}", clean(line));
    }
    format!("{}{}", clean(&end.detail), in_error(&end.log_tail))
}

fn in_error(tail: &[String]) -> String {
    let from = tail.len().saturating_sub(TAIL_IN_ERROR);
    match tail.get(from..) {
        None | Some([]) => String::new(),
        Some(lines) => {
            let lines: Vec<String> = lines.iter().map(|line| clean(line)).collect();
            format!("; the guest's log ends with: {}", lines.join(" | "))
        }
    }
}

/// The last lines of a file, however long it is.
fn tail_of(file: &File) -> io::Result<Vec<String>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; 4096];
    let length = file.metadata()?.len();
    let start = length.saturating_sub(bytes.len() as u64);
    let count = file.read_at(&mut bytes, start)?;
    bytes.truncate(count);
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text
        .lines()
        .map(clean)
        .filter(|line| !line.is_empty())
        .collect();
    Ok(lines)
}

#[cfg(test)]
mod tests;
