//! Stores through a shared mapping, which are written back only by the end of the process or in the
//! kernel's own time.
//!
//! The test also reads the file on the host: its 8-byte words follow from their places.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::time::Duration;

/// The word at this place, counted in words.
fn word(at: u64) -> u64 {
    (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Makes a file of `bytes` bytes and maps it until the process ends.
fn map(path: &str, bytes: u64) -> io::Result<*mut u64> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(path)?;
    file.set_len(bytes)?;
    let length = usize::try_from(bytes).map_err(io::Error::other)?;
    Ok(super::map(&file, length)?.as_ptr().cast())
}

/// Fills a file by a mapping, closes it while it is mapped, and prints `stored`. Then it ends,
/// waits to be killed (`hold`), or takes all memory (`eat`).
pub fn store(path: &str, bytes: &str, then: &str) -> io::Result<String> {
    let bytes: u64 = bytes.parse().map_err(io::Error::other)?;
    let start = map(path, bytes)?;
    for at in 0..bytes / 8 {
        // SAFETY: the word is inside the mapping, to which nobody has a reference.
        unsafe { start.add(at as usize).write_volatile(word(at)) };
    }
    writeln!(io::stdout(), "stored")?;
    let mut eaten = Vec::new();
    loop {
        match then {
            "hold" => std::thread::sleep(Duration::from_secs(3600)),
            "eat" => eaten.push(vec![7_u8; 1 << 20]),
            _ => return Ok("ends".into()),
        }
    }
}

/// Writes into this many bytes of huge pages.
pub fn huge(bytes: &str) -> io::Result<String> {
    let length: usize = bytes.parse().map_err(io::Error::other)?;
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is as long and writable, and nobody has a reference to it.
    unsafe { start.cast::<u8>().write_bytes(7, length) };
    Ok("written".into())
}

/// Prints how much of a file is as it was stored.
pub fn stored(path: &str, bytes: &str) -> io::Result<String> {
    let bytes: u64 = bytes.parse().map_err(io::Error::other)?;
    let mut file = File::open(path)?;
    let (mut buffer, mut at) = (vec![0; 1 << 20], 0);
    loop {
        let read = io::Read::read(&mut file, &mut buffer)?;
        if read == 0 {
            break;
        }
        for found in buffer[..read].chunks_exact(8) {
            if found != word(at).to_le_bytes() {
                return Ok(format!("another content at byte {}", at * 8));
            }
            at += 1;
        }
    }
    Ok(match at * 8 == bytes {
        true => "whole".into(),
        false => format!("{} of {bytes} bytes", at * 8),
    })
}
