//! Translates `linux.resources` of the OCI spec into lines for the files of a cgroup v2.
//!
//! Called by `spec.rs`, before anything of a container exists, and by `resources.rs` for an update.
//! What can't be done is refused by the field's name (`kata-like-spec`). The conversions are
//! runc's, so that a limit means here what it means there (OCI runtime spec, config-linux.md;
//! Linux, Documentation/admin-guide/cgroup-v2.rst).
//!
//! Left out on purpose: `devices` (the runner's filter). `cpu.cpus` and `cpu.mems` number the
//! host's processors and nodes: they count if the guest has all of these numbers.

use kata_like_failure::Failure;
use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

/// The period that runc takes for a quota without one, in microseconds. It is the kernel's default.
const DEFAULT_PERIOD: u64 = 100_000;

/// What to write into the files of a cgroup, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits(pub Vec<Setting>);

/// One line for one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The fields below `linux.resources` that the line comes from. The first one names it in
    /// errors.
    pub fields: Vec<String>,
    /// The name of the file.
    pub file: String,
    /// What is written into it.
    pub value: String,
    /// Whether it can be left out.
    pub need: Need,
}

/// Whether a setting can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Always,
    /// A kernel without this file keeps the limit anyway: it has nothing of what is limited.
    IfThere,
    /// The line lists the host's numbers. It counts if this machine has them all.
    IfNumbered,
}

impl Limits {
    /// Translates the resources, or names the field that can't be.
    pub fn of(resources: &LinuxResources) -> Result<Self, Failure> {
        kata_like_spec::refuse_resources(resources)?;
        let mut limits = Self::default();
        if let Some(cpu) = resources.cpu() {
            limits.cpu(cpu)?;
        }
        if let Some(memory) = resources.memory() {
            limits.memory(memory)?;
        }
        if let Some(pids) = resources.pids() {
            match pids.limit() {
                0 => {}
                limit => limits.set(&["pids.limit"], "pids.max", limit_or_max(limit)),
            }
        }
        for limit in resources.hugepage_limits().iter().flatten() {
            limits.huge_pages(limit)?;
        }
        // Last, since they may make the others stricter (OCI runtime spec, "Unified").
        let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
        unified.sort();
        for (file, value) in unified {
            limits.unified(file, value)?;
        }
        Ok(limits)
    }

    fn set(&mut self, fields: &[&str], file: &str, value: impl ToString) {
        self.set_if(Need::Always, fields, file, value);
    }

    fn set_if(&mut self, need: Need, fields: &[&str], file: &str, value: impl ToString) {
        self.0.push(Setting {
            fields: fields.iter().map(ToString::to_string).collect(),
            file: file.into(),
            value: value.to_string(),
            need,
        });
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), Failure> {
        match cpu.idle() {
            None => {}
            Some(idle @ (0 | 1)) => self.set(&["cpu.idle"], "cpu.idle", idle),
            Some(other) => return Err(bad("cpu.idle", format!("{other} is neither 0 nor 1"))),
        }
        // An idle group has no weight: writing one would fail (cpu.idle in cgroup-v2.rst).
        if let Some(weight) = cpu.shares().and_then(weight_of_shares)
            && cpu.idle() != Some(1)
        {
            self.set(&["cpu.shares", "cpu.idle"], "cpu.weight", weight);
        }
        let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
        if quota != 0 || period != 0 {
            let period = if period == 0 { DEFAULT_PERIOD } else { period };
            let value = format!("{} {period}", limit_or_max(quota));
            self.set(&["cpu.quota", "cpu.period"], "cpu.max", value);
        }
        if let Some(burst) = cpu.burst() {
            if quota > 0 && burst > quota.unsigned_abs() {
                let why = format!("{burst} is more than cpu.quota, {quota}");
                return Err(bad("cpu.burst", why));
            }
            self.set(&["cpu.burst", "cpu.quota"], "cpu.max.burst", burst);
        }
        for (field, file, numbers) in [
            ("cpu.cpus", "cpuset.cpus", cpu.cpus()),
            ("cpu.mems", "cpuset.mems", cpu.mems()),
        ] {
            match numbers.as_deref() {
                None | Some("") => {}
                Some(numbers) => self.host_numbers(field, file, numbers)?,
            }
        }
        Ok(())
    }

