//! Boots one guest as a pod's, without its file system: the shim's part, from the spawn to the
//! agent's dial.
//!
//! Called by `check`. Every descriptor is a memfd or a socket without a path, so nothing can stay
//! behind. The VMM ends with its control socket, whatever happens to this process.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kata_like_agent_protocol::{AGENT_PORT, STREAM_PORT};
use kata_like_boot::{
    CONTROL_FD, Channel, ChannelError, End, EndReason, Figures, HugePages, KVM, Pace, PrintkLayout,
    VERSION, VmBoot, VmCommand, VmFds, VmReport, open_kvm,
};
use kata_like_config::Config;
use kata_like_config::state::UIDS;
use kata_like_linux::command::hand_over;

/// How long a VMM may take to stop before it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(2);
/// How many parts of the guest's log are asked for: more than a guest that is not hostile has.
const LOG_PARTS: usize = 64;

/// How many bytes of a log are searched for its last line.
const LOG_TAIL: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Kvm(#[from] kata_like_boot::KvmUnavailable),
    /// Only root can give the VMM a user id of its own.
    #[error("start the VMM under a user id of its own: this needs root")]
    NotRoot,
    /// A part of the installation is missing.
    #[error("open the {what} {}", path.display())]
    Open {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file with the layout of the guest's log is no such thing.
    #[error("read the layout of the guest's log {}", path.display())]
    Printk {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{step}")]
    Prepare {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("start the VMM {}", path.display())]
    Spawn {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{step}")]
    Channel {
        step: &'static str,
        #[source]
        source: ChannelError,
    },
    /// The VMM ended without a last message.
    #[error("run the VMM {}: it ended with {status} and without a reason{last_line}", path.display())]
    Lost {
        path: PathBuf,
        status: String,
        /// Of the VMM's standard error.
        last_line: LastLine,
    },
    /// The VMM ended and said why.
    #[error("boot the guest: {detail}{last_line}")]
    Ended {
        detail: String,
        /// Of the guest's log.
        last_line: LastLine,
    },
    /// The guest runs, but its agent does not dial.
    #[error("wait for the guest's agent: no dial within {} s{pace}{last_line}", deadline.as_secs())]
    Silent {
        deadline: Duration,
        pace: Slowness,
        /// Of the guest's log.
        last_line: LastLine,
    },
}

/// The last line of a log, if it has one.
#[derive(Debug, PartialEq, Eq)]
pub struct LastLine(Option<String>);

impl fmt::Display for LastLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .as_ref()
            .map_or(Ok(()), |line| write!(f, "; last line of its log: {line:?}"))
    }
}

/// What became of the guest's time, if the host tells.
#[derive(Debug)]
pub struct Slowness(Option<Pace>);

impl fmt::Display for Slowness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |pace| write!(f, "; {pace}"))
    }
}

/// A guest that has booted.
#[derive(Debug)]
pub struct Booted {
    /// From the spawn of the VMM to the agent's dial.
    pub took: Duration,
    /// The VM's stats at the dial.
    pub figures: Figures,
    memory_mib: u32,
    vcpus: u8,
}

impl fmt::Display for Booted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            took,
            figures,
            memory_mib,
            vcpus,
        } = self;
        let guest = Duration::from_nanos(figures.elapsed_ns);
        write!(
            f,
            "ok: a guest with {memory_mib} MiB and {vcpus} vCPUs booted in {} ms ({} ms from its first instruction; \
             {} exits, {} of them to the VMM; {} MiB resident)",
            took.as_millis(),
            guest.as_millis(),
            figures.exits,
            figures.user_exits,
            figures.resident_bytes >> 20,
        )
    }
}

/// Boots the guest of a pod without limits, then stops it.
pub fn boot(config: &Config) -> Result<Booted, BootError> {
    boot_with(config, Path::new(KVM))
}

