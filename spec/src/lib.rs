//! Which fields of an OCI runtime spec are refused, and why: one table for both sides.
//!
//! The shim calls [`refuse`] at Create and [`refuse_process`] at Exec, before a VM exists or is
//! asked. The agent calls [`refuse_resources`], since an update reaches it alone. Some refusals
//! need more than the spec: what lies at a path, what another container has. Their rows have names,
//! and the module that knows makes the error with [`Refusal::of`]. `docs/limitations.md` tells
//! users of each field; a test here compares the two.

use kata_like_failure::Failure;
use oci_spec::runtime::{LinuxResources, Process, Spec};

mod refusal;
mod table;
#[cfg(test)]
mod tests;

pub use refusal::Refusal;
pub use table::*;

use refusal::Find;

/// Refuses what the spec of a container asks for and no container gets.
///
/// # Errors
/// The first row of the table that finds its field.
pub fn refuse(spec: &Spec) -> Result<(), Failure> {
    let resources = (spec.linux().as_ref()).and_then(|linux| linux.resources().as_ref());
    first(|find| match find {
        Find::Spec(find) => find(spec),
        Find::Process(find) => spec.process().as_ref().and_then(find),
        Find::Resources(find) => resources.and_then(find),
        Find::Elsewhere => None,
    })
}

/// Refuses what the process of an exec asks for and no process gets.
///
/// # Errors
/// The first row of the table that finds its field.
pub fn refuse_process(process: &Process) -> Result<(), Failure> {
    first(|find| match find {
        Find::Process(find) => find(process),
        _ => None,
    })
}

/// Refuses limits that no cgroup of the guest has.
///
/// # Errors
/// The first row of the table that finds its field.
pub fn refuse_resources(resources: &LinuxResources) -> Result<(), Failure> {
    first(|find| match find {
        Find::Resources(find) => find(resources),
        _ => None,
    })
}

fn first(found: impl Fn(Find) -> Option<String>) -> Result<(), Failure> {
    let refused = |row: &Refusal| found(row.find).map(|field| row.of(field));
    TABLE.iter().find_map(refused).map_or(Ok(()), Err)
}
