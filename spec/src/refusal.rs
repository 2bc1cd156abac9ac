//! A row of the table: a field, the reason, and how a spec is asked for it.

use std::fmt::Display;

use kata_like_failure::Failure;
use oci_spec::runtime::{LinuxResources, Process, Spec};

/// A field that is refused.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// Its place in the spec, as the documents have it: `[]` stands for any entry of a list.
    pub field: &'static str,
    /// The reason, as users read it.
    pub why: &'static str,
    pub(crate) find: Find,
}

/// How a row finds what a spec asks for. A finder answers the field with its numbers and names.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Find {
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
