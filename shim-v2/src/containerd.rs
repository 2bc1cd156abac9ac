//! What faces containerd: its dialects, its messages, its events.
//!
//! The upper floor of the shim. Nothing below imports it: `pod` says in its own words what is
//! wanted and what happened, and the modules here translate.

pub mod bootstrap;
mod convert;
mod flags;
pub mod info;
pub mod publish;
pub mod serve;
mod service;
mod socket;
mod stats;

pub use flags::Flags;
