//! Guest memory as the vectors of one system call, so that bytes go there and back without a copy.
//!
//! Called by `chain`, which has checked where the buffers are. The kernel reads and writes the
//! memory without any Rust reference to it. The guest may do so at the same time, which volatile
//! memory allows.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{iovec, off_t};
use vm_memory::VolatileSlice;

use super::number;

/// One `readv(2)`, or `preadv(2)` with an offset: into `head`, then into `slices`. The kernel takes
/// at most 1,024 vectors.
pub fn read(
    source: impl AsFd,
    offset: Option<u64>,
    head: &mut [u8],
    slices: &[VolatileSlice<'_>],
) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors = Vec::with_capacity(slices.len() + 1);
    if !head.is_empty() {
        vectors.push(iovec {
            iov_base: head.as_mut_ptr().cast(),
            iov_len: head.len(),
        });
    }
    vectors.extend(guards.iter().map(|guard| iovec {
        iov_base: guard.as_ptr().cast(),
        iov_len: guard.len(),
    }));
    let offset = offset.map(position).transpose()?;
    let (source, count) = (source.as_fd(), number::int(vectors.len())?);
    // SAFETY: the kernel writes to the vectors and nowhere else. The first is `head`, exclusively
    // ours. Each other one is a slice of guest memory, which is mapped and writable as long as the
    // slice lives. Slices, guards and the borrowed descriptor live to the end of the call.
    let got = unsafe {
        match offset {
            None => libc::readv(source.as_raw_fd(), vectors.as_ptr(), count),
            Some(offset) => libc::preadv(source.as_raw_fd(), vectors.as_ptr(), count, offset),
        }
    };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// One `writev(2)`, or `pwritev(2)` with an offset: of `head`, then of `slices`. The kernel takes
/// at most 1,024 vectors.
pub fn write(
    target: impl AsFd,
    offset: Option<u64>,
    head: &[u8],
    slices: &[VolatileSlice<'_>],
) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let mut vectors = Vec::with_capacity(slices.len() + 1);
    if !head.is_empty() {
        vectors.push(iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        });
    }
    // iovec's pointer is mutable all the same.
    vectors.extend(guards.iter().map(|guard| iovec {
        iov_base: guard.as_ptr().cast_mut().cast(),
        iov_len: guard.len(),
    }));
    let offset = offset.map(position).transpose()?;
    let (target, count) = (target.as_fd(), number::int(vectors.len())?);
    // SAFETY: the kernel only reads the vectors. The first is `head`; each other one is a slice of
    // guest memory, which is mapped as long as the slice lives. Slices, guards and the borrowed
    // descriptor live to the end of the call.
    let sent = unsafe {
        match offset {
            None => libc::writev(target.as_raw_fd(), vectors.as_ptr(), count),
            Some(offset) => libc::pwritev(target.as_raw_fd(), vectors.as_ptr(), count, offset),
        }
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Checks that a file's position can be `offset`.
fn position(offset: u64) -> io::Result<off_t> {
    offset
        .try_into()
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    #[test]
    fn head_and_slices_go_out_and_come_in_in_order() {
        let mut memory = *b"..world!";
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let behind = [slice.subslice(2, 5).unwrap(), slice.subslice(7, 1).unwrap()];
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(write(&file, None, b"hello ", &behind).unwrap(), 12);
        assert_eq!(write(&file, Some(20), &[], &behind).unwrap(), 6);
        file.rewind().unwrap();
        let mut text = Vec::new();
        file.read_to_end(&mut text).unwrap();
        assert_eq!(text, b"hello world!\0\0\0\0\0\0\0\0world!");

        file.rewind().unwrap();
        file.write_all(b"abcdefgh").unwrap();
        let mut head = [0; 2];
        assert_eq!(read(&file, Some(0), &mut head, &behind).unwrap(), 8);
        assert_eq!((&head, &memory), (b"ab", b"..cdefgh"));
        let end = read(&file, Some(100), &mut head, &[]).unwrap();
        assert_eq!(end, 0);
        assert!(read(&file, Some(u64::MAX), &mut head, &[]).is_err());
    }
}
