//! Landlock: a thread gives up all files but those below some directories, and more (landlock(7)).
//!
//! Whatever the kernel knows to restrict is given up: a newer one restricts more. Files that are
//! open already stay usable. A new thread has its maker's restrictions, so it is for the first
//! thread to take them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::numbers;

const PATH_BENEATH: usize = 1; // LANDLOCK_RULE_PATH_BENEATH

/// What is done to files, as the bits of `LANDLOCK_ACCESS_FS_…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access(u64);

impl Access {
    const EXECUTE: u64 = 1 << 0;
    const READ_DIR: u64 = 1 << 3;
    const MAKE_BLOCK: u64 = 1 << 11;

    /// All that a file server does: no program is run and no block device is made.
    pub const SERVE: Self = Self(!Self::EXECUTE & !Self::MAKE_BLOCK);
    /// A directory is listed.
    pub const LIST: Self = Self(Self::READ_DIR);
}

/// `struct landlock_ruleset_attr`. An older kernel takes it as long as what it does not know is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Handled {
    files: u64,
    tcp: u64,
    scopes: u64,
}

impl Handled {
    /// All that the kernel's version can restrict.
    fn by(version: u32) -> Self {
        let bits = |count: u32| (1u64 << count) - 1;
        Self {
            files: match version {
                0 => 0,
                1 => bits(13),
                2 => bits(14),     // with REFER
                3 | 4 => bits(15), // with TRUNCATE
                _ => bits(16),     // with IOCTL_DEV
            },
            tcp: if version < 4 { 0 } else { bits(2) },
            // abstract sockets and signals
            scopes: if version < 6 { 0 } else { bits(2) },
        }
    }
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct Beneath {
    allowed: u64,
    parent: RawFd,
}

/// The version of the kernel's Landlock, from 1 on; 0 where it has none or it is switched off.
pub fn version() -> u32 {
    let version = numbers::Call::LandlockVersion.answer();
    version.map_or(0, |version| u32::try_from(version).unwrap_or(0))
}

/// The calls that read a structure.
#[derive(Clone, Copy)]
enum Call<'a> {
    /// landlock_create_ruleset(2).
    Create(&'a Handled),
    /// landlock_add_rule(2).
    Add(BorrowedFd<'a>, &'a Beneath),
}

impl Call<'_> {
    /// Makes the call. Returns the descriptor that it has made, if it makes one.
    fn make(self) -> io::Result<Option<OwnedFd>> {
        let (number, arguments) = match self {
            Self::Create(handled) => (
                libc::SYS_landlock_create_ruleset,
                [
                    std::ptr::from_ref(handled) as usize,
                    size_of::<Handled>(),
                    0,
                    0,
                ],
            ),
            Self::Add(ruleset, beneath) => (
                libc::SYS_landlock_add_rule,
                [
                    ruleset.as_raw_fd() as usize,
                    PATH_BENEATH,
                    std::ptr::from_ref(beneath) as usize,
                    0,
                ],
            ),
        };
        let [first, second, third, fourth] = arguments;
        // SAFETY: of the first call the kernel reads as many bytes at the first argument as the
        // second says, the size of the structure there; of the second, for this kind of rule, one
        // `struct landlock_path_beneath_attr` at the third, which is one. Both are borrowed until
        // the call returns. What the first returns is a new descriptor that nobody else owns; the
        // second returns 0.
        unsafe {
            let answer = libc::syscall(number, first, second, third, fourth);
            match (self, RawFd::try_from(answer)) {
                (Self::Create(_), Ok(made)) if made >= 0 => Ok(Some(OwnedFd::from_raw_fd(made))),
                (Self::Add(..), Ok(0)) => Ok(None),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }
}

/// What a thread is going to give up, and the exceptions.
#[derive(Debug)]
pub struct Ruleset {
    descriptor: OwnedFd,
    handled: Handled,
}

impl Ruleset {
    /// All that Landlock can restrict: every file, TCP, signals to processes outside, and their
    /// abstract sockets. ENOSYS or EOPNOTSUPP where there is no Landlock.
    pub fn everything() -> io::Result<Self> {
        let handled = Handled::by(version());
        let descriptor = Call::Create(&handled).make()?;
        Ok(Self {
            descriptor: descriptor.ok_or(io::ErrorKind::Unsupported)?,
            handled,
        })
    }

    /// Except `access` to what is in and below `directory`, mounts that come later included.
    pub fn except(&self, directory: impl AsFd, access: Access) -> io::Result<()> {
        let beneath = Beneath {
            allowed: access.0 & self.handled.files,
            parent: directory.as_fd().as_raw_fd(),
        };
        Call::Add(self.descriptor.as_fd(), &beneath)
            .make()
            .map(drop)
    }

    /// From now on it holds for the calling thread and those that it makes, for ever. EPERM without
    /// no_new_privs.
    pub fn restrict_thread(self) -> io::Result<()> {
        numbers::Call::LandlockRestrict {
            ruleset: self.descriptor.as_raw_fd(),
        }
        .make()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    #[test]
    fn a_newer_kernel_restricts_more() {
        assert_eq!(Handled::by(0).files, 0);
        for version in 1..10 {
            let (older, newer) = (Handled::by(version - 1), Handled::by(version));
            for (less, more) in [
                (older.files, newer.files),
                (older.tcp, newer.tcp),
                (older.scopes, newer.scopes),
            ] {
                assert_eq!(less & more, less, "{version}");
            }
        }
    }

    /// In a thread of its own, which ends with what it gave up. The kernel may have no Landlock.
    #[test]
    fn a_thread_has_the_files_below_a_directory_and_no_other() {
        if version() < 3 {
            return;
        }
        let inside = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let paths = (inside.path().to_owned(), outside.path().to_owned());
        fs::write(paths.1.join("old"), "old").unwrap();
        let test = move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            let rules = Ruleset::everything().unwrap();
            let directory = File::open(&paths.0).unwrap();
            rules.except(&directory, Access::SERVE).unwrap();
            rules.restrict_thread().unwrap();
            fs::create_dir(paths.0.join("deeper")).unwrap();
            fs::write(paths.0.join("new"), "new").unwrap();
            fs::rename(paths.0.join("new"), paths.0.join("deeper/new")).unwrap();
            assert_eq!(fs::read(paths.0.join("deeper/new")).unwrap(), b"new");
            let denied = [
                fs::read(paths.1.join("old")).map(drop),
                fs::write(paths.1.join("new"), "new"),
                fs::remove_file(paths.1.join("old")),
                std::net::TcpStream::connect("127.0.0.1:9").map(drop),
            ];
            denied.map(|denied| denied.unwrap_err().raw_os_error())
        };
        let [read, write, remove, connect] = std::thread::spawn(test).join().unwrap();
        assert_eq!([read, write, remove], [Some(libc::EACCES); 3]);
        if version() >= 4 {
            assert_eq!(connect, Some(libc::EACCES));
        }
        assert_eq!(fs::read(outside.path().join("old")).unwrap(), b"old");
    }
}
