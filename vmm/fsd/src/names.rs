//! Checks every FUSE request before the library acts on it.
//!
//! virtiofsd 1.14 looks only at a name's NUL and hands the name to `symlinkat` and its like, so a
//! name with a `/` would leave its directory. [`Checked`] stands between the library's server and
//! its file system (`serve` puts it there). It answers the requests that no honest guest kernel
//! sends: a name that is empty, `.`, `..`, holds a `/` or is too long; a device node; an open that
//! makes a path descriptor or an unnamed file (`checks`). It also says how long the guest may
//! remember names and attributes, and reports closed files to `locks`.
//!
//! What must hold: each method of the trait that takes a name checks it. `.` and `..` are no names
//! here, not even for a lookup: the kernel resolves them itself, except to export a FUSE mount over
//! NFS, which needs FUSE_EXPORT_SUPPORT, never offered. NUL can't arrive: names are `CStr`.
//! Deliberately absent: the methods of `SerializableFileSystem`, whose defaults refuse migration.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    ROOT_ID, SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

mod checks;
mod others;
mod room;
mod seen;
mod short_write;

pub use checks::check_name;
pub use others::Others;
use seen::Seen;
use short_write::ShortWrite;

use checks::{check, check_node, check_open, check_xattr_name, own_groups};

/// The largest value or list of extended attributes (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const MAX_XATTR_SIZE: u32 = 65_536;

/// A file system whose requests have been checked.
pub struct Checked<F> {
    inner: Arc<F>,
    others: Others,
    seen: Seen,
}

impl<F> Checked<F> {
    /// Puts the check in front of `inner`.
    pub fn new(inner: Arc<F>, others: Others) -> Self {
        Self {
            inner,
            others,
            seen: Seen::new(),
        }
    }
}

impl<F: FileSystem<Inode = u64, Handle = u64>> Checked<F> {
    /// The guest has changed a file's content, so it knows the file's state.
    fn changed(&self, ctx: Context, inode: u64) {
        if let Ok((attr, _)) = self.inner.getattr(ctx, inode, None) {
            self.seen.tell(inode, &attr);
        }
    }

    /// What the guest is told of a name, and how long it may remember that.
    fn named(&self, entry: Entry) -> Entry {
        self.seen.tell(entry.inode, &entry.attr);
        self.others.named(entry)
    }
}

impl<F> SerializableFileSystem for Checked<F> {}

impl<F: FileSystem<Inode = u64, Handle = u64>> FileSystem for Checked<F> {
    type Inode = u64;
    type Handle = u64;
    type DirIter = F::DirIter;

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        check(name)?;
        let found = self.inner.lookup(ctx, parent, name);
        if parent == ROOT_ID {
            // The shim makes and removes the entries at the top while the pod runs.
            return found.map(|entry| Entry {
                entry_timeout: Duration::ZERO,
                ..self.named(entry)
            });
        }
        match found {
            Ok(entry) => Ok(self.named(entry)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                self.others.missing().ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        check(name)?;
        let extensions = own_groups(&ctx, extensions);
        self.inner.symlink(ctx, linkname, parent, name, extensions)
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        check(name)?;
        check_node(mode, rdev)?;
        let extensions = own_groups(&ctx, extensions);
        let entry = self
            .inner
            .mknod(ctx, parent, name, mode, rdev, umask, extensions)?;
        Ok(self.named(entry))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        check(name)?;
        let extensions = own_groups(&ctx, extensions);
        self.inner.mkdir(ctx, parent, name, mode, umask, extensions)
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        check(name)?;
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        check(name)?;
        self.inner.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check(oldname)?;
        check(newname)?;
        self.inner
            .rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(&self, ctx: Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        check(newname)?;
        let entry = self.inner.link(ctx, inode, newparent, newname)?;
        Ok(self.named(entry))
    }

    fn open(
        &self,
        ctx: Context,
        inode: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        check_open(flags)?;
        let (handle, options) = self.inner.open(ctx, inode, kill_priv, flags)?;
        let (attr, _) = self.inner.getattr(ctx, inode, None)?;
        let is_current = self.seen.is_current(inode, &attr);
        // A file that is truncated is new to the guest in any case.
        if let (Some(handle), false, 0) = (handle, is_current, flags & libc::O_TRUNC as u32) {
            self.inner
                .release(ctx, inode, flags, handle, false, false, None)?;
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        Ok((handle, options))
    }

    fn opendir(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        check_open(flags)?;
        self.inner.opendir(ctx, inode, flags)
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)> {
        check(name)?;
        check_open(flags)?;
        let extensions = own_groups(&ctx, extensions);
        let (entry, handle, options) = self
            .inner
            .create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        Ok((self.named(entry), handle, options))
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        check_xattr_name(name)?;
        self.inner
            .setxattr(ctx, inode, name, value, flags, extra_flags)
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        check_xattr_name(name)?;
        self.inner
            .getxattr(ctx, inode, name, size.min(MAX_XATTR_SIZE))
    }

    fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, inode, size.min(MAX_XATTR_SIZE))
    }

    fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()> {
        check_xattr_name(name)?;
        self.inner.removexattr(ctx, inode, name)
    }

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let wanted = self.inner.init(capable)?;
        // The kernel then asks the server for locks, and `backend` answers.
        Ok(match self.others.locks() {
            None => wanted,
            Some(_) => wanted | FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS,
        })
    }

