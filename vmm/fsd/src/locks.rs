//! The guest's file locks, held on the host, so that pods and the host's processes exclude each
//! other.
//!
//! The library drops what a lock's request says, so `backend` decodes it ([`Request`]) and
//! `Checked` reports closed handles. Nothing here waits: `backend` asks again for a request that
//! must wait.
//!
//! - flock(2) is taken on the library's own open file of the handle, which the host treats as the
//!   guest treats its open file. The lock ends with the handle.
//! - fcntl(2): each owner in the guest (a process, or an open file for OFD locks) has an open file
//!   of its own on the host, locked with F_OFD_SETLK. POSIX' own locks would all belong to one
//!   process, this server. The file is open while the owner has locks on it. Its locks end when the
//!   guest says that the owner has closed the file (FLUSH), or with the handle by which they came.
//!
//! A process that gets a lock wants to see what the last holder wrote. So while a handle is open by
//! which a node was locked, the guest may not remember the node's attributes ([`Locks::are_on`]),
//! by which it judges its cached pages, nor any name ([`Locks::are_used`]).
//!
//! What must hold: nothing of a request is trusted. The library looks up a handle together with its
//! node; a lock needs the access that the handle has; an owner is a mere number, with which a guest
//! can only fool itself. Locks are host kernel memory that nobody accounts for, and owners are open
//! files. Both have a limit ([`MAX_LOCKS`], [`MAX_OWNERS`]); above it the guest gets ENOLCK.

mod ranges;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard};

use kata_like_linux::lock;
use ranges::{Kind, Range, Ranges};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use virtiofsd::filesystem::{Context, FileSystem, ZeroCopyWriter};
use virtiofsd::fuse::{FileLock, LK_FLOCK, LkIn, Opcode};
use virtiofsd::oslib::ReadvFlags;

/// The most locks at a time: one per range of an owner and one per handle with a flock. It also
/// limits how many handles have ever had a lock.
pub const MAX_LOCKS: usize = 4096;

/// The most open files for owners of fcntl locks.
pub const MAX_OWNERS: usize = 1024;

/// What the guest asks for.
#[derive(Clone, Copy, Debug)]
enum Wish {
    /// Which lock conflicts with this one?
    Test(Kind),
    /// Set a lock, or remove it (`None`).
    Set(Option<Kind>),
    /// The same for a flock.
    Flock(Option<Kind>),
}

/// A request about a lock. Each field has been checked to have a meaning.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    node: u64,
    handle: u64,
    owner: u64,
    range: Range,
    wish: Wish,
    /// Whether the guest's process waits for the lock.
    pub waits: bool,
}

impl Request {
    /// Whether a request with this opcode is about a lock.
    pub fn is_one(opcode: u32) -> bool {
        [Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw]
            .map(|lock| lock as u32)
            .contains(&opcode)
    }

    /// Decodes a request about the file of `node`. EINVAL: it makes no sense.
    pub fn parse(opcode: u32, node: u64, asked: &LkIn) -> io::Result<Self> {
        let kind = match i32::try_from(asked.lk.type_) {
            Ok(libc::F_RDLCK) => Some(Kind::Read),
            Ok(libc::F_WRLCK) => Some(Kind::Write),
            Ok(libc::F_UNLCK) => None,
            _ => return refuse(libc::EINVAL),
        };
        let flock = asked.lk_flags & LK_FLOCK != 0;
        let wish = match (opcode == Opcode::Getlk as u32, kind) {
            (false, kind) if flock => Wish::Flock(kind),
            (false, kind) => Wish::Set(kind),
            (true, Some(kind)) if !flock => Wish::Test(kind),
            (true, _) => return refuse(libc::EINVAL),
        };
        let Some(range) = Range::new(asked.lk.start, asked.lk.end) else {
            return refuse(libc::EINVAL);
        };
        Ok(Self {
            node,
            handle: asked.fh,
            owner: asked.owner,
            range,
            wish,
            waits: opcode == Opcode::Setlkw as u32,
        })
    }
}

/// A file of the host, whatever name the guest has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FileId {
    device: u64,
    inode: u64,
}

