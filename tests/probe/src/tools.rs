//! What busybox has no command for: locks, shared mappings, the clock to the nanosecond.
//!
//! Each prints one line: what it found, or the error's name. Nothing here changes anything but the file that
//! is named.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Runs a tool with its arguments; `None`: there is no such tool, or too few arguments.
pub fn run(arguments: &[String]) -> Option<String> {
    let text = |index: usize| arguments.get(index).map(String::as_str);
    let result = match text(0)? {
        "time" => now(),
        "lock" => lock(text(1)?, text(2)?, text(3).unwrap_or("0")),
        "map" => map(text(1)?),
        _ => return None,
    };
    Some(match result {
        Ok(line) => line,
        Err(error) => crate::error_name(&error),
    })
}

fn now() -> io::Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_err(io::Error::other)?;
    Ok(format!("{}.{:09}", now.as_secs(), now.subsec_nanos()))
}

/// Tries for an exclusive lock of this kind, keeps it for so many seconds, and says then that it had it.
fn lock(kind: &str, path: &str, seconds: &str) -> io::Result<String> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let result = match kind {
        // SAFETY: flock takes a descriptor that `file` keeps open, and a number.
        "flock" => unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) },
        _ => {
            let whole = libc::flock {
                l_type: libc::F_WRLCK as libc::c_short,
                l_whence: libc::SEEK_SET as libc::c_short,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            // SAFETY: the descriptor is open, and the kernel only reads the struct, which lives.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &whole) }
        }
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = seconds.parse().map_err(io::Error::other)?;
    std::thread::sleep(Duration::from_secs(seconds));
    Ok("locked".into())
}

/// Writes through a shared mapping of a file of one page, and reads it back through the file.
fn map(path: &str) -> io::Result<String> {
    const LENGTH: usize = 4096;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_len(LENGTH as u64)?;
    // SAFETY: a new mapping where the kernel likes, of a file as long as it.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            LENGTH,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let words = b"through the mapping";
    // SAFETY: the page is mapped, writable and longer than the words; nobody else has a reference to it.
    unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), page.cast::<u8>(), words.len()) };
    // SAFETY: the page that was mapped, whole.
    if unsafe { libc::msync(page, LENGTH, libc::MS_SYNC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let read = std::fs::read(path)?;
    match read.len() == LENGTH && read.starts_with(words) {
        true => Ok("mapped".into()),
        false => Ok(format!("another content, of {} bytes", read.len())),
    }
}
