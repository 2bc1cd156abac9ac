//! What a file system can do: one line for each feature, `NAME: RESULT`. The result is a word or an
//! error's name.
//!
//! `tests/tests/file_systems` compares the lines of two runtimes, and with `docs/file-systems.md`.
//! Each feature has a file of its own, in a directory that is empty before.

mod attributes;
mod ranges;

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// A feature: its name, and what is done to a file that does not exist yet.
type Feature = (&'static str, fn(&Path) -> io::Result<&'static str>);

const FEATURES: [Feature; 23] = [
    ("flock", flock),
    ("fcntl locks", process_locks),
    ("fcntl locks, who holds them", holder),
    ("OFD locks", open_file_locks),
    ("leases, for reading", |path| lease(path, libc::F_RDLCK)),
    ("leases, for writing", |path| lease(path, libc::F_WRLCK)),
    ("O_DIRECT", direct),
    ("O_TMPFILE", unnamed),
    ("O_APPEND", append),
    ("RENAME_NOREPLACE", |path| {
        rename(path, libc::RENAME_NOREPLACE)
    }),
    ("RENAME_EXCHANGE", |path| {
        rename(path, libc::RENAME_EXCHANGE)
    }),
    ("RENAME_WHITEOUT", |path| {
        rename(path, libc::RENAME_WHITEOUT)
    }),
    ("a link to a file without a name", link_unlinked),
    ("a file in use without a name", unlinked),
    ("FIFOs", fifo),
    ("UNIX sockets", socket),
    ("device nodes", node),
    ("name_to_handle_at", handle),
    ("statx, birth time", birth),
    ("times to the nanosecond", times),
    ("inotify of the container's own changes", inotify),
    ("syncfs", syncfs),
    ("shared mappings", mapping),
];

/// All lines for a directory.
pub fn report(directory: &str) -> io::Result<String> {
    let directory = Path::new(directory);
    let all = FEATURES.iter().chain(&ranges::FEATURES);
    let mut lines = Vec::new();
    for (number, (name, act)) in all.chain(&attributes::FEATURES).enumerate() {
        let result = match act(&directory.join(format!("file-{number}"))) {
            Ok(word) => word.to_owned(),
            Err(error) => crate::error_name(&error),
        };
        lines.push(format!("{name}: {result}"));
    }
    Ok(lines.join("\n"))
}

/// Whether a directory of the host is carried: reads what the host has put there; then writes,
/// syncs, maps, renames and reads back.
pub fn carried(directory: &str) -> io::Result<String> {
    let directory = Path::new(directory);
    if fs::read(directory.join("kept"))? != b"of the host\n" {
        return Ok("another content".into());
    }
    let (new, written) = (directory.join("new"), directory.join("written"));
    let mut file = match File::create(&new) {
        Err(error) if error.raw_os_error() == Some(libc::EROFS) => return Ok("read-only".into()),
        other => other?,
    };
    file.write_all(b"of the container\n")?;
    file.sync_all()?;
    fs::rename(&new, &written)?;
    File::open(directory)?.sync_all()?;
    let mapped = super::map_and_read(&directory.join("mapped").to_string_lossy())?;
    let right = mapped == "mapped" && fs::read(&written)? == b"of the container\n";
    Ok(if right { "carried" } else { "lost" }.into())
}

/// A new file, to be read and written.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).open(path)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// What a system call has returned, or its error.
fn checked(result: impl Into<i64>) -> io::Result<i64> {
    match result.into() {
        -1 => Err(io::Error::last_os_error()),
        other => Ok(other),
    }
}

/// One word for the right result, another one for the wrong.
fn word(right: bool, yes: &'static str, no: &'static str) -> io::Result<&'static str> {
    Ok(if right { yes } else { no })
}

/// Runs `work` in a child process, whose exit status is the result.
fn in_child(work: impl FnOnce() -> io::Result<bool>) -> io::Result<bool> {
    // SAFETY: this program has one thread, so the child may do everything that the parent could.
    let child = checked(unsafe { libc::fork() })?;
    if child == 0 {
        let code = match work() {
            Ok(true) => 0,
            Ok(false) => 1,
            Err(_) => 2,
        };
        // SAFETY: ends the child at once; nothing of the parent's is flushed twice.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` lives, and the kernel writes an int there.
    checked(unsafe { libc::waitpid(child as i32, &mut status, 0) })?;
    match libc::WEXITSTATUS(status) {
        0 => Ok(true),
        1 => Ok(false),
        _ => Err(ErrorKind::Other.into()),
    }
}

fn is_taken(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}

fn flock(path: &Path) -> io::Result<&'static str> {
    let (one, two) = (create(path)?, open(path)?);
    super::locks::flock(&one, false)?;
    let taken = is_taken(super::locks::flock(&two, false))?;
    drop(one);
    super::locks::flock(&two, false)?;
    word(taken, "excludes", "excludes nobody")
}

