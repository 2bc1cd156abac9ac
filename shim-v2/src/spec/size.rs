//! The VM's size, by the limits of its first container or its pod.

use oci_spec::runtime::Spec;

use super::bad;
use crate::error::SandboxError;

/// Limits that a VM's size follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizePart {
    /// The memory limit in bytes.
    pub memory: Option<u64>,
    /// CPU quota and period in microseconds.
    pub cpu: Option<(u64, u64)>,
}

/// Sandbox-wide sums that kubelet passes on the sandbox container.
pub(super) const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
pub(super) const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

pub(super) fn size_of(spec: &Spec) -> Result<SizePart, SandboxError> {
    let annotation = |key: &str| {
        let Some(text) = spec.annotations().as_ref().and_then(|all| all.get(key)) else {
            return Ok(None);
        };
        let number: i64 = text
            .parse()
            .map_err(|_| bad(&format!("annotation {key}: {text:?} is not a number")))?;
        Ok(u64::try_from(number).ok().filter(|number| *number > 0))
    };
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let own_memory = resources
        .and_then(|all| all.memory().as_ref())
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit > 0);
    let own_cpu = resources
        .and_then(|all| all.cpu().as_ref())
        .and_then(|cpu| {
            let quota = u64::try_from(cpu.quota()?)
                .ok()
                .filter(|quota| *quota > 0)?;
            // The kernel's default period (sched-bwc.rst).
            Some((quota, cpu.period().unwrap_or(100_000)))
        });
    let pod_cpu = annotation(SANDBOX_QUOTA)?.zip(annotation(SANDBOX_PERIOD)?);
    Ok(SizePart {
        memory: annotation(SANDBOX_MEMORY)?.or(own_memory),
        cpu: pod_cpu.or(own_cpu),
    })
}

pub(super) const MIB: u64 = 1 << 20;
/// What the guest needs beside its containers: kernel, agent, and page cache to run them from.
const OVERHEAD: u64 = 128 * MIB;
/// The least memory of a VM.
pub(super) const LEAST: u64 = 256 * MIB;
/// The most vCPUs that the VMM takes.
const MOST_VCPUS: u64 = 32;

impl SizePart {
    /// The VM's memory in bytes, a multiple of 2 MiB: `default` without a limit, else the limit and
    /// what the guest itself needs, which is 128 MiB and a 64th for its page structs (64 bytes for
    /// each 4 KiB); at least 256 MiB, and no more than the host has.
    pub fn memory_bytes(&self, default: u64, host: u64) -> u64 {
        let wanted = match self.memory {
            None => default,
            Some(limit) => limit.saturating_add(OVERHEAD).saturating_add(limit / 64),
        };
        let most = (host / (2 * MIB) * (2 * MIB)).max(LEAST);
        wanted.clamp(LEAST, most).div_ceil(2 * MIB) * (2 * MIB)
    }

    /// The VM's vCPUs: as many as the quota can keep busy, at least one, else `default`.
    pub fn vcpus(&self, default: u8, online: u8) -> u8 {
        let wanted = match self.cpu {
            None | Some((_, 0)) => u64::from(default),
            Some((quota, period)) => quota.div_ceil(period).min(u64::from(online)),
        };
        u8::try_from(wanted.clamp(1, MOST_VCPUS)).unwrap_or(1)
    }
}
