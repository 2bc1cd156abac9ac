//! A file that is not a kernel, or does not fit, is refused in one line that says so.

use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::initrd::archive;
use crate::layout::ram_ranges;

/// A minimal ELF kernel: one loadable segment at 16 MiB and, if wanted, a PVH note.
fn elf(note: bool, memory_size: u64) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes()); // ET_EXEC
    put(18, &62u16.to_le_bytes()); // EM_X86_64
    put(24, &0x100_0000u64.to_le_bytes()); // entry
    put(32, &64u64.to_le_bytes()); // program headers
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &(1 + u16::from(note)).to_le_bytes());
    let mut header = |at: usize, kind: u32, offset: u64, file: u64, memory: u64| {
        put(at, &kind.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 24, &0x100_0000u64.to_le_bytes());
        put(at + 32, &file.to_le_bytes());
        put(at + 40, &memory.to_le_bytes());
    };
    header(64, 1, 0x800, 0x100, memory_size);
    header(120, 4, 0x400, 20, 20);
    put(0x400, &4u32.to_le_bytes());
    put(0x404, &4u32.to_le_bytes());
    put(0x408, &18u32.to_le_bytes());
    put(0x40c, b"Xen\0");
    put(0x410, &0x100_0040u32.to_le_bytes());
    image
}

fn file(bytes: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file.into()
}

/// The smallest initrd.
fn initrd() -> Vec<u8> {
    archive(&["init"])
}

fn boot(kernel: &[u8], initrd: &[u8]) -> Result<GuestAddress, KernelError> {
    let bytes = 64 << 20;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)]).unwrap();
    let entry = load(&memory, &ram_ranges(bytes), file(kernel), file(initrd))?;
    let start: hvm_start_info = memory.read_obj(START_INFO).unwrap();
    let module: hvm_modlist_entry = memory.read_obj(MODULE_LIST).unwrap();
    let mut copy = vec![0; initrd.len()];
    memory
        .read_slice(&mut copy, GuestAddress(module.paddr))
        .unwrap();
    assert_eq!(
        (start.magic, module.size, copy),
        (START_MAGIC, initrd.len() as u64, initrd.to_vec())
    );
    Ok(entry)
}

#[test]
fn a_kernel_with_a_pvh_note_is_loaded() {
    let entry = boot(&elf(true, 0x2000), &initrd()).unwrap();
    assert_eq!(entry, GuestAddress(0x100_0040));
}

#[test]
fn what_is_no_kernel_is_refused() {
    for bad in [
        &b""[..],
        b"#!/bin/sh",
        &elf(true, 0x2000)[..0x840],
        &[0; 4096],
    ] {
        assert!(matches!(
            boot(bad, &initrd()),
            Err(KernelError::NotAKernel(_))
        ));
    }
    let no_entry = boot(&elf(false, 0x2000), &initrd());
    assert!(matches!(no_entry, Err(KernelError::NoPvhEntry)));
}

#[test]
fn an_initrd_that_is_none_or_too_large_is_refused() {
    let whole = initrd();
    for bad in [&b""[..], b"no archive", &whole[..whole.len() / 2]] {
        let refused = boot(&elf(true, 0x2000), bad);
        assert!(
            matches!(refused, Err(KernelError::Initrd(_))),
            "{refused:?}"
        );
    }
    let large = boot(&elf(true, 0x2000), &vec![1; 32 << 20]);
    assert!(matches!(
        large,
        Err(KernelError::TooLittleMemory { what: "initrd", .. })
    ));
}

#[test]
fn a_kernel_too_large_for_memory_is_refused() {
    let large = boot(&elf(true, 64 << 20), &initrd());
    assert!(matches!(
        large,
        Err(KernelError::TooLittleMemory { what: "kernel", .. })
    ));
    // Here the file's bytes don't fit.
    let mut image = elf(true, 64 << 20);
    image[64 + 32..64 + 40].copy_from_slice(&(60u64 << 20).to_le_bytes());
    image.resize(64 << 20, 0);
    let large = boot(&image, &initrd());
    assert!(matches!(
        large,
        Err(KernelError::TooLittleMemory { what: "kernel", .. })
    ));
}

#[test]
fn the_command_line_names_every_slot_and_is_never_cut() {
    let line = command_line(slots()).unwrap();
    assert_eq!(
        line.matches("virtio_mmio.device=4K@0x").count(),
        SLOT_IRQS.len()
    );
    let many = std::iter::repeat_n((slot_address(0), 5), 60);
    let refused = command_line(many);
    assert!(matches!(refused, Err(KernelError::CommandLineTooLong { length }) if length > 2048));
}

#[test]
fn the_memory_map_leaves_the_hole_out() {
    for bytes in [64 << 20, 5 << 30] {
        let map = memory_map(&ram_ranges(bytes));
        assert!(
            map.windows(2)
                .all(|pair| pair[0].addr + pair[0].size <= pair[1].addr)
        );
        let ram = map.iter().filter(|entry| entry.type_ == E820_RAM);
        let hole = HIGH_RAM.0 - MP_TABLE.0;
        assert_eq!(ram.map(|entry| entry.size).sum::<u64>(), bytes - hole);
    }
}

proptest! {
    /// A damaged image is loaded or refused; it never brings the VMM down.
    #[test]
    fn a_damaged_image_never_panics(
        at in 0usize..0x800,
        bytes in proptest::collection::vec(any::<u8>(), 1..16),
        keep in 0usize..0x1000,
    ) {
        let mut image = elf(true, 0x2000);
        for (offset, byte) in bytes.iter().enumerate() {
            image[at + offset] = *byte;
        }
        image.truncate(keep);
        let _ = boot(&image, &initrd());
    }
}
