//! Kubernetes' pods, made through containerd's CRI plugin as a kubelet makes them.
//!
//! What is asked of pods and containers is in protobuf's text format, by the names of CRI.

use kata_like_tests::{Host, TestResult, Version};

mod data;
mod lifecycle;
mod many;
mod node;
mod port_forward;
mod processes;
mod security;
mod traffic;

/// For one test at a time: several guests at work take an emulated host many times as long.
fn host() -> TestResult<Host> {
    Host::on(Version::V2_1Cri, true)
}
