//! One KVM microVM: the parts that `main` puts together, and that the fuzz targets call.
//!
//! Read it in the order of a start: `machine` builds, `memory`, `kvm`, `kernel` and `virtio` are what
//! it builds from, `vcpu` and `reactor` run it.

pub mod bus;
pub mod cpuid;
pub mod figures;
pub mod initrd;
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
pub mod slots;
pub mod vcpu;
pub mod virtio;
pub mod watchdog;