/// fcntl's lock of all of a file.
fn lock(file: &File, command: i32) -> io::Result<()> {
    super::locks::range(file, command, libc::F_WRLCK, 0, 0)
}

fn process_locks(path: &Path) -> io::Result<&'static str> {
    let one = create(path)?;
    lock(&one, libc::F_SETLK)?;
    let taken = in_child(|| is_taken(lock(&open(path)?, libc::F_SETLK)))?;
    word(taken, "exclude", "exclude nobody")
}

fn holder(path: &Path) -> io::Result<&'static str> {
    let one = create(path)?;
    lock(&one, libc::F_SETLK)?;
    let parent = std::process::id() as i32;
    let known = in_child(|| {
        // SAFETY: the struct holds only integers, for which zeros are values.
        let mut asked: libc::flock = unsafe { std::mem::zeroed() };
        asked.l_type = libc::F_WRLCK as libc::c_short;
        // SAFETY: the descriptor is open while the call lasts, and the kernel writes into a struct
        // that lives.
        checked(unsafe { libc::fcntl(open(path)?.as_raw_fd(), libc::F_GETLK, &mut asked) })?;
        Ok(asked.l_pid == parent)
    })?;
    word(known, "told", "not told")
}

fn open_file_locks(path: &Path) -> io::Result<&'static str> {
    let (one, two) = (create(path)?, open(path)?);
    lock(&one, libc::F_OFD_SETLK)?;
    let taken = is_taken(lock(&two, libc::F_OFD_SETLK))?;
    word(taken, "exclude", "exclude nobody")
}

fn lease(path: &Path, kind: i32) -> io::Result<&'static str> {
    drop(create(path)?);
    let file = File::open(path)?;
    // SAFETY: fcntl takes a descriptor that `file` keeps open, and a number.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) })?;
    Ok("taken")
}

/// A buffer with the alignment that O_DIRECT needs.
#[repr(align(4096))]
struct Page([u8; 4096]);

fn direct(path: &Path) -> io::Result<&'static str> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    let file = options.custom_flags(libc::O_DIRECT).open(path)?;
    let (page, mut back) = (Page([7; 4096]), Page([0; 4096]));
    file.write_all_at(&page.0, 0)?;
    file.read_exact_at(&mut back.0, 0)?;
    word(page.0 == back.0, "reads back", "another content")
}

fn unnamed(path: &Path) -> io::Result<&'static str> {
    let directory = path.parent().ok_or(ErrorKind::InvalidInput)?;
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_TMPFILE);
    let mut file = options.open(directory)?;
    file.write_all(b"kept")?;
    link(&file, path)?;
    word(
        fs::read(path)? == b"kept",
        "made and named",
        "another content",
    )
}

/// Gives an open file a name.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let (from, to) = (
        CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?,
        c_path(path)?,
    );
    let (here, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both are C strings that live, and the kernel only reads them.
    checked(unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), follow) })?;
    Ok(())
}

fn append(path: &Path) -> io::Result<&'static str> {
    drop(create(path)?);
    let mut options = OpenOptions::new();
    let (mut one, mut two) = (options.append(true).open(path)?, options.open(path)?);
    for number in 0..4 {
        one.write_all(&[b'a' + number])?;
        two.write_all(&[b'A' + number])?;
    }
    word(fs::read(path)? == b"aAbBcCdD", "at the end", "lost")
}

fn rename(path: &Path, flag: libc::c_uint) -> io::Result<&'static str> {
    let other = path.with_extension("other");
    fs::write(path, "one")?;
    fs::write(&other, "two")?;
    let (from, to) = (c_path(path)?, c_path(&other)?);
    let here = libc::AT_FDCWD;
    // SAFETY: both are C strings that live, and the kernel only reads them.
    let done = checked(unsafe { libc::renameat2(here, from.as_ptr(), here, to.as_ptr(), flag) });
    match (flag, done) {
        (libc::RENAME_NOREPLACE, Err(error)) if error.kind() == ErrorKind::AlreadyExists => {
            word(fs::read(&other)? == b"two", "keeps what is there", "lost")
        }
        (_, Err(error)) => Err(error),
        (libc::RENAME_NOREPLACE, Ok(_)) => Ok("replaces"),
        (libc::RENAME_EXCHANGE, Ok(_)) => {
            let both = (fs::read(path)?, fs::read(&other)?);
            word(both == (b"two".into(), b"one".into()), "exchanges", "lost")
        }
        (_, Ok(_)) => word(
            fs::symlink_metadata(path)?.rdev() == 0,
            "leaves a node",
            "lost",
        ),
    }
}

