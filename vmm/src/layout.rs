//! The guest's physical address map. Every number on which two files must agree is here.
//!
//! ```text
//!          0 ┬ RAM           0x1000 start info   0x2000 memory map   0x3000 module list
//!            │               0x4000 command line
//!    0x9fc00 ┼ MP table      (the kernel searches the last KiB of the low 640)
//!    0xa0000 ┼ nothing       (VGA and BIOS of a PC)
//!   0x100000 ┼ RAM           the kernel where its ELF headers say, the initrd behind it
//! 0xc0000000 ┼ nothing       RAM that does not fit below goes on at 4 GiB
//! 0xd0000000 ┼ virtio-mmio   4 KiB a slot
//! 0xfec00000 ┼ I/O APIC      KVM's
//! 0xfee00000 ┼ local APIC    KVM's
//! 0xfffbc000 ┼ KVM's own     identity map and TSS (Intel without unrestricted guest)
//! 0x100000000┴ RAM
//! ```

use vm_memory::GuestAddress;

/// Guest memory is a multiple of this, and each of its regions begins at a multiple.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The least guest memory, in bytes.
pub const MIN_MEMORY: u64 = 64 << 20;
/// The most guest memory: 1 TiB, which any CPU with nested paging can address.
pub const MAX_MEMORY: u64 = 1 << 40;

/// The most vCPUs: their entries must fit into the MP table's KiB.
pub const MAX_VCPUS: u8 = 32;

pub const START_INFO: GuestAddress = GuestAddress(0x1000);
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x2000);
/// PVH's module list: the initrd.
pub const MODULE_LIST: GuestAddress = GuestAddress(0x3000);
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x4000);
/// The longest command line, including its final NUL (COMMAND_LINE_SIZE of x86).
pub const COMMAND_LINE_SIZE: usize = 2048;

/// The MP table, at the end of the low RAM that the memory map names.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9fc00);
pub const MP_TABLE_SIZE: u64 = 0x400;

/// Where RAM goes on above the PC's hole.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);

/// Where RAM below 4 GiB ends at the latest.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where the rest of RAM begins.
pub const RAM_ABOVE_4G: GuestAddress = GuestAddress(1 << 32);

pub const MMIO_BASE: u64 = 0xd000_0000;
pub const MMIO_SLOT_SIZE: u64 = 0x1000;

/// KVM's I/O APIC and local APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// One page for KVM's identity map, then three for its TSS.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: usize = 0xfffb_d000;

/// The interrupt of each virtio-mmio slot, by its number in the guest's `virtio-mmio.N`.
///
/// With an MP table pins 5 to 7, 9 to 11 and 13 to 23 are free. Slots 0 and 1 are the fs devices, 2
/// is vsock, 3 entropy; 4 to 11 are reserved for net, 12 to 15 for blk, 16 and 17 for mem and
/// balloon. The last two share a pin, since both interrupt rarely. An empty slot costs three exits
/// at boot.
pub const SLOT_IRQS: [u32; 18] = [
    5, 6, 7, 9, // fs, fs, vsock, entropy
    10, 11, 13, 14, 15, 16, 17, 18, // net
    19, 20, 21, 22, // blk
    23, 23, // mem, balloon
];

/// How many queues a device in each of these slots may have.
pub const SLOT_QUEUES: [usize; SLOT_IRQS.len()] = [
    2, 2, 3, 1, // fs, fs, vsock, entropy
    2, 2, 2, 2, 2, 2, 2, 2, // net
    1, 1, 1, 1, // blk
    0, 0, // none yet
];

/// The first of the fs slots.
pub const FS_SLOT: usize = 0;
pub const FS_SLOTS: usize = 2;
pub const VSOCK_SLOT: usize = 2;
pub const ENTROPY_SLOT: usize = 3;

/// The first of the slots for interfaces.
pub const NET_SLOT: usize = 4;
pub const NET_SLOTS: usize = 8;

/// The first of the slots for disks.
pub const DISK_SLOT: usize = 12;
pub const DISK_SLOTS: usize = 4;

/// The address of a slot's registers.
pub fn slot_address(slot: usize) -> u64 {
    MMIO_BASE + slot as u64 * MMIO_SLOT_SIZE
}

/// One piece of RAM: its guest-physical address, and its place in the memfd; bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    pub start: GuestAddress,
    pub length: u64,
    pub offset: u64,
}

/// Spreads `memory_bytes` around the hole below 4 GiB.
pub fn ram_ranges(memory_bytes: u64) -> Vec<RamRange> {
    let low = memory_bytes.min(LOW_RAM_END);
    let mut ranges = vec![RamRange {
        start: GuestAddress(0),
        length: low,
        offset: 0,
    }];
    if memory_bytes > low {
        ranges.push(RamRange {
            start: RAM_ABOVE_4G,
            length: memory_bytes - low,
            offset: low,
        });
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_never_reaches_the_devices() {
        for bytes in [MIN_MEMORY, 2 << 30, 3 << 30, (3 << 30) + HUGE_PAGE, 8 << 30] {
            let ranges = ram_ranges(bytes);
            assert_eq!(ranges.iter().map(|range| range.length).sum::<u64>(), bytes);
            for range in ranges {
                let (start, end) = (range.start.0, range.start.0 + range.length);
                assert!(end <= MMIO_BASE || start >= RAM_ABOVE_4G.0, "{range:?}");
                assert_eq!((start % HUGE_PAGE, range.offset % HUGE_PAGE), (0, 0));
            }
        }
    }

    #[test]
    fn every_slot_has_a_safe_interrupt() {
        for irq in SLOT_IRQS {
            assert!(matches!(irq, 5..=7 | 9..=11 | 13..=23), "{irq}");
        }
        let own = &SLOT_IRQS[..DISK_SLOT + DISK_SLOTS];
        assert!(own.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