    // The methods from here on take no name.

    fn destroy(&self) {
        self.inner.destroy();
        if let Some(locks) = self.others.locks() {
            locks.clear();
        }
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(
        &self,
        ctx: Context,
        inode: u64,
        handle: Option<Self::Handle>,
    ) -> io::Result<(Attr, Duration)> {
        let (attr, usually) = self.inner.getattr(ctx, inode, handle)?;
        self.seen.tell(inode, &attr);
        Ok((attr, self.others.keep(inode, usually)))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: u64,
        attr: SetattrIn,
        handle: Option<Self::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let (attr, usually) = self.inner.setattr(ctx, inode, attr, handle, valid)?;
        self.seen.tell(inode, &attr);
        Ok((attr, self.others.keep(inode, usually)))
    }

    fn readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: u64,
        handle: Self::Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.inner
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: u64,
        handle: Self::Handle,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let written = self.inner.write(
            ctx,
            inode,
            handle,
            ShortWrite(r),
            size,
            offset,
            lock_owner,
            delayed_write,
            kill_priv,
            flags,
        )?;
        self.changed(ctx, inode);
        Ok(written)
    }

    fn flush(
        &self,
        ctx: Context,
        inode: u64,
        handle: Self::Handle,
        lock_owner: u64,
    ) -> io::Result<()> {
        if let Some(locks) = self.others.locks() {
            locks.closed(&*self.inner, inode, handle, lock_owner)?;
        }
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(
        &self,
        ctx: Context,
        inode: u64,
        datasync: bool,
        handle: Self::Handle,
    ) -> io::Result<()> {
        self.inner.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: u64,
        handle: Self::Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let made = self
            .inner
            .fallocate(ctx, inode, handle, mode, offset, length);
        if let Err(error) = made {
            let (at, range) = ((ctx, inode, handle), (mode, offset, length));
            room::is_there(&*self.inner, at, range, error)?;
        }
        self.changed(ctx, inode);
        Ok(())
    }

    fn release(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: Self::Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)?;
        if let Some(locks) = self.others.locks() {
            locks.released(handle);
        }
        Ok(())
    }

    fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: u64,
        handle: Self::Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        self.inner.readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(
        &self,
        ctx: Context,
        inode: u64,
        datasync: bool,
        handle: Self::Handle,
    ) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: Self::Handle,
    ) -> io::Result<()> {
        self.inner.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: u64, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: u64,
        handle: Self::Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: u64,
        handle_in: Self::Handle,
        offset_in: u64,
        inode_out: u64,
        handle_out: Self::Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let copied = self.inner.copyfilerange(
            ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags,
        )?;
        self.changed(ctx, inode_out);
        Ok(copied)
    }

    fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()> {
        self.inner.syncfs(ctx, inode)
    }
}

#[cfg(test)]
mod tests;
