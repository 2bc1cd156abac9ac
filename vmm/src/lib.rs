//! One KVM microVM: the parts that `main` puts together.
//!
//! Read it in the order of a start: `machine` builds the VM from `memory`, `kvm`, `kernel` and
//! `virtio`; `vcpu` and `reactor` run it.

mod bus;
mod cpuid;
mod figures;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod initrd;
mod jail;
mod kernel;
mod kvm;
mod layout;
mod legacy;
mod log;
pub mod machine;
mod memory;
mod mptable;
mod reactor;
mod slots;
mod vcpu;
pub mod virtio;
mod watchdog;
