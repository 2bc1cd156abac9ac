//! Kubernetes' pods, for either version of containerd.

pub mod lifecycle;
pub mod node;
pub mod processes;
