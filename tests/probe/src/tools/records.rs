//! Writers for the worst moment: each appends records to a file, or stores numbers into a mapped
//! one, and prints at once what is done.
//!
//! A record's content and length follow from its number, so a reader needs nothing else to know
//! each byte. A printed line has the file's place among the arguments, and the number; or the
//! error's name in its place, after which nothing more comes.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::PAGE;

/// How many pages a mapped file has; numbers go to them in turn.
const PAGES: u64 = 16;

/// An odd number (2^64 by the golden ratio), so that no two words of a file are alike.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// A record: words that follow from its number, the first being the number itself, cut to a length
/// that also follows from it.
fn record(number: u64) -> Vec<u8> {
    let length = 16 + (number.wrapping_mul(SPREAD) >> 32) % 5000;
    (0..length.div_ceil(8))
        .flat_map(|at: u64| (number ^ at.wrapping_mul(SPREAD)).to_le_bytes())
        .take(length as usize)
        .collect()
}

/// Writes to each `KIND:FILE` until it is killed, with `pace` milliseconds between two writes to
/// one file. `synced` waits for the disk after each record, `plain` does not, `mapped` stores
/// numbers into a shared mapping.
pub fn write(pace: &str, files: &[String]) -> io::Result<String> {
    let wrong = || io::Error::from_raw_os_error(libc::EINVAL);
    let pace = Duration::from_millis(pace.parse().map_err(|_| wrong())?);
    let mut writers = Vec::new();
    for (place, file) in files.iter().enumerate() {
        let (kind, path) = file.split_once(':').ok_or_else(wrong)?;
        let (kind, path) = (kind.to_owned(), path.to_owned());
        writers.push(thread::spawn(move || {
            let path = Path::new(&path);
            let result = match kind.as_str() {
                "mapped" => store(place, path, pace),
                _ => append(place, path, pace, kind == "synced"),
            };
            if let Err(error) = result {
                let _ = writeln!(io::stdout(), "{place} {}", crate::error_name(&error));
            }
        }));
    }
    for writer in writers {
        writer.join().map_err(|_| wrong())?;
    }
    // All have failed. Whoever kills this process is to find it.
    loop {
        thread::park();
    }
}

fn append(place: usize, path: &Path, pace: Duration, sync: bool) -> io::Result<()> {
    let mut file = File::create(path)?;
    if sync {
        sync_directory(path)?;
    }
    for number in 1_u64.. {
        file.write_all(&record(number))?;
        if sync {
            file.sync_all()?;
        }
        writeln!(io::stdout(), "{place} {number}")?;
        pause(pace);
    }
    Ok(())
}

/// The file's name is durable only when its directory is.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

/// Stores each number at the start of the next page, and never asks for write-back.
fn store(place: usize, path: &Path, pace: Duration) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(path)?;
    let length = PAGES * PAGE as u64;
    file.set_len(length)?;
    let pages = super::map(&file, length as usize)?;
    for number in 1_u64.. {
        let at = (number % PAGES) as usize * PAGE;
        // SAFETY: the page stays mapped until the process ends, and is aligned for everything that
        // fits in it. Everybody refers to it by such an atomic only.
        let cell = unsafe { pages.add(at).cast::<AtomicU64>().as_ref() };
        cell.store(number, Ordering::SeqCst);
        writeln!(io::stdout(), "{place} {number}")?;
        pause(pace);
    }
    Ok(())
}

/// Keeps the file of a long life small enough to read.
fn pause(pace: Duration) {
    if !pace.is_zero() {
        thread::sleep(pace);
    }
}
