//! Runs one target under libFuzzer: `FUZZ_TARGET=NAME kata-like-fuzz [OPTION…] CORPUS…`.
//!
//! `make fuzz` builds it with the compiler's instrumentation, without which it finds little.

#![no_main]

use std::sync::LazyLock;

use kata_like_fuzz::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    Target::find(&name).unwrap_or_else(|| {
        let names = TARGETS.map(|target| target.name);
        eprintln!("fuzz: FUZZ_TARGET={name:?} is none of {}", names.join(" "));
        std::process::exit(2);
    })
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET.run(data));
