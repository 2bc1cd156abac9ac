//! Loads the guest's kernel, its initrd and its command line into guest memory, ready to enter by
//! PVH.
//!
//! Called by `machine`, once, before any vCPU runs. Kernel and initrd come from the host and are
//! trusted, but may be missing, truncated or something else: each case is an error of one line.
//! Facts: Xen's PVH start info (`arch-x86/hvm/start_info.h`); Linux
//! Documentation/arch/x86/boot.rst.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Cmdline, KernelLoader};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use crate::initrd::{self, BadInitrd};
use crate::layout::{
    COMMAND_LINE, COMMAND_LINE_SIZE, HIGH_RAM, LOW_RAM_END, MEMORY_MAP, MMIO_SLOT_SIZE,
    MODULE_LIST, MP_TABLE, MP_TABLE_SIZE, RamRange, SLOT_IRQS, START_INFO, slot_address,
};

/// The kernel's options; the virtio-mmio slots follow them.
///
/// A panic resets at once, through the port of `legacy`. There is no PIT to check timers against,
/// no DMA that needs a bounce buffer, and no page that the host takes away for long. The clock is
/// KVM's. Grace periods are expedited, since each cgroup move and namespace waits for some. `quiet`
/// costs no log: see `log`. A pod's network has only its own interfaces, so modules must not make
/// dummies.
const OPTIONS: &str = "quiet panic=-1 reboot=k tsc=reliable no_timer_check \
    rcupdate.rcu_expedited=1 cryptomgr.notests swiotlb=noforce no-kvmapf dummy.numdummies=0";

const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PAGE: u64 = 4096;

/// Free memory, in bytes, that a kernel needs beside itself and its initrd to reach init.
const ELBOW_ROOM: u64 = 16 << 20;

/// Why the kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("load the guest kernel: it is no complete 64-bit ELF image (vmlinux)")]
    NotAKernel(#[source] linux_loader::loader::Error),
    /// The image has no PVH entry, so we can't enter it.
    #[error("load the guest kernel: it has no PVH entry (CONFIG_PVH)")]
    NoPvhEntry,
    #[error("read the guest's {what}")]
    Read {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Initrd(#[from] BadInitrd),
    /// Kernel and initrd do not fit into guest memory.
    #[error(
        "load the guest's {what}: {need} bytes of guest memory needed below 3 GiB, {have} there are"
    )]
    TooLittleMemory {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Where it would end, with room for the kernel to work; bytes.
        need: u64,
        /// Where memory below 3 GiB ends; bytes.
        have: u64,
    },
    /// The line is longer than the kernel reads.
    #[error("the guest's command line has {length} bytes, the kernel takes {COMMAND_LINE_SIZE}")]
    CommandLineTooLong {
        /// Includes the final NUL.
        length: usize,
    },
    #[error("write the guest's {what} to its memory")]
    Write {
        what: &'static str,
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Loads everything. Returns the address at which the boot vCPU enters, in 32-bit mode.
pub fn load(
    memory: &GuestMemoryMmap,
    ranges: &[RamRange],
    kernel: OwnedFd,
    initrd: OwnedFd,
) -> Result<GuestAddress, KernelError> {
    let low_end = ranges.first().map_or(0, |range| range.length);
    let (entry, kernel_end) = load_kernel(memory, kernel, low_end)?;
    let module = load_initrd(memory, initrd, kernel_end.next_multiple_of(PAGE), low_end)?;
    write_command_line(memory, &command_line(slots())?)?;
    write_start_info(memory, ranges, module)?;
    Ok(entry)
}

fn load_kernel(
    memory: &GuestMemoryMmap,
    kernel: OwnedFd,
    low_end: u64,
) -> Result<(GuestAddress, u64), KernelError> {
    let mut kernel = File::from(kernel);
    let loaded = match Elf::load(memory, None, &mut kernel, Some(HIGH_RAM)) {
        Ok(loaded) => loaded,
        Err(error) => {
            // The loader gives the same error for a file that ends too soon and for memory that
            // does.
            let size = kernel.seek(SeekFrom::End(0)).unwrap_or(0);
            fits("kernel", HIGH_RAM.0.saturating_add(size), low_end)?;
            return Err(KernelError::NotAKernel(error));
        }
    };
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(KernelError::NoPvhEntry);
    };
    fits("kernel", loaded.kernel_end, low_end)?;
    Ok((entry, loaded.kernel_end))
}

fn fits(what: &'static str, end: u64, have: u64) -> Result<(), KernelError> {
    let need = end.saturating_add(ELBOW_ROOM);
    if need > have.min(LOW_RAM_END) {
        return Err(KernelError::TooLittleMemory { what, need, have });
    }
    Ok(())
}

fn load_initrd(
    memory: &GuestMemoryMmap,
    initrd: OwnedFd,
    start: u64,
    low_end: u64,
) -> Result<hvm_modlist_entry, KernelError> {
    let read = |source| KernelError::Read {
        what: "initrd",
        source,
    };
    let mut file = File::from(initrd);
    let size = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    // The kernel unpacks the initrd before it frees it, so for a moment it is in memory twice.
    fits(
        "initrd",
        start.saturating_add(size.saturating_mul(2)),
        low_end,
    )?;
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, length)
        .map_err(|source| KernelError::Write {
            what: "initrd",
            source,
        })?;
    initrd::check(memory, start, size)?;
    Ok(hvm_modlist_entry {
        paddr: start,
        size,
        ..Default::default()
    })
}

