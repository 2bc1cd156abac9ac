//! The rules for a name, a node, an open and a list of groups, as plain functions. `names` calls
//! them.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::{Context, Extensions};
use virtiofsd::soft_idmap::Id;

/// The longest name of a file, in bytes (NAME_MAX).
const MAX_NAME: usize = 255;

/// The longest name of an extended attribute, in bytes (XATTR_NAME_MAX).
const MAX_XATTR_NAME: usize = 255;

/// Whether a file may have this name, in any directory.
pub fn check_name(name: &[u8]) -> io::Result<()> {
    match name {
        b"" | b"." | b".." => refuse(libc::EINVAL),
        _ if name.iter().any(|byte| matches!(byte, b'/' | 0)) => refuse(libc::EINVAL),
        _ if name.len() > MAX_NAME => refuse(libc::ENAMETOOLONG),
        _ => Ok(()),
    }
}

/// The same for a C string.
pub fn check(name: &CStr) -> io::Result<()> {
    check_name(name.to_bytes())
}

/// Whether an extended attribute may have this name. ERANGE: it may not.
pub fn check_xattr_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes().len() {
        1..=MAX_XATTR_NAME => Ok(()),
        _ => refuse(libc::ERANGE),
    }
}

/// Allows regular files, FIFOs and sockets. Of character devices only overlayfs' whiteout, 0:0,
/// which opens nothing and which the host's kernel lets anybody make.
pub fn check_node(mode: u32, device: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => Ok(()),
        libc::S_IFCHR if device == 0 => Ok(()),
        libc::S_IFCHR | libc::S_IFBLK => refuse(libc::EPERM),
        _ => refuse(libc::EINVAL),
    }
}

/// O_PATH would give a handle that is not open; O_TMPFILE is a request of its own, which we don't
/// offer.
pub fn check_open(flags: u32) -> io::Result<()> {
    let flags = flags.cast_signed();
    if flags & libc::O_PATH != 0 {
        return refuse(libc::EINVAL);
    }
    if flags & libc::O_TMPFILE == libc::O_TMPFILE {
        return refuse(libc::EOPNOTSUPP);
    }
    Ok(())
}

/// The library restores a thread's groups only when it has also changed its user or group. For root
/// it would leave the groups set for the next request. Root needs none: it overrides modes.
pub fn own_groups(context: &Context, mut extensions: Extensions) -> Extensions {
    if context.uid.is_root() && context.gid.is_root() {
        extensions.sup_gids.clear();
    }
    extensions
}

fn refuse<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}
