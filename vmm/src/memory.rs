//! Guest memory: one sealed memfd, mapped at 2 MiB boundaries, that the fs server maps, too.
//!
//! Called by `machine`, once. The memfd can neither shrink nor grow, so no process that maps it can
//! die of a missing page. It stays mapped until the process ends: KVM's slots and every
//! `VolatileSlice` point into it. Core dumps leave it out.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::Arc;

use kata_like_boot::HugePages;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use rustix::system::sysinfo;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestMemoryMmap, GuestRegionMmap};

use crate::layout::{HUGE_PAGE, MAX_MEMORY, MIN_MEMORY, RamRange, ram_ranges};
use crate::virtio::GuestRam;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error(
        "guest memory of {0} bytes: must be a multiple of 2 MiB between {min} MiB and {max} GiB",
        min = MIN_MEMORY >> 20,
        max = MAX_MEMORY >> 30
    )]
    Size(u64),
    /// More than the host's RAM and swap: even an idle host could not give it.
    #[error(
        "guest memory of {} MiB: the host has {} MiB, its swap included", bytes >> 20, host >> 20
    )]
    HostSize { bytes: u64, host: u64 },
    /// The host's pool of huge pages is too small, or the cgroup's share of it.
    #[error(
        "claim huge pages (hugetlb) for {} MiB of guest memory: {} pages of 2 MiB needed, {free}",
        bytes >> 20, bytes / HUGE_PAGE
    )]
    HugePages {
        bytes: u64,
        /// How many pages are free, in words.
        free: String,
        #[source]
        source: io::Error,
    },
    #[error("{step} {} MiB of guest memory", bytes >> 20)]
    Host {
        step: &'static str,
        bytes: u64,
        #[source]
        source: io::Error,
    },
    /// The pieces don't make one memory.
    #[error("lay out the guest's memory")]
    Layout(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Guest memory and the memfd behind it.
pub struct Memory {
    ram: GuestRam,
    ranges: Vec<RamRange>,
    file: Arc<File>,
}

impl Memory {
    /// Makes `bytes` of memory, all zero, without a page behind it yet.
    pub fn new(bytes: u64, huge: HugePages) -> Result<Self, MemoryError> {
        let of_the_host = sysinfo();
        let host = (of_the_host.totalram as u64)
            .saturating_add(of_the_host.totalswap as u64)
            .saturating_mul(u64::from(of_the_host.mem_unit));
        check_size(bytes, host)?;
        let file = Arc::new(File::from(sealed_memfd(bytes, huge)?));
        let ranges = ram_ranges(bytes);
        let regions = ranges
            .iter()
            .map(|range| map(&file, range, huge))
            .collect::<Result<Vec<_>, _>>()?;
        let ram = GuestMemoryMmap::from_regions(regions)
            .map_err(|source| MemoryError::Layout(source.into()))?;
        Ok(Self {
            ram: Arc::new(ram),
            ranges,
            file,
        })
    }

    /// The memory as devices read and write it.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The pieces, in ascending order.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// The bytes for which the host has given pages, to any process.
    pub fn resident_bytes(&self) -> u64 {
        // st_blocks counts 512 bytes each (stat(2)). 0 means that it is not known.
        fstat(&self.file).map_or(0, |stat| stat.st_blocks.unsigned_abs() * 512)
    }
}

/// Checks that the host could give a guest this much of its RAM and swap.
fn check_size(bytes: u64, host: u64) -> Result<(), MemoryError> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) || !bytes.is_multiple_of(HUGE_PAGE) {
        return Err(MemoryError::Size(bytes));
    }
    if bytes > host {
        return Err(MemoryError::HostSize { bytes, host });
    }
    Ok(())
}

/// How many pages of the pool are free and not promised, in words.
fn free_huge_pages() -> String {
    let count = |what| -> Option<u64> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{what}_hugepages");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    match (count("free"), count("resv")) {
        (Some(free), Some(promised)) => format!("{} free", free.saturating_sub(promised)),
        _ => "how many are free is unknown".to_owned(),
    }
}