    fn host_numbers(&mut self, field: &str, file: &str, numbers: &str) -> Result<(), Failure> {
        if ranges(numbers).is_none() {
            let why = format!("{numbers:?} is no list of numbers such as 0-3,7");
            return Err(bad(field, why));
        }
        self.set_if(Need::IfNumbered, &[field], file, numbers);
        Ok(())
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), Failure> {
        let limit = memory.limit().unwrap_or(0);
        if let Some(swap) = swap_alone(memory.swap().unwrap_or(0), limit)? {
            let fields = &["memory.swap", "memory.limit"];
            self.set_if(Need::IfThere, fields, "memory.swap.max", swap);
        }
        if limit != 0 {
            self.set(&["memory.limit"], "memory.max", limit_or_max(limit));
        }
        match memory.reservation().unwrap_or(0) {
            0 => {}
            low => self.set(&["memory.reservation"], "memory.low", limit_or_max(low)),
        }
        Ok(())
    }

    fn huge_pages(&mut self, limit: &LinuxHugepageLimit) -> Result<(), Failure> {
        let size = limit.page_size();
        let plain = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !plain {
            return Err(bad("hugepageLimits", format!("no page size: {size:?}")));
        }
        let (field, file) = (
            format!("hugepageLimits[{size}]"),
            format!("hugetlb.{size}.max"),
        );
        // kubelet limits every size to 0 where none is asked for.
        match limit.limit() {
            0 => self.set_if(Need::IfThere, &[&field], &file, 0),
            limit => self.set(&[&field], &file, limit_or_max(limit)),
        }
        Ok(())
    }

    fn unified(&mut self, file: &str, value: &str) -> Result<(), Failure> {
        let field = format!("unified[{file}]");
        let (controller, rest) = file.split_once('.').unwrap_or((file, ""));
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_');
        if !rest.bytes().all(plain) || rest.is_empty() {
            return Err(bad(&field, "not the name of a cgroup file".into()));
        }
        match controller {
            "cpuset" if matches!(rest, "cpus" | "mems") => {
                self.host_numbers(&field, file, value)?
            }
            _ => self.set(&[&field], file, value),
        }
        Ok(())
    }
}

/// Reads a list of numbers and ranges, such as `0-3,7`, as ranges with both ends.
pub fn ranges(list: &str) -> Option<Vec<(u32, u32)>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last).then_some((first, last))
    };
    list.trim().split(',').map(range).collect()
}

fn bad(field: &str, why: String) -> Failure {
    Failure::bad(format!("linux.resources.{field}"), why)
}

/// The spec's numbers are signed. Anything below zero means no limit; so does 0 for a quota.
fn limit_or_max(limit: i64) -> String {
    if limit > 0 {
        limit.to_string()
    } else {
        "max".into()
    }
}

/// Converts CPU shares (2 to 262,144, 1,024 by default) to a weight (1 to 10,000, 100 by default):
/// the quadratic in log2 through these three points, as runc has it since 1.3.2.
fn weight_of_shares(shares: u64) -> Option<u64> {
    const MOST_SHARES: u64 = 262_144;
    match shares {
        0 => None,
        1..=2 => Some(1),
        MOST_SHARES.. => Some(10_000),
        _ => {
            // Below 2^18: exact as f64, and the result lies between 1 and 10,000.
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            Some(10_f64.powf(exponent).ceil() as u64)
        }
    }
}

/// cgroup v1, whose terms the spec uses, limits memory and swap together. v2 limits swap alone.
fn swap_alone(both: i64, memory: i64) -> Result<Option<String>, Failure> {
    match (both, memory) {
        // No limit of memory lifts that of swap too, as under runc.
        (0, -1) => Ok(Some("max".into())),
        (0, _) => Ok(None),
        (..0, _) => Ok(Some("max".into())),
        (_, ..=0) => Err(bad("memory.swap", "it needs memory.limit beside it".into())),
        (both, memory) if both < memory => Err(bad(
            "memory.swap",
            format!("{both} is less than memory.limit, {memory}"),
        )),
        (both, memory) => Ok(Some((both - memory).to_string())),
    }
}

#[cfg(test)]
mod tests;
