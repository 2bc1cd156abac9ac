//! What busybox has no command for: locks, shared mappings, UNIX sockets, unnamed files, inotify, a
//! database's log, records that say how far they have come, stores through mappings, a full file
//! system, a file system's features, huge pages, the time of operations on files, the clock to the
//! nanosecond, a server of many connections, a program without BPF.
//!
//! Each tool prints one line: what it found, or the error's name. `features` prints many lines;
//! tools that go on report each step. Nothing here changes anything but the named files.

mod features;
mod files;
mod locks;
mod log;
mod mapping;
mod ports;
mod records;
mod room;

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::ptr::NonNull;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Runs a tool with its arguments. `None`: there is no such tool, or there are too few arguments.
pub fn run(arguments: &[String]) -> Option<String> {
    let text = |index: usize| arguments.get(index).map(String::as_str);
    let result = match text(0)? {
        "time" => now(),
        "lock" => locks::lock(text(1)?, text(2)?, text(3)?),
        "count" => locks::count(text(1)?, text(2)?),
        "map" => map_and_read(text(1)?),
        "serve" => serve(text(1)?),
        "ask" => ask(text(1)?),
        "unnamed" => unnamed(text(1)?),
        "watch" => watch(text(1)?),
        "store" => mapping::store(text(1)?, text(2)?, text(3)?),
        "stored" => mapping::stored(text(1)?, text(2)?),
        "fill" => room::fill(text(1)?, text(2)?),
        "fill-map" => room::fill_map(text(1)?, text(2)?),
        "stat-open" => room::stat_open(text(1)?, text(2)?),
        "log-write" => log::write(text(1)?, text(2)?),
        "listen" => ports::listen(arguments.get(1..)?),
        "without-bpf" => ports::without_bpf(arguments.get(1..)?),
        "features" => features::report(text(1)?),
        "carried" => features::carried(text(1)?),
        "log-check" => log::check(text(1)?),
        "files" => files::times(text(1)?, text(2)?),
        "huge" => mapping::huge(text(1)?),
        "ticks" => ticks(text(1)?),
        "records" => records::write(text(1)?, arguments.get(2..)?),
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

/// Prints a number every `pace` milliseconds until nobody reads them.
fn ticks(pace: &str) -> io::Result<String> {
    let wrong = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let pace = Duration::from_millis(pace.parse().map_err(wrong)?);
    for number in 1_u64.. {
        writeln!(io::stdout(), "{number}")?;
        std::thread::sleep(pace);
    }
    Ok("all".into())
}

/// Writes through a shared mapping of a file of one page, and reads it back through the file.
fn map_and_read(path: &str) -> io::Result<String> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_len(PAGE as u64)?;
    let page = map_page(&file)?;
    let words = b"through the mapping";
    // SAFETY: the page is mapped, writable and longer than the words; nobody else has a reference
    // to it.
    unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), page.as_ptr(), words.len()) };
    // SAFETY: the whole page that was mapped.
    if unsafe { libc::msync(page.as_ptr().cast(), PAGE, libc::MS_SYNC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let read = std::fs::read(path)?;
    match read.len() == PAGE && read.starts_with(words) {
        true => Ok("mapped".into()),
        false => Ok(format!("another content, of {} bytes", read.len())),
    }
}

/// The size of a database's page and of the machine's.
const PAGE: usize = 4096;

/// Maps the first page of a file that has one: shared, writable, until the process ends.
fn map_page(file: &File) -> io::Result<NonNull<u8>> {
    map(file, PAGE)
}

/// Maps `length` bytes of a file that has them, in the same way.
fn map(file: &File, length: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice, of a file as long as it.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(page.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))
}

/// Makes a socket and answers one connection.
fn serve(path: &str) -> io::Result<String> {
    let (mut stream, _) = UnixListener::bind(path)?.accept()?;
    stream.write_all(b"served")?;
    Ok("asked".into())
}

/// Connects to a socket and returns what it says.
fn ask(path: &str) -> io::Result<String> {
    let mut answer = String::new();
    UnixStream::connect(path)?.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Makes an unnamed file in a directory.
fn unnamed(directory: &str) -> io::Result<String> {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_TMPFILE);
    options.open(directory).map(|_| "made".into())
}

/// Prints each name that is made in a directory, by inotify, until it is killed. `watching` comes
/// first.
fn watch(directory: &str) -> io::Result<String> {
    const HEAD: usize = 16; // struct inotify_event, up to the name
    let path = CString::new(directory)?;
    // SAFETY: takes only a number; the result is checked.
    let number = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else has.
    let mut events = unsafe { File::from_raw_fd(number) };
    // SAFETY: `path` is a C string that lives, and the kernel only reads it.
    if unsafe { libc::inotify_add_watch(number, path.as_ptr(), libc::IN_CREATE) } < 0 {
        return Err(io::Error::last_os_error());
    }
    writeln!(io::stdout(), "watching")?;
    let mut buffer = [0; 4096];
    loop {
        let read = events.read(&mut buffer)?;
        let mut rest = buffer.get(..read).unwrap_or_default();
        while let Some((head, after)) = rest.split_at_checked(HEAD) {
            let length = head[12..].try_into().map_or(0, u32::from_ne_bytes);
            let (name, after) = after
                .split_at_checked(length as usize)
                .ok_or_else(|| io::Error::other("half an event"))?;
            let end = name.iter().position(|byte| *byte == 0);
            let name = String::from_utf8_lossy(&name[..end.unwrap_or(name.len())]);
            writeln!(io::stdout(), "{name}")?;
            rest = after;
        }
    }
}
