//! KVM's binary statistics: exits, faults, pages (KVM_GET_STATS_FD, Linux
//! Documentation/virt/kvm/api.rst 4.133).
//!
//! `machine` opens a descriptor for the VM and one per vCPU before the jail closes, then reads
//! values by their offset. A KVM without them (before 5.14) gives zeros.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use vmm_sys_util::ioctl::ioctl;

use kvm_bindings::KVMIO;

mod request {
    #![allow(missing_docs, reason = "the macro makes an undocumented function")]
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, super::KVMIO, 0xce);
}

/// The sizes of `struct kvm_stats_header`, and of `struct kvm_stats_desc` without its name.
const HEADER_SIZE: usize = 24;
const DESCRIPTOR_SIZE: usize = 16;

/// Bounds on what the kernel says, so that a broken kernel costs no memory.
const MAX_NAME: usize = 256;
const MAX_VALUES: u32 = 1024;

/// The statistics of a VM or a vCPU.
pub struct Stats {
    file: File,
    /// The name of each statistic, and the offset of its first value.
    values: Vec<(String, u64)>,
}

impl Stats {
    /// Opens the statistics of the VM or vCPU behind `fd`. `None`: this KVM has none.
    pub fn of(fd: &impl AsRawFd) -> Option<Self> {
        // SAFETY: KVM_GET_STATS_FD takes no argument and touches no memory of ours. If it succeeds,
        // the result is a new descriptor that nobody else owns.
        let file = unsafe {
            match ioctl(fd, request::KVM_GET_STATS_FD()) {
                stats if stats < 0 => return None,
                stats => File::from_raw_fd(stats),
            }
        };
        let values = read_names(&file)?;
        Some(Self { file, values })
    }

    /// The first value of a statistic; 0 if it does not exist.
    pub fn get(&self, name: &str) -> u64 {
        let Some((_, offset)) = self.values.iter().find(|(known, _)| known == name) else {
            return 0;
        };
        let mut value = [0; 8];
        match self.file.read_exact_at(&mut value, *offset) {
            Ok(()) => u64::from_ne_bytes(value),
            Err(_) => 0,
        }
    }
}

fn read_names(file: &File) -> Option<Vec<(String, u64)>> {
    let mut header = [0; HEADER_SIZE];
    file.read_exact_at(&mut header, 0).ok()?;
    let name_size = u32_at(&header, 4)? as usize;
    let count = u32_at(&header, 8)?.min(MAX_VALUES);
    let descriptors = u64::from(u32_at(&header, 16)?);
    let data = u64::from(u32_at(&header, 20)?);
    if name_size > MAX_NAME {
        return None;
    }
    let mut descriptor = vec![0; DESCRIPTOR_SIZE + name_size];
    let mut values = Vec::new();
    for index in 0..u64::from(count) {
        let at = descriptors + index * descriptor.len() as u64;
        file.read_exact_at(&mut descriptor, at).ok()?;
        let offset = u64::from(u32_at(&descriptor, 8)?);
        let name = descriptor.get(DESCRIPTOR_SIZE..)?;
        let name = name.split(|byte| *byte == 0).next()?;
        values.push((String::from_utf8_lossy(name).into_owned(), data + offset));
    }
    Some(values)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_value_is_found_by_its_name() {
        let mut file = tempfile::tempfile().unwrap();
        // Header: flags, name_size 8, one descriptor, offsets of id, descriptors and data.
        for word in [0u32, 8, 1, 24, 32, 64] {
            file.write_all(&word.to_ne_bytes()).unwrap();
        }
        file.write_all(&[0; 8]).unwrap();
        for word in [0u32, 1 << 16, 8, 0] {
            file.write_all(&word.to_ne_bytes()).unwrap();
        }
        file.write_all(b"exits\0\0\0\0\0\0\0\0\0\0\0").unwrap();
        file.write_all(&0u64.to_ne_bytes()).unwrap();
        file.write_all(&42u64.to_ne_bytes()).unwrap();
        let values = read_names(&file).unwrap();
        let stats = Stats { file, values };
        assert_eq!((stats.get("exits"), stats.get("nonsense")), (42, 0));
    }
}
