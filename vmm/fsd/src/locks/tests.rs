//! A guest's locks on real files; the test plays the host's other processes.

use std::fs::{self, OpenOptions};
use std::path::Path;

use virtiofsd::filesystem::{FsOptions, ROOT_ID};
use virtiofsd::passthrough::{Config, PassthroughFs};

use super::*;

const SETLK: u32 = Opcode::Setlk as u32;
const WHOLE: (u64, u64) = (0, Range::LAST);
const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const UNLOCK: u32 = libc::F_UNLCK as u32;

/// A share with one file of one guest, and its locks.
struct Guest {
    directory: tempfile::TempDir,
    files: PassthroughFs,
    locks: Locks,
    node: u64,
}

fn nobody() -> Context {
    Context {
        uid: 0.into(),
        gid: 0.into(),
        pid: 1,
    }
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        let files = PassthroughFs::new(Config {
            root_dir: directory.path().to_str().unwrap().into(),
            ..Config::default()
        })
        .unwrap();
        files.init(FsOptions::empty()).unwrap();
        let node = files.lookup(nobody(), ROOT_ID, c"file").unwrap().inode;
        Self {
            directory,
            files,
            locks: Locks::new(File::open("/proc/self/fd").unwrap()),
            node,
        }
    }

    fn open(&self, flags: i32) -> u64 {
        let opened = self.files.open(nobody(), self.node, false, flags as u32);
        opened.unwrap().0.unwrap()
    }

    fn ask(&self, opcode: u32, lk: LkIn) -> Result<Option<FileLock>, i32> {
        let answer = Request::parse(opcode, self.node, &lk)
            .and_then(|request| self.locks.serve(&self.files, &request));
        answer.map_err(|error| error.raw_os_error().unwrap())
    }

    /// An owner's F_SETLK.
    fn set(&self, handle: u64, owner: u64, type_: u32, range: (u64, u64)) -> Result<(), i32> {
        self.ask(SETLK, asked(handle, owner, type_, range))
            .map(drop)
    }

    fn flock(&self, handle: u64, type_: u32) -> Result<(), i32> {
        let mut lk = asked(handle, 77, type_, WHOLE);
        lk.lk_flags = LK_FLOCK;
        self.ask(SETLK, lk).map(drop)
    }

    fn close(&self, handle: u64) {
        let closed = self
            .files
            .release(nobody(), self.node, 0, handle, false, false, None);
        closed.unwrap();
        self.locks.released(handle);
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("file")
    }

    fn holds_nothing(&self) -> bool {
        let table = self.locks.table();
        (
            table.owners.len(),
            table.handles.len(),
            table.nodes.len(),
            table.locks,
        ) == (0, 0, 0, 0)
    }
}

fn asked(fh: u64, owner: u64, type_: u32, (start, end): (u64, u64)) -> LkIn {
    LkIn {
        fh,
        owner,
        lk: FileLock {
            start,
            end,
            type_,
            pid: 5,
        },
        ..LkIn::default()
    }
}

/// Whether another process of the host can lock these bytes.
fn host_gets(path: &Path, (start, end): (u64, u64)) -> bool {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let range = Range::new(start, end).unwrap();
    lock_range(&file, libc::F_OFD_SETLK, range, Some(Kind::Write)).is_ok()
}

#[test]
fn owners_exclude_each_other_and_the_host_by_ranges() {
    let guest = Guest::new();
    let (one, two) = (guest.open(libc::O_RDWR), guest.open(libc::O_RDWR));
    guest.set(one, 1, WRITE, (10, 19)).unwrap();
    assert_eq!(guest.set(two, 2, WRITE, (19, 30)), Err(libc::EAGAIN));
    assert_eq!(guest.set(two, 2, READ, (0, 10)), Err(libc::EAGAIN));
    guest.set(two, 2, WRITE, (20, 29)).unwrap();
    assert!(!host_gets(&guest.path(), (0, 10)) && !host_gets(&guest.path(), (29, 30)));
    assert!(host_gets(&guest.path(), (0, 9)) && host_gets(&guest.path(), (30, Range::LAST)));
    // A child that has inherited the handle is another owner.
    assert_eq!(guest.set(one, 3, WRITE, (12, 12)), Err(libc::EAGAIN));
    // One owner's locks do not exclude each other, and the last call counts.
    guest.set(two, 1, READ, (10, 19)).unwrap();
    guest.set(two, 2, READ, (15, 15)).unwrap();
    assert!(!host_gets(&guest.path(), (15, 15)));
    // The second owner closes one of its descriptors of the file: all its locks go.
    let closed = guest.locks.closed(&guest.files, guest.node, one, 2);
    closed.unwrap();
    assert!(host_gets(&guest.path(), (20, 29)) && !host_gets(&guest.path(), (10, 19)));
    guest.set(one, 1, UNLOCK, WHOLE).unwrap();
    assert!(host_gets(&guest.path(), WHOLE));
    guest.close(one);
    guest.close(two);
    assert!(guest.holds_nothing());
}

