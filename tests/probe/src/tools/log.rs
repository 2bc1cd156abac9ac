//! A small write-ahead log of a database: what sqlite does with files in WAL mode, and what it
//! relies on.
//!
//! A writer locks one byte of the index file, adds a frame behind the last one that the index
//! knows, waits until it is on disk, publishes it in the index, which is shared mapped memory, and
//! unlocks. The first process that opens it makes the index anew from the whole frames. `ACK` gets
//! the number of each frame that is durable.
//!
//! The test also reads frames on the host. Each has its number, a sum (FNV-1a of the rest), and
//! bytes that follow from its number.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::PAGE;
use super::locks::range;

/// sqlite uses the same byte for its writers' lock.
const WRITER: i64 = 120;

struct Log {
    frames: File,
    /// The index file, for its locks.
    shared: File,
    /// The number of the last frame, in the mapping.
    last: &'static AtomicU64,
}

impl Log {
    fn open(directory: &Path) -> io::Result<Self> {
        let open = |name| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(directory.join(name))
        };
        let (frames, shared) = (open("frames")?, open("index")?);
        shared.set_len(PAGE as u64)?;
        let page = super::map_page(&shared)?;
        // SAFETY: the page stays mapped until the process ends, and is aligned for everything that
        // fits in it. Other processes change it, which atomics allow; nothing here refers to it
        // otherwise.
        let last = unsafe { page.cast::<AtomicU64>().as_ref() };
        Ok(Self {
            frames,
            shared,
            last,
        })
    }

    fn lock(&self, command: i32) -> io::Result<()> {
        range(&self.shared, command, libc::F_WRLCK, WRITER, 1)
    }

    fn unlock(&self) -> io::Result<()> {
        range(&self.shared, libc::F_SETLK, libc::F_UNLCK, WRITER, 1)
    }

    /// How many frames are whole, from the first one on.
    fn whole(&self) -> io::Result<u64> {
        let mut found = [0; PAGE];
        for number in 1.. {
            let wanted = frame(number);
            match self.frames.read_exact_at(&mut found, place(number)) {
                Ok(()) if found == wanted => {}
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
                _ => return Ok(number - 1),
            }
        }
        Ok(u64::MAX)
    }
}

fn place(number: u64) -> u64 {
    (number - 1) * PAGE as u64
}

fn frame(number: u64) -> [u8; PAGE] {
    let mut frame = [0; PAGE];
    frame[..8].copy_from_slice(&number.to_le_bytes());
    for (at, byte) in frame.iter_mut().enumerate().skip(16) {
        *byte = (number as usize * 31 + at) as u8;
    }
    let sum = frame[..8].iter().chain(&frame[16..]);
    let sum = sum.fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    frame[8..16].copy_from_slice(&sum.to_le_bytes());
    frame
}

/// Writes frames until it is killed.
pub fn write(directory: &str, acknowledge: &str) -> io::Result<String> {
    let log = Log::open(Path::new(directory))?;
    let mut acknowledge = OpenOptions::new()
        .create(true)
        .append(true)
        .open(acknowledge)?;
    log.lock(libc::F_SETLKW)?;
    log.last.store(log.whole()?, Ordering::SeqCst);
    log.unlock()?;
    loop {
        log.lock(libc::F_SETLKW)?;
        let number = log.last.load(Ordering::SeqCst) + 1;
        log.frames.write_all_at(&frame(number), place(number))?;
        log.frames.sync_data()?;
        log.last.store(number, Ordering::SeqCst);
        log.unlock()?;
        writeln!(acknowledge, "{number}")?;
    }
}

/// Takes the writers' lock; prints how many frames are whole and how many the index knows.
pub fn check(directory: &str) -> io::Result<String> {
    let log = Log::open(Path::new(directory))?;
    log.lock(libc::F_SETLK)?;
    let line = format!("{} {}", log.whole()?, log.last.load(Ordering::SeqCst));
    log.unlock()?;
    Ok(line)
}
