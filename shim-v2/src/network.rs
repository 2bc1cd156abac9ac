//! The pod's network: whose its namespace is, what it holds, and how the guest gets a copy.

pub mod claim;
pub mod forward;
pub mod read;
pub mod resolver;
mod tap;
mod tc;
