//! Fills a file system by writes and by a mapping, and heeds only the results of these calls.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

use super::PAGE;

/// The length of each write.
const BLOCK: usize = 16 * PAGE;

/// Writes at most `bytes` bytes, and looks only at the results of `write`. Prints how it ended, and
/// whether the file is as long as what was written.
pub fn fill(path: &str, bytes: &str) -> io::Result<String> {
    let most: usize = bytes.parse().map_err(io::Error::other)?;
    let mut file = File::create(path)?;
    let (mut written, block) = (0, [7; BLOCK]);
    let ended = loop {
        if written >= most {
            break "all is written".to_owned();
        }
        match file.write(&block) {
            Ok(count) => written += count,
            Err(error) => break crate::error_name(&error),
        }
    };
    let has = std::fs::metadata(path)?.len();
    Ok(match has == written as u64 {
        true => ended,
        false => format!("{ended}: {has} of {written} bytes are there"),
    })
}

/// SIGBUS's handler: leaves with the answer, since the store would be tried again.
extern "C" fn store_failed(_signal: libc::c_int) {
    let words = b"SIGBUS\n";
    // SAFETY: write and _exit may be called in a signal's handler; the words are static.
    unsafe {
        libc::write(1, words.as_ptr().cast(), words.len());
        libc::_exit(0);
    }
}

/// Stores into each page of a mapped hole, syncs it, and closes the file. Prints `SIGBUS` if a
/// store ended so, and `told` if one of the calls failed.
pub fn fill_map(path: &str, bytes: &str) -> io::Result<String> {
    let length: usize = bytes.parse().map_err(io::Error::other)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(path)?;
    file.set_len(length as u64)?;
    let handler = store_failed as extern "C" fn(libc::c_int);
    // SAFETY: the handler only calls what a handler may.
    unsafe { libc::signal(libc::SIGBUS, handler as libc::sighandler_t) };
    let start = super::map(&file, length)?.as_ptr();
    for at in (0..length).step_by(PAGE) {
        // SAFETY: `at` is inside the mapping, to which nobody has a reference.
        unsafe { start.add(at).write_volatile(7) };
    }
    // SAFETY: the whole mapping, and a descriptor that nobody uses afterwards.
    let told = unsafe {
        libc::msync(start.cast(), length, libc::MS_SYNC) != 0
            || libc::close(std::os::fd::IntoRawFd::into_raw_fd(file)) != 0
    };
    Ok(if told { "told" } else { "nobody was told" }.into())
}

/// Prints what `stat` says of an open file: after it was written, and after it was synced.
pub fn stat_open(path: &str, bytes: &str) -> io::Result<String> {
    use std::os::unix::fs::MetadataExt;

    let length: usize = bytes.parse().map_err(io::Error::other)?;
    let mut file = File::create(path)?;
    let mut last = std::fs::metadata(path)?;
    let mut said = Vec::new();
    for step in ["written", "synced", "written again"] {
        std::thread::sleep(std::time::Duration::from_millis(20));
        match step {
            "synced" => file.sync_all()?,
            _ => file.write_all(&vec![7; length])?,
        }
        let (by_name, by_file) = (std::fs::metadata(path)?, file.metadata()?);
        let same = [
            by_name.blocks() == by_file.blocks(),
            by_name.len() == by_file.len(),
            time(&by_name) == time(&by_file),
        ];
        said.push(format!(
            "{step}: {} bytes, {} blocks, {}{}",
            by_name.len(),
            by_name.blocks(),
            if time(&by_name) > time(&last) {
                "newer"
            } else {
                "as old"
            },
            if same == [true; 3] {
                ""
            } else {
                ", another by its descriptor"
            },
        ));
        last = by_name;
    }
    Ok(said.join("; "))
}

/// The times of the last change, of its content and of its inode.
fn time(of: &std::fs::Metadata) -> [i64; 4] {
    use std::os::unix::fs::MetadataExt;
    [of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec()]
}
