//! The fuzz targets: functions that take arbitrary bytes from a side that may be hostile, and must
//! return.
//!
//! A target stands in the crate that it tries, in the module `fuzz` there, or in `messages` where
//! a crate's public functions are enough. It is used twice. `make check` replays its corpus
//! (`corpus/TARGET/`) and inputs that were made of it by chance, always the same (`mutate`). `make
//! fuzz` runs it under libFuzzer, which looks for inputs that take new ways through the code. What
//! it finds goes into the corpus.
//!
//! A target fails if it panics, does not end, or has more heap at a time than its bound
//! (`allocation`). The builds check sums for overflow. There is no address sanitizer: it needs an
//! unstable compiler.

mod allocation;
mod messages;
pub mod mutate;

use containerd_shim_kata_like_v2::fuzz as shim;
use kata_like_proxy::fuzz as proxy;
use kata_like_vmm::fuzz as vmm;

/// A function under test.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Also the name of the folder below `corpus/`.
    pub name: &'static str,
    /// How many bytes of heap it may have at a time.
    pub most: usize,
    function: fn(&[u8]),
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// All targets.
pub const TARGETS: [Target; 16] = [
    target("bus", vmm::bus, 256 * KIB),
    target("queue", vmm::queue, 256 * KIB),
    // Each stream has a buffer of 256 KiB.
    target("vsock", vmm::vsock, 4 * MIB),
    target("net", vmm::net, 512 * KIB),
    target("block", vmm::block, 256 * KIB),
    target("log", vmm::log, 256 * KIB),
    target("elf", vmm::elf, 256 * KIB),
    target("cpio", vmm::cpio, 64 * KIB),
    target("messages", messages::boot, 2 * MIB),
    target("config", messages::config, MIB),
    target("spec", shim::spec, MIB),
    target("process", shim::process, MIB),
    target("uri", shim::uri, 64 * KIB),
    target("answer", proxy::answer, MIB),
    target("events", proxy::events, MIB),
    target("gate", proxy::gate, 64 * KIB),
];

const fn target(name: &'static str, function: fn(&[u8]), most: usize) -> Target {
    Target {
        name,
        most,
        function,
    }
}

impl Target {
    /// The target of this name.
    pub fn find(name: &str) -> Option<Self> {
        TARGETS.into_iter().find(|target| target.name == name)
    }

    /// Runs it once. Panics if it fails.
    pub fn run(&self, data: &[u8]) {
        let used = allocation::most_during(|| (self.function)(data));
        assert!(
            used <= self.most,
            "{} has {used} bytes of heap at a time, more than {}",
            self.name,
            self.most
        );
    }
}

#[cfg(test)]
mod tests;
