//! The pod's network: whose its namespace is, what it holds, and how the guest gets a copy.

pub mod claim;
pub mod forward;
mod names;
pub mod namespace;
pub mod pod_network;
pub mod read;
pub mod resolver;
mod tap;
mod tc;
