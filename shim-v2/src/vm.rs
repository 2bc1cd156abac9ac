//! One pod's VM: its processes on the host, and the guest in it as seen through its agent.
//!
//! Called by `pod`. The agent's messages stop in `agent`, the VMM's in `launch`. What the guest
//! says by itself is an `agent::Event`, on one channel.
//!
//! Invariants: every call into the guest has a deadline that is bound to the guest's progress, and
//! goes on if its caller leaves.

pub mod agent;
pub mod clock;
pub mod disks;
pub mod ending;
pub mod guest;
pub mod launch;
pub mod ledger;
pub mod machine;
pub mod memory;
