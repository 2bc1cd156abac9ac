//! Writers of the two archive formats that a test host needs: cpio (newc) for its first root, tar
//! (ustar) for image layers. `prepare` and `image` call them.
//!
//! Deterministic: owner root, time 0, entries in the given order.

use std::io::{self, Write};

#[derive(Clone, Copy)]
pub enum Entry<'a> {
    Directory,
    /// A file with this content.
    File(&'a [u8]),
    /// A symbolic link to this target.
    Link(&'a str),
}

/// A cpio archive in the newc format, which the kernel's initramfs needs.
pub struct Cpio<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    pub fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// Adds an entry; `name` has no leading slash.
    pub fn add(&mut self, name: &str, mode: u32, entry: Entry<'_>) -> io::Result<()> {
        self.inode += 1;
        let (kind, body): (u32, &[u8]) = match entry {
            Entry::Directory => (0o040_000, &[]),
            Entry::File(content) => (0o100_000, content),
            Entry::Link(target) => (0o120_000, target.as_bytes()),
        };
        self.raw(name, kind | mode, body)
    }

    /// Writes the trailer and returns the writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.raw("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }

    fn raw(&mut self, name: &str, mode: u32, body: &[u8]) -> io::Result<()> {
        let size = u32::try_from(body.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(header.len() + name.len() + 1, 4)?;
        self.out.write_all(body)?;
        self.pad(body.len(), 4)
    }

    fn pad(&mut self, written: usize, unit: usize) -> io::Result<()> {
        self.out
            .write_all(&[0; 512][..written.next_multiple_of(unit) - written])
    }
}

/// A tar archive in the ustar format.
pub struct Tar<W: Write>(W);

impl<W: Write> Tar<W> {
    pub fn new(out: W) -> Self {
        Self(out)
    }

    /// Adds an entry; `name` has no leading slash and less than 100 bytes, as ustar requires.
    pub fn add(&mut self, name: &str, mode: u32, entry: Entry<'_>) -> io::Result<()> {
        let (kind, body, target): (u8, &[u8], &str) = match entry {
            Entry::Directory => (b'5', &[], ""),
            Entry::File(content) => (b'0', content, ""),
            Entry::Link(target) => (b'2', &[], target),
        };
        let mut header = [0_u8; 512];
        put(&mut header, 0..100, name.as_bytes())?;
        put(&mut header, 100..107, format!("{mode:07o}").as_bytes())?;
        put(&mut header, 108..115, b"0000000")?;
        put(&mut header, 116..123, b"0000000")?;
        put(
            &mut header,
            124..135,
            format!("{:011o}", body.len()).as_bytes(),
        )?;
        put(&mut header, 136..147, b"00000000000")?;
        put(&mut header, 148..156, b"        ")?;
        header[156] = kind;
        put(&mut header, 157..257, target.as_bytes())?;
        put(&mut header, 257..265, b"ustar\x0000")?;
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        put(&mut header, 148..156, format!("{sum:06o}\0 ").as_bytes())?;
        self.0.write_all(&header)?;
        self.0.write_all(body)?;
        self.0
            .write_all(&[0; 512][..body.len().next_multiple_of(512) - body.len()])
    }

    /// Writes the two final blocks and returns the writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.0.write_all(&[0; 1024])?;
        Ok(self.0)
    }
}

fn put(header: &mut [u8; 512], field: std::ops::Range<usize>, value: &[u8]) -> io::Result<()> {
    let room = &mut header[field];
    if value.len() > room.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too long for a tar header",
        ));
    }
    room[..value.len()].copy_from_slice(value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn tar_reads_what_we_wrote() {
        let mut tar = Tar::new(Vec::new());
        tar.add("etc", 0o755, Entry::Directory).unwrap();
        tar.add("etc/name", 0o644, Entry::File(b"hello\n")).unwrap();
        tar.add("link", 0o777, Entry::Link("etc/name")).unwrap();
        let bytes = tar.finish().unwrap();
        let mut child = Command::new("tar")
            .args(["-tvf", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        let listing = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        assert!(
            listing.contains("drwxr-xr-x") && listing.contains("link -> etc/name"),
            "{listing}"
        );
    }

    #[test]
    fn a_cpio_entry_is_padded_to_four_bytes() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.add("a", 0o644, Entry::File(b"12345")).unwrap();
        let bytes = cpio.finish().unwrap();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..120], b"12345\0\0\0");
        assert_eq!(&bytes[120..126], b"070701");
    }

    #[test]
    fn a_name_too_long_for_tar_is_refused() {
        assert!(
            Tar::new(Vec::new())
                .add(&"x".repeat(101), 0o644, Entry::Directory)
                .is_err()
        );
    }
}
