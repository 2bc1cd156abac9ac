//! A container's limits against those of its VM, which is as large as it was made.
//!
//! A running VM does not grow: a limit that only a larger one could give is
//! refused, rather than accepted and never had.

use oci_spec::runtime::LinuxResources;

use crate::spec::MemorySize;
use kata_like_failure::{Failure, Kind};
use kata_like_spec::{MEMORY_OF_THE_VM, VCPUS};

const MIB: u64 = 1 << 20;

/// Those of a container's limits that its VM bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// In bytes.
    pub(super) memory: Option<u64>,
    /// In microseconds of each period.
    pub(super) cpu_quota: Option<i64>,
}

impl Limits {
    /// The limits after a change.
    pub(super) fn changed_by(self, wanted: &LinuxResources) -> Self {
        let memory = wanted.memory().as_ref().and_then(|memory| memory.limit());
        let quota = wanted.cpu().as_ref().and_then(|cpu| cpu.quota());
        Self {
            memory: match memory {
                None | Some(0) => self.memory,
                Some(limit) => u64::try_from(limit).ok(),
            },
            cpu_quota: quota.or(self.cpu_quota),
        }
    }
}

/// An OCI `linux.resources` object from its JSON.
pub(super) fn parse(resources: &[u8]) -> Result<LinuxResources, Failure> {
    let bad = |why: String| {
        Failure::new(
            Kind::BadRequest,
            format!("parse the new linux.resources: {why}"),
        )
    };
    // serde would take an array for the object's fields in a row.
    if resources.trim_ascii_start().starts_with(b"[") {
        return Err(bad("it is a JSON array, not an object".to_owned()));
    }
    serde_json::from_slice(resources).map_err(|error| bad(error.to_string()))
}

/// What stays as it is was accepted before, however large: CRI sends all limits with each change.
pub(super) fn fits(
    wanted: &LinuxResources,
    limits: Limits,
    memory: &MemorySize,
    vcpus: u8,
) -> Result<(), Failure> {
    let limit = wanted.memory().as_ref().and_then(|memory| memory.limit());
    if let Some(limit) = limit.and_then(|limit| u64::try_from(limit).ok())
        && limit > memory.bytes
        && Some(limit) != limits.memory
    {
        return Err(MEMORY_OF_THE_VM.because(
            format_args!("linux.resources.memory.limit of {} MiB", limit / MIB),
            format_args!("{memory}; a running one can't be made larger"),
        ));
    }
    let Some(cpu) = wanted.cpu() else {
        return Ok(());
    };
    if let (Some(quota), Some(period @ 1..)) = (cpu.quota(), cpu.period())
        && Some(quota) != limits.cpu_quota
        && let Ok(quota) = u64::try_from(quota)
        && quota > period.saturating_mul(u64::from(vcpus))
    {
        return Err(VCPUS.because(
            format_args!("linux.resources.cpu.quota of {quota} in {period} microseconds"),
            format_args!(
                "the pod's virtual machine has {vcpus} vCPU(s); a running one can't be given more"
            ),
        ));
    }
    Ok(())
}

/// What a container that ran out of memory was bound by.
pub(super) fn out_of_memory(limit: Option<u64>, memory: &MemorySize) -> String {
    match limit {
        Some(limit) => format!(
            "its limit linux.resources.memory.limit is {} MiB; {memory}",
            limit / MIB
        ),
        None => format!("it has no limit of its own; {memory}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: MemorySize = MemorySize {
        bytes: 256 * MIB,
        key: "`memory_mib` of the configuration",
    };

    fn refused(json: &str) -> Option<String> {
        let wanted = parse(json.as_bytes()).unwrap();
        fits(&wanted, Limits::default(), &MEMORY, 2)
            .err()
            .map(|error| error.one_line())
    }

    #[test]
    fn what_only_a_larger_vm_could_give_is_refused_with_the_key() {
        for fine in [
            "{}",
            r#"{"memory":{"limit":268435456}}"#,
            r#"{"memory":{"limit":-1}}"#,
            r#"{"cpu":{"quota":200000,"period":100000}}"#,
            r#"{"cpu":{"quota":-1,"period":100000}}"#,
            r#"{"cpu":{"shares":1024}}"#,
        ] {
            assert_eq!(refused(fine), None, "{fine}");
        }
        let line = refused(r#"{"memory":{"limit":268435457}}"#).unwrap();
        assert!(
            line.contains("memory.limit") && line.contains("sized by `memory_mib`"),
            "{line}"
        );
        let line = refused(r#"{"cpu":{"quota":200001,"period":100000}}"#).unwrap();
        assert!(
            line.contains("cpu.quota") && line.contains("2 vCPU(s)"),
            "{line}"
        );
        for bad in ["[1]", " []", "{", "7"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_was_accepted_before_stays() {
        let json = br#"{"memory":{"limit":268435457},"cpu":{"quota":200001,"period":100000}}"#;
        let wanted = parse(json).unwrap();
        let limits = Limits::default().changed_by(&wanted);
        assert!(fits(&wanted, Limits::default(), &MEMORY, 2).is_err());
        assert!(fits(&wanted, limits, &MEMORY, 2).is_ok());
        let unlimited = parse(br#"{"memory":{"limit":-1}}"#).unwrap();
        let wanted = Limits {
            memory: None,
            ..limits
        };
        assert_eq!(limits.changed_by(&unlimited), wanted);
        assert_eq!(limits.changed_by(&parse(b"{}").unwrap()), limits);
    }

    #[test]
    fn what_ran_out_of_memory_names_the_limit_and_the_key() {
        assert!(out_of_memory(Some(64 * MIB), &MEMORY).contains("is 64 MiB; the pod's"));
    }
}
