//! Refuses an initrd that is not a whole cpio archive, before the guest runs.
//!
//! Called by `kernel`. A guest with a truncated archive dies in its first second, with a line about
//! init; here we can say the reason. We read only headers, up to the first trailer. What follows
//! (padding, more archives) and the files' contents are the kernel's business. Facts: Linux
//! Documentation/driver-api/early-userspace/buffer-format.rst.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const HEADER_SIZE: u64 = 110;
/// "newc" without and with a checksum.
const MAGIC: [&[u8]; 2] = [b"070701", b"070702"];
const FILE_SIZE: usize = 6 + 6 * 8;
const NAME_SIZE: usize = 6 + 11 * 8;
const TRAILER: &[u8] = b"TRAILER!!!\0";

/// Why a file is no initrd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadInitrd {
    #[error("load the guest's initrd: the file is empty")]
    Empty,
    /// Something else, for example a compressed archive.
    #[error("load the guest's initrd: at byte {0} it is no cpio archive (uncompressed, newc)")]
    NoArchive(u64),
    /// It ends before its trailer.
    #[error(
        "load the guest's initrd: it is cut off: {size} bytes, and the archive goes on at {at}"
    )]
    CutOff {
        size: u64,
        /// Where the next header, or the rest of a file, should be.
        at: u64,
    },
}

/// Walks the archive in the `size` bytes of guest memory at `start`.
pub fn check(memory: &GuestMemoryMmap, start: u64, size: u64) -> Result<(), BadInitrd> {
    if size == 0 {
        return Err(BadInitrd::Empty);
    }
    let cut_off = |at| BadInitrd::CutOff { size, at };
    // Both ends are in guest memory: neither sum nor read fails where `at` is in the file.
    let read = |at: u64, bytes: &mut [u8]| {
        let end = at.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > size) {
            return Err(cut_off(at));
        }
        let from = GuestAddress(start.saturating_add(at));
        memory.read_slice(bytes, from).map_err(|_| cut_off(at))
    };
    let mut at = 0;
    loop {
        let mut magic = [0; 6];
        read(at, &mut magic)?;
        if !MAGIC.contains(&magic.as_slice()) {
            return Err(BadInitrd::NoArchive(at));
        }
        let mut header = [0; HEADER_SIZE as usize];
        read(at, &mut header)?;
        let field = |offset| number(&header, offset).ok_or(BadInitrd::NoArchive(at));
        let (name_size, file_size) = (field(NAME_SIZE)?, field(FILE_SIZE)?);
        if name_size == TRAILER.len() as u64 {
            let mut name = [0; TRAILER.len()];
            read(at + HEADER_SIZE, &mut name)?;
            if name == TRAILER {
                return Ok(());
            }
        }
        // `at` is below the file's size, and both fields are below 4 GiB: no overflow.
        let content = (at + HEADER_SIZE + name_size).next_multiple_of(4);
        let next = (content + file_size).next_multiple_of(4);
        if next > size {
            return Err(cut_off(next));
        }
        at = next;
    }
}

/// Parses eight hexadecimal digits.
fn number(header: &[u8], offset: usize) -> Option<u64> {
    let digits = header.get(offset..offset.checked_add(8)?)?;
    let text = std::str::from_utf8(digits).ok()?;
    // `from_str_radix` would also take a sign.
    let plain = text.bytes().all(|digit| digit.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(text, 16).ok())?
}

/// An archive of empty files. The tests of `kernel` use it, too.
#[cfg(any(test, feature = "fuzz"))]
pub fn archive(names: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for name in names.iter().chain(&["TRAILER!!!"]) {
        bytes.extend(b"070701");
        for field in 0..13 {
            let value = if field == 11 { name.len() + 1 } else { 0 };
            bytes.extend(format!("{value:08X}").bytes());
        }
        bytes.extend(name.bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn checked(bytes: &[u8]) -> Result<(), BadInitrd> {
        let range = (GuestAddress(0), 1 << 20);
        let memory = GuestMemoryMmap::from_ranges(&[range]).unwrap();
        memory.write_slice(bytes, GuestAddress(0x1000)).unwrap();
        check(&memory, 0x1000, bytes.len() as u64)
    }

    #[test]
    fn a_whole_archive_is_taken_with_whatever_follows() {
        let mut whole = archive(&["init", "a/longer/name"]);
        assert_eq!(checked(&whole), Ok(()));
        whole.extend([0; 512]);
        assert_eq!(checked(&whole), Ok(()));
    }

    #[test]
    fn each_shorter_one_is_cut_off() {
        let whole = archive(&["init"]);
        let trailer = whole.len() - 3; // the padding of its name counts, too
        for length in 1..trailer {
            let found = checked(&whole[..length]);
            assert!(matches!(found, Err(BadInitrd::CutOff { .. })), "{length}");
        }
        assert_eq!(checked(b""), Err(BadInitrd::Empty));
    }

    #[test]
    fn what_is_no_archive_is_told_by_its_place() {
        assert_eq!(checked(b"#!/bin/sh\n"), Err(BadInitrd::NoArchive(0)));
        assert_eq!(checked(&[0; 1024]), Err(BadInitrd::NoArchive(0)));
        let mut whole = archive(&["init"]);
        whole[116] = b'x'; // the second header's magic
        assert_eq!(checked(&whole), Err(BadInitrd::NoArchive(116)));
        let mut whole = archive(&["init"]);
        whole[FILE_SIZE] = b'+';
        assert_eq!(checked(&whole), Err(BadInitrd::NoArchive(0)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_go_on_for_ever(
            at in 0usize..200, bytes in proptest::collection::vec(any::<u8>(), 0..40), keep in 0usize..400,
        ) {
            let mut image = archive(&["init", "other"]);
            image.splice(at..(at + bytes.len()).min(image.len()), bytes);
            image.truncate(keep);
            let _ = checked(&image);
        }
    }
}
