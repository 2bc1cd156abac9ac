//! Pods of Kubernetes, whichever version of containerd makes them.

pub mod lifecycle;
pub mod node;
pub mod processes;
