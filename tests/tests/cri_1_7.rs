//! The same pods through the CRI plugin of containerd 1.7.
//!
//! What differs there: the binary is run for each container and not for each pod, and the shim serves version 2 of the
//! task API.

use kata_like_tests::{Host, TestResult, Version};

#[path = "cri/lifecycle.rs"]
mod lifecycle;
#[path = "cri/node.rs"]
mod node;
#[path = "cri/processes.rs"]
mod processes;

/// For one test at a time: several guests at work take an emulated host many times as long.
fn host() -> TestResult<Host> {
    Host::on(Version::V1_7Cri, true)
}
