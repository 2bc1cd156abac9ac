//! The harness of the integration tests: a real containerd, the real `ctr`, and what a host looks
//! like.
//!
//! The files in `tests/` call it; the binary `run-tests` builds them, boots test hosts
//! (`tools/test-host`) and runs them there. Nothing here knows how kata-like works inside: a test
//! sees what a user or an administrator sees. The runtime is a switch, so that most tests can be
//! run against runc, which is the oracle: `KATA_LIKE_TEST_RUNTIME=io.containerd.runc.v2`.

pub mod aftermath;
pub mod annotations;
pub mod cri;
pub mod ctr;
pub mod ctr_container;
pub mod ctr_pod;
pub mod disk;
pub mod docker;
pub mod events;
pub mod fifo;
pub mod figures;
pub mod footprint;
pub mod host;
pub mod kernel_options;
pub mod manifest;
pub mod namespace;
pub mod oracle;
pub mod parts;
pub mod probe;
pub mod process;
pub mod pty;
pub mod rootfs;
pub mod shim_pod;
pub mod source;
pub mod suites;
pub mod task;
pub mod task_api;
pub mod userland;
pub mod volume;

pub use aftermath::Aftermath;
pub use ctr::{Call, Output};
pub use ctr_container::CtrContainer;
pub use ctr_pod::CtrPod;
pub use host::{Host, Version};
pub use kata_like_limits::{Patience, in_time, scaled};
pub use parts::Parts;
pub use volume::Directory;

/// What a test returns: a failed step ends it, with its reason.
pub type TestResult<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The image with busybox that the test host brings along.
pub const IMAGE: &str = "localhost/busybox:latest";

/// kata-like's containerd name.
pub const KATA_LIKE: &str = "io.containerd.kata-like.v2";

/// The runtime under test, by its containerd name.
pub fn runtime() -> String {
    std::env::var("KATA_LIKE_TEST_RUNTIME").unwrap_or_else(|_| KATA_LIKE.into())
}

/// Whether the runtime under test is the oracle and not kata-like.
pub fn is_oracle() -> bool {
    !runtime().contains("kata-like")
}

/// Ends a test that says nothing about the oracle.
#[macro_export]
macro_rules! kata_like_only {
    () => {
        if $crate::is_oracle() {
            eprintln!("not a test of {}", $crate::runtime());
            return Ok(());
        }
    };
}

/// An error made of a text, for steps that fail in the test's own words.
pub fn failure(text: impl Into<String>) -> Box<dyn std::error::Error + Send + Sync> {
    text.into().into()
}
