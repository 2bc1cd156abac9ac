//! The VMM and the fs server: started with open descriptors, and watched.
//!
//! Called by `machine`. Each child is born in the pod's cgroup with one socket, descriptor 3; all
//! it is to use comes over that socket (`kata_like_boot`), opened here, so a missing file or a lack
//! of permission is found and told before anything runs. A child that ends closes its socket and
//! makes its pidfd readable; what it said last, or how it ended, is the reason that [`Vmm::ended`]
//! and [`Fsd::ended`] give. Dropped, a child is killed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kata_like_boot::{Channel, ChannelError, KVM, PrintkLayout, open_kvm};
use kata_like_config::Config;
use kata_like_linux::watch::Watched;
use serde::de::DeserializeOwned;
use tokio::io::Interest;

use crate::spawn::{Birth, Child, Exit, Network, birth};
use kata_like_failure::{Failure, Kind};

mod fsd;
mod vmm;

pub use fsd::{Fsd, FsdEnd};
pub use vmm::{Resources, Vmm, log_figures};

/// How long a child may get no further with what is no work of the guest's: its own start and jail.
const OWN_START: Duration = Duration::from_secs(30);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(500);
/// How long a child may live on after it has closed its socket.
const LAST_ACT: Duration = Duration::from_secs(1);
/// As much of what a child says is taken for one line.
const MAX_LINE: usize = 400;

/// Whatever a VM is started from, open.
#[derive(Debug)]
pub struct Parts {
    vmm: PathBuf,
    fsd: PathBuf,
    kvm: OwnedFd,
    kernel: OwnedFd,
    initrd: OwnedFd,
    printk: Option<PrintkLayout>,
    label: Option<String>,
}

impl Parts {
    /// Opens all of it, or tells what is missing. VMM and fs server are to run under the SELinux
    /// label `label`.
    pub fn open(config: &Config, label: Option<String>) -> Result<Self, Failure> {
        for (what, path) in [("VMM", &config.vmm), ("fs server", &config.fsd)] {
            rustix::fs::access(path, rustix::fs::Access::EXEC_OK).map_err(|errno| {
                Failure::failed(
                    format!("find the {what} {}", path.display()),
                    io::Error::from(errno),
                )
            })?;
        }
        Ok(Self {
            vmm: config.vmm.clone(),
            fsd: config.fsd.clone(),
            kvm: open_kvm(Path::new(KVM))
                .map_err(|error| Failure::new(Kind::Failed, kata_like_failure::one_line(&error)))?,
            kernel: open("guest kernel", &config.kernel)?.into(),
            initrd: open("guest image", &config.initrd)?.into(),
            printk: read_printk(&config.printk)?,
            label,
        })
    }

    /// The layout of the guest's log, if this kernel's was recorded.
    pub fn printk(&self) -> Option<PrintkLayout> {
        self.printk.clone()
    }
}

fn open(what: &str, path: &Path) -> Result<File, Failure> {
    let failed = |cause| Failure::failed(format!("open the {what} {}", path.display()), cause);
    let file = File::open(path).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    match about.is_file() {
        true => Ok(file),
        false => Err(failed(io::Error::other("it is not a file"))),
    }
}

/// A kernel without the record has no log, and runs.
fn read_printk(path: &Path) -> Result<Option<PrintkLayout>, Failure> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            tracing::warn!("no {}: the guest's log can't be read", path.display());
            return Ok(None);
        }
        Err(cause) => {
            let step = format!("open the layout of the guest's log {}", path.display());
            return Err(Failure::failed(step, cause));
        }
    };
    serde_json::from_reader(io::BufReader::new(file))
        .map(Some)
        .map_err(|cause| {
            let step = format!("read the layout of the guest's log {}", path.display());
            Failure::failed(step, cause)
        })
}