/// An open file's locks end with it. So does a lock that a process gets while it closes the file.
#[test]
fn locks_end_with_the_handle_by_which_they_came() {
    let guest = Guest::new();
    let (one, two) = (guest.open(libc::O_RDWR), guest.open(libc::O_RDWR));
    guest.set(one, 1, WRITE, (0, 0)).unwrap();
    guest.set(two, 2, WRITE, (1, 1)).unwrap();
    guest.flock(one, READ).unwrap();
    guest.close(one);
    assert!(host_gets(&guest.path(), (0, 0)) && !host_gets(&guest.path(), (1, 1)));
    guest.flock(two, WRITE).unwrap();
    guest.locks.clear();
    assert!(guest.holds_nothing());
}

#[test]
fn flocks_belong_to_handles() {
    let guest = Guest::new();
    let (one, two) = (guest.open(libc::O_RDONLY), guest.open(libc::O_RDONLY));
    let host = File::open(guest.path()).unwrap();
    guest.flock(one, WRITE).unwrap();
    guest.flock(one, WRITE).unwrap();
    assert_eq!(guest.flock(two, READ), Err(libc::EAGAIN));
    assert!(host.try_lock_shared().is_err());
    guest.flock(one, READ).unwrap();
    guest.flock(two, READ).unwrap();
    host.try_lock_shared().unwrap();
    assert_eq!(guest.locks.table().locks, 2);
    // An exclusive request gives up the shared lock even if it fails.
    assert_eq!(guest.flock(one, WRITE), Err(libc::EAGAIN));
    guest.flock(two, UNLOCK).unwrap();
    assert_eq!(guest.locks.table().locks, 0);
    host.unlock().unwrap();
    host.try_lock().unwrap();
    // fcntl's locks are separate.
    guest.set(one, 1, READ, WHOLE).unwrap();
}

#[test]
fn a_test_names_the_lock_in_the_way() {
    let guest = Guest::new();
    let handle = guest.open(libc::O_RDWR);
    let test = |owner, range| {
        let found = guest.ask(Opcode::Getlk as u32, asked(handle, owner, WRITE, range));
        found.unwrap().unwrap()
    };
    guest.set(handle, 1, READ, (5, 9)).unwrap();
    assert_eq!(test(1, WHOLE).type_, UNLOCK);
    let found = test(2, WHOLE);
    assert_eq!(
        (found.type_, found.start, found.end, found.pid),
        (READ, 5, 9, 0)
    );
    assert_eq!(test(2, (10, 20)).type_, UNLOCK);
    guest.set(handle, 1, WRITE, (5, Range::LAST)).unwrap();
    assert_eq!(test(2, WHOLE).end, Range::LAST);
}

