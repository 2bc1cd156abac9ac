//! File locks of each kind.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// An exclusive lock of the whole file. `kind` is `flock`, `fcntl` or `ofd` (an open file's). `how`
/// is `try`, `wait`, or `hold`, which keeps the lock until this process is killed. A line says when
/// the lock is there.
pub fn lock(kind: &str, path: &str, how: &str) -> io::Result<String> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let wait = how == "wait";
    if wait {
        say("waits")?;
    }
    match kind {
        "flock" => flock(&file, wait)?,
        "fcntl" if wait => range(&file, libc::F_SETLKW, libc::F_WRLCK, 0, 0)?,
        "fcntl" => range(&file, libc::F_SETLK, libc::F_WRLCK, 0, 0)?,
        "ofd" if wait => range(&file, libc::F_OFD_SETLKW, libc::F_WRLCK, 0, 0)?,
        "ofd" => range(&file, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0)?,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    }
    if how == "hold" {
        say("locked")?;
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }
    Ok("locked".into())
}

fn say(word: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{word}")
}

/// An exclusive lock of flock's.
pub fn flock(file: &File, wait: bool) -> io::Result<()> {
    let how = if wait { 0 } else { libc::LOCK_NB };
    // SAFETY: flock takes a descriptor that `file` keeps open, and a number.
    match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | how) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// fcntl's lock of `length` bytes; 0: to the end, however long the file gets.
pub fn range(file: &File, command: i32, kind: i32, start: i64, length: i64) -> io::Result<()> {
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel only reads the struct, which lives.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Adds 1 to the number in a file `times` times, each time under a lock. The file stays open.
/// Prints the number.
pub fn count(path: &str, times: &str) -> io::Result<String> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut last = 0;
    for _ in 0..times.parse().map_err(io::Error::other)? {
        range(&file, libc::F_SETLKW, libc::F_WRLCK, 0, 0)?;
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 0)?;
        last = u64::from_le_bytes(bytes) + 1;
        file.write_all_at(&last.to_le_bytes(), 0)?;
        range(&file, libc::F_SETLK, libc::F_UNLCK, 0, 0)?;
        // Longer than a tick of the clock by which a file counts as new.
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(last.to_string())
}