/// An owner's open file, and what it has locked there: at least one range.
#[derive(Debug)]
struct Owner {
    file: File,
    /// Open only for reading: it has only read locks.
    read_only: bool,
    /// The guest's handle by which the last lock came.
    handle: u64,
    ranges: Ranges,
}

impl Owner {
    /// Moves all locks to a file that is also open for writing. They are read locks, so old and new
    /// ones do not conflict, and others are excluded all the while.
    fn make_writable(&mut self, file: File) -> io::Result<()> {
        for (range, kind) in self.ranges.iter() {
            lock_range(&file, libc::F_OFD_SETLK, range, Some(kind))?;
        }
        self.file = file;
        self.read_only = false;
        Ok(())
    }
}

/// A handle by which there has been a lock.
#[derive(Debug)]
struct Handle {
    node: u64,
    /// It has a flock now.
    flock: bool,
}

#[derive(Debug, Default)]
struct Table {
    owners: HashMap<(FileId, u64), Owner>,
    handles: HashMap<u64, Handle>,
    /// The number of `handles` of each node.
    nodes: HashMap<u64, usize>,
    /// The number of ranges of all owners, plus the flocks of all handles.
    locks: usize,
    /// A lock has gone since the last question.
    released: bool,
}

/// The locks of one share.
#[derive(Debug)]
pub struct Locks {
    proc_self_fd: File,
    table: Mutex<Table>,
}

impl Locks {
    /// No locks yet. `proc_self_fd` is the directory /proc/self/fd.
    pub fn new(proc_self_fd: File) -> Self {
        Self {
            proc_self_fd,
            table: Mutex::default(),
        }
    }

    /// Serves one request on a file of `files`. A test returns the conflicting lock.
    ///
    /// EAGAIN: another owner has a lock that excludes this one. ENOLCK: there are too many locks.
    pub fn serve<F>(&self, files: &F, request: &Request) -> io::Result<Option<FileLock>>
    where
        F: FileSystem<Inode = u64, Handle = u64>,
    {
        with_file(files, request.node, request.handle, |file| {
            let table = &mut *self.table();
            match request.wish {
                Wish::Test(kind) => table.test(file, request, kind).map(Some),
                Wish::Set(kind) => {
                    table.remember(request)?;
                    let set = table.set(file, request, kind, &self.proc_self_fd);
                    set.map(|()| None)
                }
                Wish::Flock(kind) => {
                    table.remember(request)?;
                    table.flock(file, request.handle, kind).map(|()| None)
                }
            }
        })
    }

    /// An owner has closed one of its descriptors of the file: all its fcntl locks on that file go.
    pub fn closed<F>(&self, files: &F, node: u64, handle: u64, owner: u64) -> io::Result<()>
    where
        F: FileSystem<Inode = u64, Handle = u64>,
    {
        if self.table().owners.is_empty() {
            return Ok(());
        }
        let file = with_file(files, node, handle, file_id)?;
        self.table().forget(|key, _| *key == (file, owner));
        Ok(())
    }

    /// A handle is gone, and its flock with it. So are the fcntl locks that came by it: they
    /// belonged to an open file, or to a process that closed it while it was getting them.
    pub fn released(&self, handle: u64) {
        let table = &mut *self.table();
        let Some(gone) = table.handles.remove(&handle) else {
            return;
        };
        if let Some(handles) = table.nodes.get_mut(&gone.node) {
            *handles -= 1; // `gone` was one of them
            if *handles == 0 {
                table.nodes.remove(&gone.node);
            }
        }
        table.count(usize::from(gone.flock), 0);
        table.forget(|_, owner| owner.handle == handle);
    }

    /// Whether a node has or had locks by a handle that is still open.
    pub fn are_on(&self, node: u64) -> bool {
        self.table().nodes.contains_key(&node)
    }

    /// Whether there are or were locks by any handle that is still open.
    pub fn are_used(&self) -> bool {
        !self.table().handles.is_empty()
    }

    /// Forgets everything: the guest has unmounted.
    pub fn clear(&self) {
        *self.table() = Table::default();
    }

    /// Whether a lock has gone since the last call.
    pub fn take_released(&self) -> bool {
        std::mem::take(&mut self.table().released)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A thread that panics ends the process (`last_words`), so nobody sees its state.
        lock(&self.table)
    }
}

