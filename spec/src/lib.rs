//! Which fields of an OCI runtime spec are refused, and why: one table for both sides.
//!
//! The shim calls [`refuse`] at Create and [`refuse_process`] at Exec, before a VM exists or is
//! asked. The agent calls [`refuse_resources`], since an update reaches it alone. Some refusals
//! need more than the spec: what lies at a path, what another container has. Their rows have names,
//! and the module that knows makes the error with [`Refusal::of`]. `docs/limitations.md` tells
//! users of each field; a test here compares the two.

use std::fmt::Display;

use kata_like_failure::Failure;
use oci_spec::runtime::{LinuxResources, Process, Spec};

mod table;
#[cfg(test)]
mod tests;

pub use table::*;

/// A field that is refused.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// Its place in the spec, as the documents have it: `[]` stands for any entry of a list.
    pub field: &'static str,
    /// The reason, as users read it.
    pub why: &'static str,
    find: Find,
}

/// How a row finds what a spec asks for. A finder answers the field with its numbers and names.
#[derive(Clone, Copy, Debug)]
enum Find {
    Spec(fn(&Spec) -> Option<String>),
    Process(fn(&Process) -> Option<String>),
    Resources(fn(&LinuxResources) -> Option<String>),
    /// The spec alone does not tell.
    Elsewhere,
}

impl Refusal {
    /// The error for `field`, which is the row's own with its numbers and names.
    pub fn of(&self, field: impl Display) -> Failure {
        Failure::unsupported(field, self.why)
    }

    /// The same with a reason that says more than the row's.
    pub fn because(&self, field: impl Display, why: impl Display) -> Failure {
        Failure::unsupported(field, why)
    }
}

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
