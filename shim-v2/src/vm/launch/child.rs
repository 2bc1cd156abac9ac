//! A child with a control socket: its birth, its messages, its patience and its end.
//!
//! Called by `vmm`, `fsd`, `proxy` and `reports`, for what the programs have in common.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kata_like_boot::{BORN_IN, Channel, ChannelError};
use kata_like_linux::watch::Watched;
use kata_like_proxy::wire;
use serde::de::DeserializeOwned;
use tokio::io::Interest;

use super::parts::Place;
use crate::spawn::{Birth, Child, Exit, Network, birth};
use kata_like_failure::{Failure, Kind};

/// How long a child may get no further with what is no work of the guest's: its own start and jail.
pub(super) const OWN_START: Duration = Duration::from_secs(30);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(500);
/// How long a child may live on after it has closed its socket.
const LAST_ACT: Duration = Duration::from_secs(1);
/// As much of what a child says is taken for one line.
const MAX_LINE: usize = 400;

/// The shim's end of a child's control socket, for the event loop.
pub(super) type Control = Channel;

/// Starts a program with a control socket, as `place` says.
pub(super) fn start(
    what: &str,
    program: &Path,
    cgroup: Option<BorrowedFd>,
    place: &Place,
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
        network: Network::New,
        namespaces: BORN_IN,
        mounts: None,
        label: place.label.as_deref(),
        oom_score: Some(place.oom_score),
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
    let control = Watched::new(ours, both).map_err(|cause| {
        child.kill();
        Failure::failed(failed("watch the control socket"), cause)
    })?;
    Ok((child, control))
}

/// The next message of a child, whenever it comes.
pub(super) async fn next<T: DeserializeOwned>(
    control: &Watched<Control>,
) -> Result<T, ChannelError> {
    let (message, _) = wire::receive(control).await?;
    Ok(message)
}

/// Waits for a child that has closed its socket; one that lingers is killed.
pub(super) async fn last_act(child: &Child) -> Exit {
    if let Ok(exit) = tokio::time::timeout(LAST_ACT, child.exited()).await {
        return exit;
    }
    child.kill();
    child.exited().await
}

/// A line from a jailed child, which may be the guest's by now.
pub(super) fn clean(line: &str) -> String {
    kata_like_failure::clean(line, MAX_LINE)
}

/// Waits for `work` while the child makes progress. Gives up after `patience` without CPU time
/// used, or after ten times `patience` in total.
pub(super) async fn getting_on<T>(
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
