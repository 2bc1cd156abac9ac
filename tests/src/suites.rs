//! Suites that more than one test binary runs, each on its own version of containerd.

pub mod cri;
pub mod odd_states;