impl Table {
    fn flock(&mut self, file: &File, handle: u64, kind: Option<Kind>) -> io::Result<()> {
        let had = self.handles.get(&handle).is_some_and(|handle| handle.flock);
        self.room(usize::from(kind.is_some() && !had))?;
        let operation = match kind {
            Some(Kind::Read) => FlockOperation::NonBlockingLockShared,
            Some(Kind::Write) => FlockOperation::NonBlockingLockExclusive,
            None => FlockOperation::NonBlockingUnlock,
        };
        let result = rustix::fs::flock(file, operation);
        let has = match result {
            Ok(()) => kind.is_some(),
            // A request for another kind gives up the present lock, even if it fails (flock(2)).
            Err(rustix::io::Errno::WOULDBLOCK) => false,
            Err(_) => had,
        };
        if let Some(handle) = self.handles.get_mut(&handle) {
            handle.flock = has;
        }
        self.count(usize::from(had), usize::from(has));
        self.released |= result.is_ok() && kind == Some(Kind::Read);
        Ok(result?)
    }

    fn set(
        &mut self,
        file: &File,
        request: &Request,
        kind: Option<Kind>,
        proc_self_fd: &File,
    ) -> io::Result<()> {
        let key = (file_id(file)?, request.owner);
        let held = self.owners.get(&key).map(|owner| &owner.ranges);
        if held.is_none() && kind.is_none() {
            return Ok(());
        }
        let had = held.map_or(0, Ranges::count);
        let ranges = match held {
            Some(ranges) => ranges.with(request.range, kind),
            None => Ranges::default().with(request.range, kind),
        };
        let has = ranges.count();
        self.room(has.saturating_sub(had))?;
        let writable = check_access(file, kind)?;
        let full = self.owners.len() >= MAX_OWNERS;
        match self.owners.get_mut(&key) {
            Some(owner) => {
                if owner.read_only && kind == Some(Kind::Write) {
                    owner.make_writable(open(file, true, proc_self_fd)?)?;
                }
                lock_range(&owner.file, libc::F_OFD_SETLK, request.range, kind)?;
                owner.handle = request.handle;
                owner.ranges = ranges;
            }
            None if full => return refuse(libc::ENOLCK),
            None => {
                let own = open(file, writable, proc_self_fd)?;
                lock_range(&own, libc::F_OFD_SETLK, request.range, kind)?;
                let owner = Owner {
                    file: own,
                    read_only: !writable,
                    handle: request.handle,
                    ranges,
                };
                self.owners.insert(key, owner);
            }
        }
        if has == 0 {
            self.owners.remove(&key);
        }
        self.count(had, has);
        self.released |= kind != Some(Kind::Write); // a smaller range, or a weaker kind
        Ok(())
    }

    /// The answer does not say whose lock it is: the guest has no number for a process of the host
    /// or of another pod.
    fn test(&self, file: &File, request: &Request, kind: Kind) -> io::Result<FileLock> {
        let key = (file_id(file)?, request.owner);
        let own = self.owners.get(&key).map_or(file, |owner| &owner.file);
        let found = lock_range(own, libc::F_OFD_GETLK, request.range, Some(kind))?;
        let start = found.l_start.cast_unsigned();
        let end = match found.l_len {
            0 => Range::LAST,
            length => start.saturating_add(length.cast_unsigned() - 1),
        };
        Ok(FileLock {
            start,
            end,
            type_: u32::try_from(found.l_type).map_err(io::Error::other)?,
            pid: 0,
        })
    }

    /// From now on the guest uses locks on this file.
    fn remember(&mut self, request: &Request) -> io::Result<()> {
        if self.handles.contains_key(&request.handle) {
            return Ok(());
        }
        if self.handles.len() >= MAX_LOCKS {
            return refuse(libc::ENOLCK);
        }
        let handle = Handle {
            node: request.node,
            flock: false,
        };
        self.handles.insert(request.handle, handle);
        *self.nodes.entry(request.node).or_default() += 1;
        Ok(())
    }