/// The shim's end of a child's control socket, for the event loop.
#[derive(Debug)]
struct Control(Channel);

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Starts a program with a control socket, under a label of SELinux if there is one.
fn start(
    what: &str,
    program: &Path,
    cgroup: Option<BorrowedFd>,
    label: Option<&str>,
) -> Result<(Child, Watched<Control>), Failure> {
    let failed = |step: &str| format!("{step} of the {what}");
    let (ours, theirs) = Channel::pair()
        .map_err(|cause| Failure::failed(failed("make the control socket"), cause))?;
    let stderr = io::stderr();
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let newborn = birth(&Birth {
        program,
        arguments: &[&name],
        environment: &[],
        directory: Path::new("/"),
        cgroup,
        network: Network::Inherited,
        mounts: None,
        label,
        descriptors: &[None, None, Some(stderr.as_fd()), Some(theirs.as_fd())],
    })
    .map_err(|cause| Failure::failed(format!("start the {what}"), cause))?;
    let child = Child::watch(newborn)
        .map_err(|cause| Failure::failed(failed("watch the process"), cause))?;
    // A child that reads no more must not hold a thread of the shim's up.
    ours.set_nonblocking().map_err(|cause| {
        child.kill();
        Failure::failed(failed("prepare the control socket"), cause)
    })?;
    let both = Interest::READABLE | Interest::WRITABLE;
    let control = Watched::new(Control(ours), both).map_err(|cause| {
        child.kill();
        Failure::failed(failed("watch the control socket"), cause)
    })?;
    Ok((child, control))
}

/// The next message of a child, whenever it comes.
async fn next<T: DeserializeOwned>(control: &Watched<Control>) -> Result<T, ChannelError> {
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

/// How long one child's end may take to follow the other's that caused it.
const CONSEQUENCE: Duration = Duration::from_millis(500);

/// Waits until the VMM or the fs server has ended. Each ends when the other does: the answer is the
/// cause, not the consequence.
pub async fn either_ended(
    vmm: impl Future<Output = String>,
    fsd: impl Future<Output = FsdEnd>,
) -> String {
    tokio::pin!(vmm, fsd);
    tokio::select! {
        why = &mut vmm => match tokio::time::timeout(CONSEQUENCE, fsd).await {
            Ok(end) if !end.expected => end.why,
            _ => why,
        },
        end = &mut fsd => match end.expected {
            false => end.why,
            true => tokio::time::timeout(CONSEQUENCE, vmm).await.unwrap_or(end.why),
        },
    }
}

/// A line from a jailed child, which may be the guest's by now.
fn clean(line: &str) -> String {
    kata_like_failure::clean(line, MAX_LINE)
}

/// Waits for `work` while the child makes progress. Gives up after `patience` without CPU time
/// used, or after ten times `patience` in total.
async fn getting_on<T>(
    what: &str,
    wanted: &str,
    child: &Child,
    patience: Duration,
    work: impl Future<Output = T>,
) -> Result<T, Failure> {
    tokio::pin!(work);
    let begin = Instant::now();
    let (mut used, mut changed) = (cpu_time(child.pid), begin);
    loop {
        if let Ok(done) = tokio::time::timeout(LOOK.min(patience), &mut work).await {
            return Ok(done);
        }
        let now = cpu_time(child.pid);
        if now != used {
            (used, changed) = (now, Instant::now());
        }
        if changed.elapsed() >= patience || begin.elapsed() >= patience * 10 {
            return Err(Failure::new(
                Kind::DeadlineExceeded,
                format!(
                    "wait until {wanted}: no word from the {what} within {:.1?}, and no work for {:.1?}",
                    begin.elapsed(),
                    changed.elapsed()
                ),
            ));
        }
    }
}

/// The CPU time that a process has used, in ticks: for its programs, for the kernel
/// (proc_pid_stat(5)).
fn cpu_time(pid: u32) -> Option<[u64; 2]> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut times = after_name.split(' ').skip(11).map(str::parse);
    Some([times.next()?.ok()?, times.next()?.ok()?])
}

#[cfg(test)]
mod tests;
