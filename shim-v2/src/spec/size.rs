//! The VM's size, by the limits of its first container or its pod.

use oci_spec::runtime::{LinuxResources, Spec};

use super::parts::bad;
use kata_like_failure::{Failure, Kind};

/// Limits that a VM's size follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizePart {
    /// The memory limit in bytes, and the key that it is from.
    pub memory: Option<(u64, &'static str)>,
    /// Huge pages of 2 MiB, in bytes: beside the memory limit, as Kubernetes counts them.
    pub huge_pages: u64,
    /// CPU quota and period in microseconds.
    pub cpu: Option<(u64, u64)>,
}

/// A VM's memory, and why it is so much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    /// In bytes, a multiple of 2 MiB.
    pub bytes: u64,
    /// The key that it follows: what is to be raised by whoever needs more.
    pub key: &'static str,
}

impl std::fmt::Display for MemorySize {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            to,
            "the pod's virtual machine has {} MiB, sized by {}",
            self.bytes / MIB,
            self.key
        )
    }
}

/// The key of a pod without limits.
const DEFAULT_KEY: &str = "`memory_mib` of the configuration";
/// The key of a container of its own.
const OWN_KEY: &str = "linux.resources.memory.limit";
/// Sandbox-wide sums that kubelet passes on the sandbox container.
pub(super) const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
pub(super) const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
pub(super) const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// The periods that the kernel takes, in microseconds, and its default (sched-bwc.rst).
const PERIODS: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;
const DEFAULT_PERIOD: u64 = 100_000;

/// A number in an annotation; 0 is none, as CRI has it.
fn annotation(spec: &Spec, key: &str) -> Result<Option<i64>, Failure> {
    let Some(text) = spec.annotations().as_ref().and_then(|all| all.get(key)) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(0) => Ok(None),
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(bad(&format!("annotation {key}: {text:?} is not a number"))),
    }
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref())
}

/// A container's own memory limit in bytes.
pub(super) fn own_memory(spec: &Spec) -> Option<u64> {
    resources(spec)
        .and_then(|all| all.memory().as_ref())
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit > 0)
}

/// A container's own limit of 2 MiB pages in bytes. One that is larger than any host's memory is
/// there to be no limit.
fn own_huge_pages(spec: &Spec) -> u64 {
    let limits = resources(spec).and_then(|all| all.hugepage_limits().as_ref());
    let mut limits = limits.into_iter().flatten();
    let limit = limits.find(|limit| limit.page_size() == "2MB");
    let limit = limit.and_then(|limit| u64::try_from(limit.limit()).ok());
    limit.filter(|limit| *limit < NO_LIMIT).unwrap_or(0)
}

/// A container's own CPU quota in microseconds.
pub(super) fn own_quota(spec: &Spec) -> Option<i64> {
    resources(spec)?.cpu().as_ref()?.quota()
}

pub(super) fn size_of(spec: &Spec) -> Result<SizePart, Failure> {
    let own_cpu = resources(spec)
        .and_then(|all| all.cpu().as_ref())
        .and_then(|cpu| {
            let quota = u64::try_from(cpu.quota()?)
                .ok()
                .filter(|quota| *quota > 0)?;
            Some((quota, cpu.period().unwrap_or(DEFAULT_PERIOD)))
        });
    let pod_memory = annotation(spec, SANDBOX_MEMORY)?
        .map(|number| {
            u64::try_from(number)
                .map_err(|_| bad(&format!("annotation {SANDBOX_MEMORY}: {number} is below 0")))
        })
        .transpose()?;
    let period = match annotation(spec, SANDBOX_PERIOD)? {
        None => DEFAULT_PERIOD,
        Some(number) => u64::try_from(number)
            .ok()
            .filter(|period| PERIODS.contains(period))
            .ok_or_else(|| {
                let (least, most) = (PERIODS.start(), PERIODS.end());
                bad(&format!(
                    "annotation {SANDBOX_PERIOD}: {number} is not within {least} to {most}"
                ))
            })?,
    };
    // A quota below 0 is no limit, for the pod as for the kernel.
    let pod_cpu = annotation(spec, SANDBOX_QUOTA)?
        .and_then(|quota| u64::try_from(quota).ok())
        .map(|quota| (quota, period));
    Ok(SizePart {
        memory: match (pod_memory, own_memory(spec)) {
            (Some(limit), _) => Some((limit, SANDBOX_MEMORY)),
            (None, Some(limit)) => Some((limit, OWN_KEY)),
            (None, None) => None,
        },
        huge_pages: own_huge_pages(spec),
        cpu: pod_cpu.or(own_cpu),
    })
}

pub(super) const MIB: u64 = 1 << 20;
/// What the guest needs beside its containers: kernel, agent, and page cache to run them from.
const OVERHEAD: u64 = 128 * MIB;
/// The least memory of a VM that is sized by a limit.
pub(super) const LEAST: u64 = 256 * MIB;
/// 16 TiB.
const NO_LIMIT: u64 = 1 << 44;
/// The most vCPUs that the VMM takes.
const MOST_VCPUS: u64 = 32;

impl SizePart {
    /// The VM's memory: `default` bytes without a limit, which the host must have; else the limit,
    /// huge pages and what the guest itself needs, which is 128 MiB and a 64th for its page structs
    /// (64 bytes for each 4 KiB), at least 256 MiB, and no more than the host has.
    pub fn memory(&self, default: u64, host: u64) -> Result<MemorySize, Failure> {
        let most = (host / (2 * MIB) * (2 * MIB)).max(LEAST);
        let Some((limit, key)) = self.memory else {
            if default > most {
                return Err(Failure::new(
                    Kind::Failed,
                    format!(
                        "{DEFAULT_KEY}: {} MiB is more than this host has, {} MiB",
                        default / MIB,
                        host / MIB
                    ),
                ));
            }
            return Ok(MemorySize {
                bytes: default.div_ceil(2 * MIB) * (2 * MIB),
                key: DEFAULT_KEY,
            });
        };
        let limit = limit.saturating_add(self.huge_pages);
        let wanted = limit.saturating_add(OVERHEAD).saturating_add(limit / 64);
        Ok(MemorySize {
            bytes: wanted.clamp(LEAST, most).div_ceil(2 * MIB) * (2 * MIB),
            key,
        })
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
