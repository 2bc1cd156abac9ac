//! `tmpcopyup`: a tmpfs that begins with a copy of what it covers.
//!
//! Called by `mounts` before the tmpfs is attached. Every name is looked up in an open directory
//! and no symlink is followed, so we read nothing but the covered directory. We copy contents,
//! owners and modes. The size of the tmpfs bounds the copy.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

/// Deeper trees are refused: each level is an open directory.
const DEEPEST: u32 = 128;

/// Copies the content of the directory `from` into the empty directory `to`.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> std::io::Result<()> {
    copy_level(
        &open_directory(from, c".")?,
        &open_directory(to, c".")?,
        DEEPEST,
    )
}

fn copy_level(from: &OwnedFd, to: &OwnedFd, left: u32) -> std::io::Result<()> {
    let left = left.checked_sub(1).ok_or(Errno::LOOP)?;
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let status = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, Mode::RWXU)?;
                let (below, copy) = (open_directory(from, name)?, open_directory(to, name)?);
                copy_level(&below, &copy, left)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
                // It may have become another file since. Then we must not wait for it.
                let source = flags | OFlags::RDONLY | OFlags::NONBLOCK;
                let source = rustix::fs::openat(from, name, source, Mode::empty())?;
                let target = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let target = rustix::fs::openat(to, name, target, Mode::RWXU)?;
                std::io::copy(&mut File::from(source), &mut File::from(target))?;
            }
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(link, to, name)?;
            }
            kind => rustix::fs::mknodat(to, name, kind, Mode::RWXU, status.st_rdev)?,
        }
        give(to, name, &status)?;
    }
    Ok(())
}

fn open_directory(at: impl AsFd, name: &std::ffi::CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

/// Copies owner and mode, in this order: a change of the owner takes set-user-id away.
fn give(to: &OwnedFd, name: &std::ffi::CStr, status: &Stat) -> rustix::io::Result<()> {
    let owner = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    let (uid, gid) = (Some(owner.0), Some(owner.1));
    rustix::fs::chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Symlink {
        let mode = Mode::from_raw_mode(status.st_mode & 0o7777);
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn contents_modes_and_links_are_copied_and_no_link_is_followed() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| from.path().join(name);
        fs::create_dir(at("below")).unwrap();
        fs::write(at("below/file"), "text").unwrap();
        fs::set_permissions(at("below/file"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(at("below"), fs::Permissions::from_mode(0o1705)).unwrap();
        symlink("/etc", at("link")).unwrap();
        let open = |path: &std::path::Path| File::open(path).unwrap();
        copy(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap();
        let at = |name: &str| to.path().join(name);
        assert_eq!(fs::read_to_string(at("below/file")).unwrap(), "text");
        let mode =
            |name: &str| fs::symlink_metadata(at(name)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("below"), mode("below/file")), (0o1705, 0o4711));
        assert_eq!(
            fs::read_link(at("link")).unwrap(),
            std::path::Path::new("/etc")
        );
    }

    #[test]
    fn a_tree_without_end_is_refused() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let deep = "d/".repeat(DEEPEST as usize + 1);
        fs::create_dir_all(from.path().join(deep)).unwrap();
        let open = |path: &std::path::Path| File::open(path).unwrap();
        let error = copy(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }
}
