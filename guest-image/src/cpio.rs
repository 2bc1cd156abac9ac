//! The `newc` cpio format, as the kernel unpacks an initrd
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Called by `main`. The archive is reproducible: times, owners and inode numbers of the build
//! machine stay out of it, and entries keep their order.

use std::io::{self, Write};

/// One entry of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Directory {
        mode: u32,
    },
    File {
        mode: u32,
        content: Vec<u8>,
    },
    /// A character device; `number` is major and minor.
    Device {
        mode: u32,
        number: (u32, u32),
    },
}

/// Writes a whole archive: the entries, each with its path without a leading slash, and the
/// trailer.
pub fn write(out: &mut impl Write, entries: &[(&str, Entry)]) -> io::Result<()> {
    // Inode numbers only distinguish hard links, of which we have none.
    for (inode, (name, entry)) in (1..).zip(entries) {
        let (mode, links, number, content): (u32, u32, (u32, u32), &[u8]) = match entry {
            Entry::Directory { mode } => (0o040_000 | mode, 2, (0, 0), &[]),
            Entry::File { mode, content } => (0o100_000 | mode, 1, (0, 0), content),
            Entry::Device { mode, number } => (0o020_000 | mode, 1, *number, &[]),
        };
        header(out, name, inode, mode, links, number, content.len())?;
        out.write_all(content)?;
        pad(out, content.len())?;
    }
    header(out, "TRAILER!!!", 0, 0, 1, (0, 0), 0)
}

fn header(
    out: &mut impl Write,
    name: &str,
    inode: u32,
    mode: u32,
    links: u32,
    (major, minor): (u32, u32),
    size: usize,
) -> io::Result<()> {
    let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let size = u32::try_from(size).map_err(too_large)?;
    let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
    // namesize, check
    let fields = [
        inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0,
    ];
    let mut bytes = b"070701".to_vec();
    for field in fields {
        bytes.extend(format!("{field:08X}").bytes());
    }
    bytes.extend(name.bytes());
    bytes.push(0);
    out.write_all(&bytes)?;
    pad(out, bytes.len())
}

/// A header with its name ends on a multiple of four, and so does each content.
fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    const ZEROS: [u8; 4] = [0; 4];
    out.write_all(&ZEROS[..written.next_multiple_of(4) - written])
}

#[cfg(test)]
pub mod reader {
    //! Reads an archive back, from the format's description and without the code above.

    /// One entry: name, mode, device number, content. The reader asserts that uid, gid and mtime
    /// are 0.
    #[derive(Debug, PartialEq, Eq)]
    pub struct Found {
        pub name: String,
        pub mode: u32,
        pub number: (u32, u32),
        pub content: Vec<u8>,
    }

    /// All entries up to the trailer, which must be the archive's last part.
    pub fn read(archive: &[u8]) -> Vec<Found> {
        let mut found = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&archive[at..at + 6], b"070701", "magic at {at}");
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                let digits = std::str::from_utf8(&archive[start..start + 8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            for index in [2, 3, 5] {
                assert_eq!(field(index), 0, "uid, gid and mtime");
            }
            let name_end = at + 110 + field(11) as usize;
            let name = String::from_utf8(archive[at + 110..name_end - 1].to_vec()).unwrap();
            assert_eq!(archive[name_end - 1], 0);
            let start = name_end.next_multiple_of(4);
            let end = start + field(6) as usize;
            if name == "TRAILER!!!" {
                assert_eq!(archive.len(), start);
                return found;
            }
            let content = archive[start..end].to_vec();
            let number = (field(9), field(10));
            found.push(Found {
                name,
                mode: field(1),
                number,
                content,
            });
            at = end.next_multiple_of(4);
        }
    }
}