fn link_unlinked(path: &Path) -> io::Result<&'static str> {
    let file = create(path)?;
    fs::remove_file(path)?;
    link(&file, path)?;
    Ok("made")
}

fn unlinked(path: &Path) -> io::Result<&'static str> {
    let file = create(path)?;
    fs::remove_file(path)?;
    file.write_all_at(b"kept", 0)?;
    let mut back = [0; 4];
    file.read_exact_at(&mut back, 0)?;
    let right = &back == b"kept" && file.metadata()?.nlink() == 0;
    word(right, "is kept", "is lost")
}

fn make_node(path: &Path, mode: libc::mode_t, device: libc::dev_t) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: the path is a C string that lives, and the kernel only reads it.
    checked(unsafe { libc::mknod(path.as_ptr(), mode, device) })?;
    Ok(())
}

fn fifo(path: &Path) -> io::Result<&'static str> {
    make_node(path, libc::S_IFIFO | 0o600, 0)?;
    let mut both = open(path)?;
    both.write_all(b"through")?;
    let mut back = [0; 7];
    both.read_exact(&mut back)?;
    word(&back == b"through", "carry", "lose")
}

fn socket(path: &Path) -> io::Result<&'static str> {
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    let mut client = std::os::unix::net::UnixStream::connect(path)?;
    client.write_all(b"through")?;
    let mut back = [0; 7];
    listener.accept()?.0.read_exact(&mut back)?;
    word(&back == b"through", "carry", "lose")
}

fn node(path: &Path) -> io::Result<&'static str> {
    make_node(path, libc::S_IFCHR | 0o600, libc::makedev(1, 3))?;
    Ok("made")
}

fn handle(path: &Path) -> io::Result<&'static str> {
    drop(create(path)?);
    let path = c_path(path)?;
    // struct file_handle: the room for the handle in bytes, its type, and the room.
    let mut handle = [128u32, 0].into_iter().chain([0; 32]).collect::<Vec<_>>();
    let mut mount = 0;
    // SAFETY: the path is a C string; behind the head of `handle` are the 128 bytes that it
    // promises.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            handle.as_mut_ptr(),
            &raw mut mount,
            0,
        )
    };
    checked(done)?;
    Ok("given")
}

fn birth(path: &Path) -> io::Result<&'static str> {
    let metadata = create(path)?.metadata()?;
    word(metadata.created().is_ok(), "told", "not told")
}

fn times(path: &Path) -> io::Result<&'static str> {
    let file = create(path)?;
    let moment = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(moment)?;
    drop(file);
    word(fs::metadata(path)?.modified()? == moment, "kept", "rounded")
}

fn inotify(path: &Path) -> io::Result<&'static str> {
    let directory = c_path(path.parent().ok_or(ErrorKind::InvalidInput)?)?;
    // SAFETY: takes only a number; the result is checked.
    let number = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
    checked(number)?;
    // SAFETY: a new descriptor, which nobody else has.
    let mut events = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(number) };
    // SAFETY: the path is a C string that lives, and the kernel only reads it.
    checked(unsafe { libc::inotify_add_watch(number, directory.as_ptr(), libc::IN_CREATE) })?;
    drop(create(path)?);
    let mut buffer = [0; 512];
    word(events.read(&mut buffer)? > 0, "tells", "tells nothing")
}

fn syncfs(path: &Path) -> io::Result<&'static str> {
    let file = create(path)?;
    // SAFETY: takes a descriptor that `file` keeps open.
    checked(unsafe { libc::syncfs(file.as_raw_fd()) })?;
    Ok("done")
}

fn mapping(path: &Path) -> io::Result<&'static str> {
    let mapped = super::map_and_read(&path.to_string_lossy())?;
    word(mapped == "mapped", "read back", "another content")
}

/// An extended attribute of a path.
fn set_attribute(path: &Path, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: two C strings and a slice, which the kernel only reads; the length is the slice's.
    let done = unsafe {
        libc::setxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    checked(done)?;
    Ok(())
}