fn slots() -> impl Iterator<Item = (u64, u32)> {
    let irqs = SLOT_IRQS.iter().copied().enumerate();
    irqs.map(|(slot, irq)| (slot_address(slot), irq))
}

/// Joins the options and the slots, in the order of their numbers: `virtio-mmio.N` in the guest.
fn command_line(slots: impl Iterator<Item = (u64, u32)>) -> Result<String, KernelError> {
    let mut line = String::from(OPTIONS);
    for (address, irq) in slots {
        let size = MMIO_SLOT_SIZE / 1024;
        line += &format!(" virtio_mmio.device={size}K@{address:#x}:{irq}");
    }
    // The kernel cuts a longer line silently, which would give a device a wrong interrupt.
    let length = line.len() + 1;
    if length > COMMAND_LINE_SIZE {
        return Err(KernelError::CommandLineTooLong { length });
    }
    Ok(line)
}

fn write_command_line(memory: &GuestMemoryMmap, line: &str) -> Result<(), KernelError> {
    let mut checked = Cmdline::new(COMMAND_LINE_SIZE).map_err(|_| too_long(line))?;
    checked.insert_str(line).map_err(|_| too_long(line))?;
    linux_loader::loader::load_cmdline(memory, COMMAND_LINE, &checked).map_err(|_| too_long(line))
}

fn too_long(line: &str) -> KernelError {
    KernelError::CommandLineTooLong {
        length: line.len() + 1,
    }
}

/// The RAM that the guest is told of: without the PC's hole below 1 MiB, and with the MP table
/// reserved.
fn memory_map(ranges: &[RamRange]) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr, size, type_| hvm_memmap_table_entry {
        addr,
        size,
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0, MP_TABLE.0, E820_RAM),
        entry(MP_TABLE.0, MP_TABLE_SIZE, E820_RESERVED),
    ];
    for range in ranges {
        let start = range.start.0.max(HIGH_RAM.0);
        let end = range.start.0 + range.length;
        map.push(entry(start, end.saturating_sub(start), E820_RAM));
    }
    map
}

fn write_start_info(
    memory: &GuestMemoryMmap,
    ranges: &[RamRange],
    module: hvm_modlist_entry,
) -> Result<(), KernelError> {
    let map = memory_map(ranges);
    let start = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: 1,
        modlist_paddr: MODULE_LIST.0,
        cmdline_paddr: COMMAND_LINE.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: map.len() as u32, // at most four
        ..Default::default()
    };
    let write = |bytes: &[u8], address, what| {
        memory
            .write_slice(bytes, address)
            .map_err(|source| KernelError::Write { what, source })
    };
    for (index, entry) in map.iter().enumerate() {
        let address = GuestAddress(MEMORY_MAP.0 + (index * entry.as_slice().len()) as u64);
        write(entry.as_slice(), address, "memory map")?;
    }
    write(module.as_slice(), MODULE_LIST, "module list")?;
    write(start.as_slice(), START_INFO, "start info")
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
