//! Processes of this host, as `/proc` tells of them.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::{Patience, TestResult, failure};

/// A process that is not a kernel thread and not a zombie.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// Kernel threads have this flag (PF_KTHREAD in linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

impl Process {
    /// Looks one up; `None` if it is not there (any more), a zombie or a kernel thread.
    pub fn find(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let flags: u64 = fields.get(6)?.parse().ok()?;
        if matches!(*fields.first()?, "Z" | "X") || flags & KERNEL_THREAD != 0 {
            return None;
        }
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = line
            .split(|byte| *byte == 0)
            .filter(|part| !part.is_empty())
            .map(|part| String::from_utf8_lossy(part).into_owned())
            .collect();
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            name: name.into(),
            arguments,
        })
    }

    /// All of them.
    pub fn all() -> Vec<Self> {
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(Self::find)
            .collect()
    }

    /// Whether its name or its program holds this text.
    pub fn is(&self, name: &str) -> bool {
        self.arguments
            .first()
            .is_some_and(|program| program.contains(name))
            || name.starts_with(&self.name)
    }

    /// How long ago it was started.
    pub fn age(&self) -> TestResult<Duration> {
        let stat = self.read("stat")?;
        let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let ticks: f64 = after_name.split(' ').nth(19).unwrap_or_default().parse()?;
        let uptime = fs::read_to_string("/proc/uptime")?;
        let uptime: f64 = uptime.split(' ').next().unwrap_or_default().parse()?;
        let hertz = 100.0; // USER_HZ, fixed on x86
        Ok(Duration::from_secs_f64((uptime - ticks / hertz).max(0.0)))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> TestResult {
        let pid = Pid::from_raw(self.pid).ok_or_else(|| failure("pid 0"))?;
        kill_process(pid, signal)
            .map_err(|error| failure(format!("signal {} ({}): {error}", self.pid, self.name)))
    }

    /// Whether it is still there.
    pub fn is_alive(&self) -> bool {
        Self::find(self.pid).is_some_and(|now| now.name == self.name)
    }

    /// A file of it in `/proc`, as text.
    pub fn read(&self, file: &str) -> TestResult<String> {
        let path = PathBuf::from(format!("/proc/{}", self.pid)).join(file);
        fs::read_to_string(&path)
            .map_err(|error| failure(format!("read {}: {error}", path.display())))
    }

    /// The memory that it holds by itself, in KiB: neither files nor what it shares.
    pub fn anonymous_kib(&self) -> TestResult<u64> {
        let status = self.read("status")?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let number = line.and_then(|rest| rest.split_whitespace().next());
        let number = number.ok_or_else(|| failure(format!("no RssAnon in: {status}")))?;
        Ok(number.parse()?)
    }

    /// How many threads it has.
    pub fn threads(&self) -> TestResult<u64> {
        Ok(fs::read_dir(format!("/proc/{}/task", self.pid))?.count() as u64)
    }

    /// How many file descriptors it has open.
    pub fn open_files(&self) -> TestResult<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid))?.count())
    }
}

/// Waits until something holds.
pub fn until(what: &str, deadline: Duration, mut holds: impl FnMut() -> bool) -> TestResult {
    let patience = Patience::new(deadline);
    while !holds() {
        if patience.is_over() {
            return Err(failure(format!("not within {deadline:?}: {what}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
