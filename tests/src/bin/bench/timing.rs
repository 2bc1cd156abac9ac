//! The time of one command, without a poll that would round it.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kata_like_tests::{TestResult, failure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// No command of the bench takes as long.
const DEADLINE: Duration = Duration::from_secs(300);

/// Runs a command that must succeed. Its time in milliseconds, and its standard output.
pub fn run(mut command: Command) -> TestResult<(f64, String)> {
    let what = format!("{command:?}");
    let begun = Instant::now();
    let streams = command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = streams.stderr(Stdio::piped()).spawn()?;
    let pid = i32::try_from(child.id())?;
    let pid = Pid::from_raw(pid).ok_or_else(|| failure("a child without a pid"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Timespec {
        tv_sec: i64::try_from(DEADLINE.as_secs())?,
        tv_nsec: 0,
    };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&deadline))?;
    let took = begun.elapsed();
    if ended == 0 {
        let _ = child.kill();
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failure(format!("{what}: {}: {said}", output.status)));
    }
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok((took.as_secs_f64() * 1e3, text))
}
