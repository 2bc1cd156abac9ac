//! How the kernel treats a process: scheduler, priority of input and output, personality.
//!
//! Called by `init` and `exec` in the container's process, while it has its privileges. The command
//! keeps all three, and so do its children.

use std::ffi::c_int;

use kata_like_failure::{Failure, Step};
use kata_like_spec::{PERSONALITY_FLAG, SCHED_ISO};
use nix::sys::personality::{self, Persona};
use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Process, Spec,
};

use super::error::Result;
use super::syscall::{self, SchedulerAttributes};

/// Bits of a priority below its class (linux/ioprio.h).
const CLASS_SHIFT: c_int = 13;

/// PER_LINUX and PER_LINUX32 (linux/personality.h).
const LINUX: c_int = 0;
const LINUX32: c_int = 8;

/// What the process's own object and the container ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Scheduling {
    scheduler: Option<SchedulerAttributes>,
    io_priority: Option<c_int>,
    personality: Option<c_int>,
}

impl Scheduling {
    /// Checks both. `field` is the process's path in the spec.
    pub(super) fn of(process: &Process, spec: &Spec, field: &str) -> Result<Self> {
        let linux = spec.linux().as_ref();
        let personality = linux.and_then(|linux| linux.personality().as_ref());
        Ok(Self {
            scheduler: scheduler(process, field)?,
            io_priority: io_priority(process, field)?,
            personality: personality.map(self::personality).transpose()?,
        })
    }

    /// Sets all three on this process.
    pub(super) fn apply(&self) -> Result<()> {
        if let Some(attributes) = &self.scheduler {
            syscall::sched_setattr(attributes).step(|| "set the scheduler")?;
        }
        if let Some(priority) = self.io_priority {
            syscall::ioprio_set(priority).step(|| "set the priority of input and output")?;
        }
        if let Some(personality) = self.personality {
            personality::set(Persona::from_bits_retain(personality))
                .step(|| "set the personality")?;
        }
        Ok(())
    }
}

fn scheduler(process: &Process, field: &str) -> Result<Option<SchedulerAttributes>> {
    let Some(asked) = process.scheduler() else {
        return Ok(None);
    };
    let policy = match asked.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(SCHED_ISO.of(format_args!("{field}.scheduler.policy")));
        }
    };
    let priority = asked.priority().unwrap_or(0);
    let flags = asked.flags().iter().flatten();
    Ok(Some(SchedulerAttributes {
        size: SchedulerAttributes::SIZE,
        policy,
        flags: flags.fold(0, |flags, flag| flags | bit(*flag)),
        nice: asked.nice().unwrap_or(0),
        priority: u32::try_from(priority).map_err(|_| {
            Failure::bad(
                format!("{field}.scheduler.priority"),
                format!("{priority} is below zero"),
            )
        })?,
        runtime: asked.runtime().unwrap_or(0),
        deadline: asked.deadline().unwrap_or(0),
        period: asked.period().unwrap_or(0),
    }))
}

/// SCHED_FLAG_… (linux/sched.h).
fn bit(flag: LinuxSchedulerFlag) -> u64 {
    match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    }
}

fn io_priority(process: &Process, field: &str) -> Result<Option<c_int>> {
    let Some(asked) = process.io_priority() else {
        return Ok(None);
    };
    let class: c_int = match asked.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match c_int::try_from(asked.priority()) {
        Ok(priority @ 0..=7) => Ok(Some(class << CLASS_SHIFT | priority)),
        _ => Err(Failure::bad(
            format!("{field}.ioPriority.priority"),
            format!("{} is not in the range 0-7", asked.priority()),
        )),
    }
}

fn personality(asked: &LinuxPersonality) -> Result<c_int> {
    if asked
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        // The specification has none so far.
        return Err(PERSONALITY_FLAG.of("linux.personality.flags"));
    }
    Ok(match asked.domain() {
        LinuxPersonalityDomain::PerLinux => LINUX,
        LinuxPersonalityDomain::PerLinux32 => LINUX32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduling(process: &str, linux: &str) -> Result<Scheduling> {
        let process = format!(r#"{{"cwd": "/", "user": {{"uid": 0, "gid": 0}}, {process}}}"#);
        let spec = format!(r#"{{"ociVersion": "1.2.0", "linux": {linux}}}"#);
        let (process, spec) = (
            serde_json::from_str(&process).unwrap(),
            serde_json::from_str(&spec).unwrap(),
        );
        Scheduling::of(&process, &spec, "process")
    }

    #[test]
    fn the_names_have_the_kernels_numbers() {
        let ours = scheduling(
            r#""scheduler": {"policy": "SCHED_RR", "priority": 7, "flags": ["SCHED_RESET_ON_FORK"]},
               "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}"#,
            r#"{"personality": {"domain": "LINUX32"}}"#,
        );
        let ours = match ours {
            Ok(ours) => ours,
            Err(error) => panic!("{error}"),
        };
        let scheduler = ours.scheduler.unwrap();
        assert_eq!(
            (scheduler.policy, scheduler.priority, scheduler.flags),
            (2, 7, 1)
        );
        assert_eq!(ours.io_priority, Some(3 << 13));
        assert_eq!(ours.personality, Some(8));
        let none = scheduling(r#""args": ["x"]"#, "{}").unwrap();
        assert_eq!(none, Scheduling::default());
    }

    #[test]
    fn nonsense_is_named() {
        for (process, linux, field) in [
            (
                r#""ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 8}"#,
                "{}",
                "process.ioPriority.priority",
            ),
            (
                r#""scheduler": {"policy": "SCHED_FIFO", "priority": -1}"#,
                "{}",
                "process.scheduler.priority",
            ),
            (
                r#""scheduler": {"policy": "SCHED_ISO"}"#,
                "{}",
                "process.scheduler.policy",
            ),
            (
                r#""args": ["x"]"#,
                r#"{"personality": {"domain": "LINUX", "flags": ["x"]}}"#,
                "linux.personality.flags",
            ),
        ] {
            let error = scheduling(process, linux).unwrap_err().one_line();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