/// A lock needs the access that the guest's handle has. A lock that came by a handle for reading
/// can become another kind by one for writing, and is held all the while.
#[test]
fn a_handle_gives_no_more_than_its_access() {
    let guest = Guest::new();
    let (reads, writes) = (guest.open(libc::O_RDONLY), guest.open(libc::O_WRONLY));
    let both = guest.open(libc::O_RDWR);
    assert_eq!(guest.set(reads, 1, WRITE, (0, 0)), Err(libc::EBADF));
    assert_eq!(guest.set(writes, 1, READ, (0, 0)), Err(libc::EBADF));
    guest.set(writes, 2, WRITE, (8, 8)).unwrap();
    guest.set(reads, 1, READ, (0, 4)).unwrap();
    guest.set(both, 1, WRITE, (2, 2)).unwrap();
    assert!(!host_gets(&guest.path(), (0, 0)) && !host_gets(&guest.path(), (4, 4)));
    assert_eq!(guest.set(reads, 3, READ, (2, 2)), Err(libc::EAGAIN));
    guest.set(reads, 3, READ, (0, 1)).unwrap();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let guest = Guest::new();
    let handle = guest.open(libc::O_RDWR);
    assert_eq!(guest.set(handle + 1, 1, READ, WHOLE), Err(libc::EBADF));
    assert_eq!(guest.set(handle, 1, 3, WHOLE), Err(libc::EINVAL));
    assert_eq!(guest.set(handle, 1, READ, (2, 1)), Err(libc::EINVAL));
    assert_eq!(guest.set(handle, 1, READ, (0, u64::MAX)), Err(libc::EINVAL));
    let test = guest.ask(Opcode::Getlk as u32, asked(handle, 1, UNLOCK, WHOLE));
    assert_eq!(test.err(), Some(libc::EINVAL));
    let other = Request::parse(SETLK, ROOT_ID, &asked(handle, 1, READ, WHOLE)).unwrap();
    let refused = guest.locks.serve(&guest.files, &other).err().unwrap();
    assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
    let directory = guest
        .files
        .opendir(nobody(), ROOT_ID, 0)
        .unwrap()
        .0
        .unwrap();
    let of_directory = asked(directory, 1, READ, WHOLE);
    let of_directory = Request::parse(SETLK, ROOT_ID, &of_directory).unwrap();
    let refused = guest.locks.serve(&guest.files, &of_directory).err();
    assert_eq!(refused.unwrap().raw_os_error(), Some(libc::EINVAL));
    assert!(!Request::is_one(30) && Request::is_one(SETLK) && !Request::is_one(34));
}

#[test]
fn locks_and_owners_are_limited() {
    crate::jail::limit_files(1_000_000).unwrap();
    let guest = Guest::new();
    let handle = guest.open(libc::O_RDWR);
    for byte in 0..MAX_LOCKS as u64 {
        guest.set(handle, 1, READ, (2 * byte, 2 * byte)).unwrap();
    }
    let beyond = 2 * MAX_LOCKS as u64;
    assert_eq!(
        guest.set(handle, 1, READ, (beyond, beyond)),
        Err(libc::ENOLCK)
    );
    assert_eq!(guest.set(handle, 2, READ, (0, 0)), Err(libc::ENOLCK));
    assert_eq!(guest.flock(handle, READ), Err(libc::ENOLCK));
    // A request that makes fewer locks is always possible.
    guest.set(handle, 1, WRITE, (0, beyond)).unwrap();
    guest.set(handle, 1, UNLOCK, WHOLE).unwrap();
    for owner in 0..MAX_OWNERS as u64 {
        guest.set(handle, owner, READ, WHOLE).unwrap();
    }
    let one_more = MAX_OWNERS as u64;
    assert_eq!(guest.set(handle, one_more, READ, WHOLE), Err(libc::ENOLCK));
    guest.set(handle, 0, UNLOCK, WHOLE).unwrap();
    guest.set(handle, one_more, READ, WHOLE).unwrap();
    guest.close(handle);
    assert!(guest.holds_nothing());
}

/// The guest judges its cached pages by attributes, so it must not keep those where locks are used.
#[test]
fn a_file_with_locks_is_known_until_its_handles_are_gone() {
    let guest = Guest::new();
    let (one, two) = (guest.open(libc::O_RDWR), guest.open(libc::O_RDWR));
    assert!(!guest.locks.are_on(guest.node));
    guest.flock(one, WRITE).unwrap();
    assert_eq!(guest.flock(two, WRITE), Err(libc::EAGAIN));
    guest.flock(one, UNLOCK).unwrap();
    guest.close(one);
    assert!(guest.locks.are_on(guest.node));
    guest.close(two);
    assert!(!guest.locks.are_on(guest.node));
}

/// A waiting request is tried again when this guest has given up a lock.
#[test]
fn what_is_given_up_is_told() {
    let guest = Guest::new();
    let handle = guest.open(libc::O_RDWR);
    guest.set(handle, 1, WRITE, WHOLE).unwrap();
    guest.flock(handle, WRITE).unwrap();
    assert!(!guest.locks.take_released());
    guest.set(handle, 1, UNLOCK, (0, 0)).unwrap();
    assert!(guest.locks.take_released() && !guest.locks.take_released());
    guest.flock(handle, READ).unwrap();
    assert!(guest.locks.take_released());
    guest.close(handle);
    assert!(guest.locks.take_released());
}
