//! What the guests of these tests start with, good and bad.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::OnceLock;

use crate::parts::guest::Setup;
use crate::parts::{compiled, cpio};

/// A guest that does what `scenario` says (init.c).
pub fn setup(scenario: &str, vcpus: u8) -> Setup {
    let initrd = cpio(&[
        ("init", 0o100755, init()),
        ("scenario", 0o100644, scenario.as_bytes()),
    ]);
    Setup::new(initrd, vcpus)
}

/// The guest's PID 1, compiled once.
pub fn init() -> &'static [u8] {
    static INIT: OnceLock<Vec<u8>> = OnceLock::new();
    INIT.get_or_init(|| compiled("tests/boot/init.c"))
}

/// An ELF image with a PVH note; its entry is an undefined instruction.
pub fn faulting_kernel() -> Vec<u8> {
    let mut image = vec![0; 0x200];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0]); // executable, x86-64
    put(24, &0x100_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]); // sizes of the headers, two segments
    for (at, kind, offset, size) in [(64, 1u32, 0x100u64, 0x100u64), (120, 4, 0xc0, 20)] {
        put(at, &kind.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 24, &0x100_0000u64.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
    }
    put(0xc0, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0xcc, b"Xen\0");
    put(0xd0, &0x100_0000u32.to_le_bytes());
    put(0x100, &[0x0f, 0x0b]); // ud2
    image
}