    /// ENOLCK: there is no room for `more` locks.
    fn room(&self, more: usize) -> io::Result<()> {
        match more {
            0 => Ok(()),
            _ if self.locks + more > MAX_LOCKS => refuse(libc::ENOLCK),
            _ => Ok(()),
        }
    }

    /// Counts for an owner or handle that had `had` locks and has `has` now.
    fn count(&mut self, had: usize, has: usize) {
        self.locks = self.locks + has - had;
        self.released |= has < had;
    }

    fn forget(&mut self, gone: impl Fn(&(FileId, u64), &Owner) -> bool) {
        let mut had = 0;
        self.owners.retain(|key, owner| {
            let gone = gone(key, owner);
            if gone {
                had += owner.ranges.count();
            }
            !gone
        });
        self.count(had, 0);
    }
}

/// Opens the file once more, only for locks.
fn open(file: &File, writable: bool, proc_self_fd: &File) -> io::Result<File> {
    let access = match writable {
        true => OFlags::RDWR,
        false => OFlags::RDONLY,
    };
    let number = file.as_raw_fd().to_string();
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = rustix::fs::openat(proc_self_fd, number, flags, Mode::empty())?;
    Ok(File::from(opened))
}

/// Whether the guest's handle is open for writing. EBADF: it lacks the access that this lock needs.
fn check_access(file: &File, kind: Option<Kind>) -> io::Result<bool> {
    let access = rustix::fs::fcntl_getfl(file)? & OFlags::ACCMODE;
    match (access, kind) {
        (OFlags::RDONLY, Some(Kind::Write)) | (OFlags::WRONLY, Some(Kind::Read)) => {
            refuse(libc::EBADF)
        }
        _ => Ok(access != OFlags::RDONLY),
    }
}

/// EINVAL: not a regular file. Opening anything else may do more than open it.
fn file_id(file: &File) -> io::Result<FileId> {
    let about = rustix::fs::fstat(file)?;
    match FileType::from_raw_mode(about.st_mode) {
        FileType::RegularFile => Ok(FileId {
            device: about.st_dev,
            inode: about.st_ino,
        }),
        _ => refuse(libc::EINVAL),
    }
}

/// One fcntl(2) call for a lock of `file`; returns what the kernel left in its argument.
fn lock_range(
    file: &File,
    command: i32,
    range: Range,
    kind: Option<Kind>,
) -> io::Result<libc::flock> {
    let l_type = match kind {
        Some(Kind::Read) => libc::F_RDLCK,
        Some(Kind::Write) => libc::F_WRLCK,
        None => libc::F_UNLCK,
    };
    let mut lock = libc::flock {
        l_type: l_type as libc::c_short, // 0, 1 or 2
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start.cast_signed(), // not beyond Range::LAST
        l_len: match range.end {
            Range::LAST => 0,
            end => (end - range.start + 1).cast_signed(),
        },
        l_pid: 0, // must be
    };
    // SAFETY: for these commands fcntl reads and writes one `struct flock` at the pointer.
    // - `lock` is one, lives through the call, and nobody else has a reference to it.
    // - `file` keeps the descriptor open. None of the commands waits.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        0 => Ok(lock),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Calls `work` with the library's open file of a handle. The library shows it only to a reader.
fn with_file<F, T>(
    files: &F,
    node: u64,
    handle: u64,
    work: impl FnOnce(&File) -> io::Result<T>,
) -> io::Result<T>
where
    F: FileSystem<Inode = u64, Handle = u64>,
{
    struct Borrow<W>(W);

    impl<W: FnMut(&File)> ZeroCopyWriter for Borrow<W> {
        fn read_from_file_at(
            &mut self,
            file: &File,
            _count: usize,
            _offset: u64,
            _flags: Option<ReadvFlags>,
        ) -> io::Result<usize> {
            self.0(file);
            Ok(0)
        }
    }

    let (work, result) = (Cell::new(Some(work)), Cell::new(None));
    let borrow = Borrow(|file: &File| result.set(work.take().map(|work| work(file))));
    let nobody = Context {
        uid: 0.into(),
        gid: 0.into(),
        pid: 0,
    };
    files.read(nobody, node, handle, borrow, 0, 0, None, 0)?;
    result.take().unwrap_or_else(|| refuse(libc::EBADF))
}

fn refuse<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}
