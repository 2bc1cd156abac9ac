//! Kubernetes' pods, made through containerd's CRI plugin as a kubelet makes them.
//!
//! Requests are in protobuf's text format, with CRI's names. `suites::cri` in the library has the
//! parts that `cri_1_7` runs, too.

use kata_like_tests::suites::cri::{lifecycle, node, processes};
use kata_like_tests::{Host, TestResult, Version};

mod data;
mod many;
mod port_forward;
mod security;
mod traffic;

/// For one test at a time: several busy guests make an emulated host many times slower.
fn host() -> TestResult<Host> {
    Host::on(Version::V2_1Cri, true)
}

#[test]
fn pods_live_and_leave_nothing() -> TestResult {
    lifecycle::pods_live_and_leave_nothing(&host()?)
}

#[test]
fn the_machine_is_as_large_as_the_pods_limits() -> TestResult {
    lifecycle::the_machine_is_as_large_as_the_pods_limits(&host()?)
}

#[test]
fn a_node_offers_the_handler_and_refuses_what_is_the_hosts() -> TestResult {
    node::a_node_offers_the_handler_and_refuses_what_is_the_hosts(&host()?)
}

#[test]
fn processes_are_shared_as_asked() -> TestResult {
    processes::processes_are_shared_as_asked(&host()?)
}
