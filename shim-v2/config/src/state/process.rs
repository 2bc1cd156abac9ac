//! A process that is still the one it was: its pid together with its start time.
//!
//! A pid alone names whoever has it now. The start time (field 22 of /proc/PID/stat, in clock ticks
//! since boot) tells a reused pid from the process that the record means, and a signal goes through
//! a pidfd that was opened before the check, so that nobody else can be hit.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

/// A process, by pid and start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// The pid in the host's pid namespace.
    pub pid: i32,
    /// Clock ticks between the host's boot and the start of the process.
    pub start_time: u64,
}

impl Process {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> io::Result<Self> {
        let start_time = start_time(pid)?;
        Ok(Self { pid, start_time })
    }

    /// The calling process.
    pub fn current() -> io::Result<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// A pidfd of the process; `None` if it is gone, whoever has its pid now. A zombie is not gone.
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        // A record could hold any number; `from_raw` takes none below zero.
        let pid = Some(self.pid)
            .filter(|pid| *pid > 0)
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a pid"))?;
        let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        match start_time(self.pid) {
            Ok(start_time) if start_time == self.start_time => Ok(Some(fd)),
            Ok(_) => Ok(None),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Signals the process; `false` if it is gone.
    pub fn signal(&self, signal: Signal) -> io::Result<bool> {
        let Some(fd) = self.open()? else {
            return Ok(false);
        };
        match rustix::process::pidfd_send_signal(&fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sets what the kernel adds to its badness when memory runs out (proc_pid_oom_score_adj(5),
    /// −1000 to 1000); `false` if it is gone.
    pub fn set_oom_score(&self, score: i32) -> io::Result<bool> {
        let set = || {
            // Opened before the check: if the process lives then, it had the pid at the opening.
            let path = format!("/proc/{}/oom_score_adj", self.pid);
            let mut file = File::options().write(true).open(path)?;
            if self.open()?.is_none() {
                return Ok(false);
            }
            file.write_all(score.to_string().as_bytes())?;
            Ok(true)
        };
        match set() {
            Err(error) if is_gone(&error) => Ok(false),
            done => done,
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    // The file can't be opened, or it can and the process dies before it is read.
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "no start time in /proc/PID/stat",
        )
    })
}

/// Field 22. The name, field 2, is the process's own choice and can hold spaces and brackets: count
/// from its end.
fn parse_start_time(stat: &[u8]) -> Option<u64> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end_of_name + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_the_start_time() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) b (1 2) {}", fields.join(" "));
        assert_eq!(parse_start_time(stat.as_bytes()), Some(22));
        assert_eq!(parse_start_time(b"7 (sleep) S 1"), None);
        assert_eq!(parse_start_time(b""), None);
    }

    #[test]
    fn another_process_with_the_pid_is_not_the_one() {
        let us = Process::current().unwrap();
        assert!(us.open().unwrap().is_some());
        let other = Process {
            start_time: us.start_time + 1,
            ..us
        };
        assert!(other.open().unwrap().is_none());
        assert!(!other.signal(Signal::KILL).unwrap());
        assert!(!other.set_oom_score(1000).unwrap());
    }

    #[test]
    fn a_reaped_child_is_gone() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let process = Process::of(child.id() as i32).unwrap();
        assert!(process.set_oom_score(1000).unwrap());
        let path = format!("/proc/{}/oom_score_adj", process.pid);
        assert_eq!(std::fs::read_to_string(path).unwrap(), "1000\n");
        let error = process.set_oom_score(1001).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(process.signal(Signal::KILL).unwrap());
        child.wait().unwrap();
        assert!(process.open().unwrap().is_none());
        assert!(!process.set_oom_score(1000).unwrap());
        assert!(
            Process {
                pid: -1,
                start_time: 0
            }
            .open()
            .is_err()
        );
    }
}
