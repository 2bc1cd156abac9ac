//! One KVM microVM: the parts that `main` puts together, and that the fuzz targets call.
//!
//! Read it in the order of a start: `machine` builds, `memory`, `kvm`, `kernel` and `virtio` are what
//! it builds from, `vcpu` and `reactor` run it.

pub mod bus;
pub mod cpuid;
pub mod figures;
pub mod jail_list;
pub mod kernel;
pub mod kvm;
pub mod layout;
pub mod legacy;
pub mod log;
pub mod machine;
pub mod memory;
pub mod mptable;
pub mod reactor;
pub mod vcpu;
pub mod virtio;

/// An error and its causes in one line: `step: cause: cause`.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        // Some errors repeat their source in their own text.
        if !line.ends_with(&text) {
            line += ": ";
            line += &text;
        }
        source = cause.source();
    }
    line.replace('\n', " ")
}