fn boot_with(config: &Config, kvm: &Path) -> Result<Booted, BootError> {
    let kvm = open_kvm(kvm)?;
    if !rustix::process::geteuid().is_root() {
        return Err(BootError::NotRoot);
    }
    let printk = open("layout of the guest's log", &config.printk)?;
    let printk: PrintkLayout =
        serde_json::from_reader(io::BufReader::new(printk)).map_err(|source| {
            BootError::Printk {
                path: config.printk.clone(),
                source,
            }
        })?;
    let kernel = open("guest kernel", &config.kernel)?.into();
    let initrd = open("initrd", &config.initrd)?.into();

    let (_agent, agent) = UnixStream::pair().map_err(prepare("make the agent's socket"))?;
    let streams =
        listening_socket().map_err(|errno| prepare("make the socket for streams")(errno.into()))?;
    let fds = VmFds {
        kvm,
        kernel,
        initrd,
        agent: agent.into(),
        streams,
        shares: Vec::new(),
    };
    let request = VmBoot {
        version: VERSION,
        // A number after those of the pods: no pod's, no other check's, and nobody's either.
        uid: UIDS.end + std::process::id(),
        memory_bytes: u64::from(config.memory_mib) << 20,
        vcpus: config.max_vcpus,
        huge_pages: match config.hugepages {
            kata_like_config::HugePages::Transparent => HugePages::Transparent,
            kata_like_config::HugePages::Hugetlb => HugePages::Hugetlb,
        },
        agent_port: AGENT_PORT,
        stream_port: STREAM_PORT,
        shares: Vec::new(),
        printk: Some(printk),
    };

    let begin = Instant::now();
    let mut vmm = Vmm::spawn(&config.vmm)?;
    if let Err(source) = request.send(&fds, &vmm.control) {
        return Err(vmm.explain("send the boot request to the VMM", source));
    }
    drop(fds);
    let figures = vmm.wait_for_agent(begin + config.boot_deadline, config.boot_deadline)?;
    let took = begin.elapsed();
    vmm.stop();
    Ok(Booted {
        took,
        figures,
        memory_mib: config.memory_mib,
        vcpus: config.max_vcpus,
    })
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|source| BootError::Open {
        what,
        path: path.into(),
        source,
    })
}

fn memfd(step: &'static str) -> Result<File, BootError> {
    rustix::fs::memfd_create("kata-like-check", rustix::fs::MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(|errno| prepare(step)(errno.into()))
}

/// A socket that the VMM can listen on and nobody will find: the kernel picks a name that is no
/// path (unix(7), autobind).
fn listening_socket() -> rustix::io::Result<OwnedFd> {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
    };
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    bind(&socket, &SocketAddrUnix::new_unnamed())?;
    listen(&socket, 1)?;
    Ok(socket)
}

fn prepare(step: &'static str) -> impl FnOnce(io::Error) -> BootError {
    move |source| BootError::Prepare { step, source }
}

/// The running VMM; killed and reaped when it is dropped.
struct Vmm {
    path: PathBuf,
    child: Child,
    control: Channel,
    stderr: File,
}

impl Vmm {
    fn spawn(path: &Path) -> Result<Self, BootError> {
        let (ours, theirs) = Channel::pair().map_err(|source| BootError::Channel {
            step: "make the VMM's control socket",
            source,
        })?;
        let stderr = memfd("make a file for the VMM's standard error")?;
        let its_stderr = stderr.try_clone().map_err(prepare("copy a descriptor"))?;
        let mut command = Command::new(path);
        command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(its_stderr);
        hand_over(&mut command, &[theirs.as_fd()], CONTROL_FD)
            .map_err(prepare("copy a descriptor"))?;
        let child = command.spawn().map_err(|source| BootError::Spawn {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            path: path.into(),
            child,
            control: ours,
            stderr,
        })
    }

    /// Waits for the dial. Half-way it asks for the VM's figures, to tell a slow guest from a stuck
    /// one.
    fn wait_for_agent(&mut self, end: Instant, deadline: Duration) -> Result<Figures, BootError> {
        let (mut asked, mut half) = (false, None);
        loop {
            let until = if asked { end } else { end - deadline / 2 };
            let left = until.saturating_duration_since(Instant::now());
            match self.control.receive_within::<VmReport>(left) {
                Ok((VmReport::AgentConnected(figures), _)) => return Ok(figures),
                Ok((VmReport::Ended(end), _)) => return Err(ended(end)),
                Ok((VmReport::Figures(figures), _)) => half = Some(figures),
                Ok(_) => {}
                Err(ChannelError::TimedOut(_)) if !asked => {
                    asked = true;
                    // If it is not sent, the next message is the end.
                    let _ = self.control.send(&VmCommand::Figures, &[]);
                }
                Err(ChannelError::TimedOut(_)) => return Err(self.silent(deadline, half)),
                Err(source) => return Err(self.explain("wait for a report of the VMM", source)),
            }
        }
    }

