//! Not written yet.
#![allow(dead_code)]
mod cgroup;
mod error;
mod request;
mod sandbox;
mod share;
mod spawn;
mod spec;
mod stand_in;
fn main() {}