fn sealed_memfd(bytes: u64, huge: HugePages) -> Result<OwnedFd, MemoryError> {
    let host = |step| {
        move |errno: rustix::io::Errno| MemoryError::Host {
            step,
            bytes,
            source: errno.into(),
        }
    };
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge == HugePages::Hugetlb {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = memfd_create("guest-memory", flags).map_err(host("make a memfd for"))?;
    ftruncate(file.as_fd(), bytes).map_err(host("size the memfd for"))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(host("seal the memfd of"))?;
    Ok(file)
}

fn map(
    file: &Arc<File>,
    range: &RamRange,
    huge: HugePages,
) -> Result<GuestRegionMmap, MemoryError> {
    let host = |step| {
        move |errno: rustix::io::Errno| MemoryError::Host {
            step,
            bytes: range.length,
            source: errno.into(),
        }
    };
    let length = usize::try_from(range.length).map_err(|_| MemoryError::Size(range.length))?;
    let slack = HUGE_PAGE as usize;
    // SAFETY: the kernel chooses the address, so a new mapping replaces none.
    let reserved = unsafe {
        mmap_anonymous(
            null_mut(),
            length + slack,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(host("reserve addresses for"))?;
    // Pages of a pool are reserved here. If the pool is too small this fails; without the
    // reservation the process would die when it touches a page. Small pages come when they are
    // touched.
    let when = match huge {
        HugePages::Transparent => MapFlags::NORESERVE,
        HugePages::Hugetlb => MapFlags::empty(),
    };
    let no_huge_pages = |errno: rustix::io::Errno| MemoryError::HugePages {
        bytes: range.length,
        free: free_huge_pages(),
        source: errno.into(),
    };
    let start = reserved.map_addr(|address| address.next_multiple_of(slack));
    // SAFETY: MAP_FIXED replaces a part of the reservation made above and nothing else: `start` is
    // less than `slack` behind its beginning, and `length` bytes follow. No Rust object is there.
    let address = unsafe {
        mmap(
            start,
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::FIXED | when,
            file,
            range.offset,
        )
    }
    .map_err(|errno| match huge {
        HugePages::Transparent => host("map")(errno),
        HugePages::Hugetlb => no_huge_pages(errno),
    })?;
    // SAFETY: the advices given below change no content of the mapping made above, and none goes
    // beyond it.
    let advise = |bytes: usize, advice| unsafe { madvise(address, bytes.min(length), advice) };
    if huge == HugePages::Hugetlb && range.offset == 0 {
        // A cgroup's limit of huge pages counts when a page is touched. The first pages, which hold
        // the kernel and the initrd, are touched at once; without them there is no guest.
        match advise(MIN_MEMORY as usize, Advice::LinuxPopulateWrite) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {} // INVAL: before Linux 5.14
            Err(errno) => return Err(no_huge_pages(errno)),
        }
    }
    advise(length, Advice::LinuxDontDump).map_err(host("keep out of core dumps"))?;
    if huge == HugePages::Transparent {
        // A host without transparent huge pages refuses; 4 KiB pages serve, too.
        let _ = advise(length, Advice::LinuxHugepage);
    }
    // SAFETY: `address` and `length` are the mapping made above. It is never unmapped or mapped
    // over: nothing else knows its address, and the region made here does not own it.
    let region = unsafe { MmapRegionBuilder::new(length).with_raw_mmap_pointer(address.cast()) }
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::from_arc(file.clone(), range.offset))
        .build()
        .map_err(|source| MemoryError::Layout(source.into()))?;
    GuestRegionMmap::new(region, range.start).ok_or_else(|| MemoryError::Layout("overflow".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    #[test]
    fn memory_is_aligned_sealed_and_empty() {
        let memory = Memory::new(MIN_MEMORY, HugePages::Transparent).unwrap();
        let address = memory.ram().get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(address.addr() as u64 % HUGE_PAGE, 0);
        assert!(ftruncate(&memory.file, 1).is_err());
        assert!(ftruncate(&memory.file, 2 * MIN_MEMORY).is_err());
        assert_eq!(memory.resident_bytes(), 0);
        memory.ram().write_obj(1u8, GuestAddress(0x5000)).unwrap();
        assert!(memory.resident_bytes() >= 4096);
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_both_numbers() {
        let refused = check_size(4 << 30, 3 << 30).unwrap_err().to_string();
        assert!(refused.contains("4096 MiB") && refused.contains("3072 MiB"));
        assert!(check_size(4 << 30, 4 << 30).is_ok());
    }

    /// The test can't change the host's pool; an offset that no mapping can have fails in the same
    /// way.
    #[test]
    fn a_pool_that_is_too_small_is_refused_with_both_numbers() {
        let range = ram_ranges(1 << 30)[0];
        let file = Arc::new(tempfile::tempfile().unwrap());
        let refused = map(&file, &RamRange { offset: 1, ..range }, HugePages::Hugetlb);
        let line = refused.map(drop).unwrap_err().to_string();
        assert!(line.contains("512 pages of 2 MiB needed"), "{line}");
    }

    #[test]
    fn odd_small_and_giant_sizes_are_refused() {
        for bytes in [0, MIN_MEMORY - HUGE_PAGE, MIN_MEMORY + 4096, 2 * MAX_MEMORY] {
            let refused = Memory::new(bytes, HugePages::Transparent);
            assert!(matches!(refused, Err(MemoryError::Size(_))), "{bytes}");
        }
    }
}