    fn silent(&self, deadline: Duration, half: Option<Figures>) -> BootError {
        // What changes while a guest boots, but not in one that spins with a timer running.
        let work = |at: Figures| (at.user_exits, at.page_faults, at.resident_bytes);
        let gets_on = half.is_some_and(|half| {
            let now = self.figures();
            now.is_some_and(|now| work(now) != work(half))
        });
        let pace = Pace::of(self.child.id(), deadline, gets_on).ok();
        BootError::Silent {
            deadline,
            pace: Slowness(pace),
            last_line: self.last_line_of_guest(),
        }
    }

    /// The VM's figures now; none: the VMM does not answer within a second.
    fn figures(&self) -> Option<Figures> {
        self.control.send(&VmCommand::Figures, &[]).ok()?;
        match self.control.receive_within(Duration::from_secs(1)) {
            Ok((VmReport::Figures(figures), _)) => Some(figures),
            _ => None,
        }
    }

    /// Asks for the guest's log, and waits for each part of it a second at most.
    fn last_line_of_guest(&self) -> LastLine {
        let mut last = LastLine(None);
        for _ in 0..LOG_PARTS {
            if self.control.send(&VmCommand::ReadLog, &[]).is_err() {
                break;
            }
            match self.control.receive_within(Duration::from_secs(1)) {
                Ok((VmReport::Log { text, more }, _)) => {
                    last = LastLine(last_of(&text).0.or(last.0));
                    if !more {
                        break;
                    }
                }
                _ => break,
            }
        }
        last
    }

    /// A broken control socket usually means a dead VMM; its last words or its status say more.
    fn explain(&mut self, step: &'static str, source: ChannelError) -> BootError {
        if !matches!(source, ChannelError::Closed) {
            return BootError::Channel { step, source };
        }
        while let Ok((report, _)) = self.control.receive_within(Duration::ZERO) {
            if let VmReport::Ended(end) = report {
                return ended(end);
            }
        }
        match self.wait(STOP_DEADLINE) {
            Some(status) => BootError::Lost {
                path: self.path.clone(),
                status: describe(status),
                last_line: self.stderr.try_clone().map_or(LastLine(None), last_line),
            },
            None => BootError::Channel { step, source },
        }
    }

    fn stop(&mut self) {
        // If the VMM does not take the command it is killed when `self` is dropped.
        if self.control.send(&VmCommand::Stop, &[]).is_ok() {
            self.wait(STOP_DEADLINE);
        }
    }

    /// Waits for the process's end, by its pidfd.
    fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let flags = rustix::process::PidfdFlags::empty();
        if let Ok(pidfd) = rustix::process::pidfd_open(pid, flags) {
            readable_within(pidfd.as_fd(), deadline);
        }
        self.child.try_wait().ok().flatten()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn ended(end: End) -> BootError {
    // After a panic the reason is a line of the log itself, though not the last one.
    let last_line = match end.reason {
        EndReason::Panic | EndReason::GuestOutOfMemory => LastLine(None),
        _ => LastLine(end.log_tail.last().cloned()),
    };
    BootError::Ended {
        detail: end.detail,
        last_line,
    }
}

fn readable_within(fd: BorrowedFd, deadline: Duration) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let end = Instant::now() + deadline;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            timeout.as_ref(),
        ) {
            Err(rustix::io::Errno::INTR) => continue,
            _ => return,
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (_, Some(libc::SIGSYS)) => {
            "signal 31 (a system call that its filter does not allow)".into()
        }
        (_, Some(signal)) => format!("signal {signal}"),
        (Some(code), None) => format!("status {code}"),
        (None, None) => "an unknown status".into(),
    }
}

/// The last line of a file that somebody else wrote: cleaned, and of bounded length.
fn last_line(mut file: File) -> LastLine {
    let size = file.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = Vec::new();
    let read = file
        .seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL)))
        .and_then(|_| file.take(LOG_TAIL).read_to_end(&mut bytes));
    if read.is_err() {
        return LastLine(None);
    }
    last_of(&String::from_utf8_lossy(&bytes))
}

fn last_of(text: &str) -> LastLine {
    let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    LastLine(last.map(|line| line.chars().take(300).collect()))
}

#[cfg(test)]
mod tests;
