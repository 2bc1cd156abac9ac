//! Not written yet.
#![allow(dead_code)]
mod error;
mod request;
mod sandbox;
mod spawn;
fn main() {}
