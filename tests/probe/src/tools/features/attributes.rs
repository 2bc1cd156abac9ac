//! Features about a file's attributes: extended attributes, ACLs, flags.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::{Feature, c_path, checked, create, set_attribute, word};

pub(super) const FEATURES: [Feature; 8] = [
    ("xattrs, user.", |path| attribute(path, c"user.a", b"value")),
    ("xattrs, trusted.", |path| {
        attribute(path, c"trusted.a", b"value")
    }),
    ("xattrs, security.", |path| {
        attribute(path, c"security.a", b"value")
    }),
    ("file capabilities", |path| {
        attribute(path, c"security.capability", &CAPABILITY)
    }),
    ("ACLs", |path| {
        attribute(path, c"system.posix_acl_access", &ACL)
    }),
    ("ACLs that new files inherit", inherited),
    ("chattr (FS_IOC_SETFLAGS)", flags),
    ("project ids (FS_IOC_FSSETXATTR)", project),
];

/// CAP_NET_RAW, permitted and effective: struct vfs_cap_data of linux/capability.h, revision 2.
const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// linux/posix_acl_xattr.h, version 2: entries of tag, permissions and id. The owner may read and
/// write, user 1000 may read, the group and the mask may read, others nothing.
const ACL: [u8; 44] = [
    2, 0, 0, 0, // version
    1, 0, 6, 0, 255, 255, 255, 255, // owner
    2, 0, 4, 0, 0xe8, 3, 0, 0, // user 1000
    4, 0, 4, 0, 255, 255, 255, 255, // group
    0x10, 0, 4, 0, 255, 255, 255, 255, // mask
    0x20, 0, 0, 0, 255, 255, 255, 255, // others
];

fn attribute(path: &Path, name: &CStr, value: &[u8]) -> io::Result<&'static str> {
    drop(create(path)?);
    set_attribute(path, name, value)?;
    let listed = list(path)?;
    let listed = listed
        .split(|byte| *byte == 0)
        .any(|listed| listed == name.to_bytes());
    word(get(path, name)? == value && listed, "kept", "another value")
}

fn get(path: &Path, name: &CStr) -> io::Result<Vec<u8>> {
    let (path, mut value) = (c_path(path)?, vec![0; 256]);
    // SAFETY: two C strings, and a buffer of the length that is passed.
    let length = checked(unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        ) as i64
    })?;
    value.truncate(length as usize);
    Ok(value)
}

fn list(path: &Path) -> io::Result<Vec<u8>> {
    let (path, mut names) = (c_path(path)?, vec![0; 1024]);
    // SAFETY: a C string, and a buffer of the length that is passed.
    let length = checked(unsafe {
        libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) as i64
    })?;
    names.truncate(length as usize);
    Ok(names)
}

fn inherited(path: &Path) -> io::Result<&'static str> {
    fs::create_dir(path)?;
    set_attribute(path, c"system.posix_acl_default", &ACL)?;
    let file = path.join("file");
    drop(create(&file)?);
    let value = get(&file, c"system.posix_acl_access")?;
    let of_user = value.windows(8).any(|entry| entry == &ACL[12..20]);
    word(of_user, "kept", "another value")
}

/// FS_NODUMP_FL of linux/fs.h, which any owner may set.
const NODUMP: libc::c_int = 0x40;

fn flags(path: &Path) -> io::Result<&'static str> {
    let file = create(path)?;
    let mut flags: libc::c_int = 0;
    let number = file.as_raw_fd();
    // SAFETY: the descriptor is open, and the kernel writes an int (whatever the request's name
    // says) that lives.
    checked(unsafe { libc::ioctl(number, libc::FS_IOC_GETFLAGS, &mut flags) })?;
    flags |= NODUMP;
    // SAFETY: the descriptor is open, and the kernel reads an int that lives.
    checked(unsafe { libc::ioctl(number, libc::FS_IOC_SETFLAGS, &flags) })?;
    flags = 0;
    // SAFETY: as the first one.
    checked(unsafe { libc::ioctl(number, libc::FS_IOC_GETFLAGS, &mut flags) })?;
    word(flags & NODUMP != 0, "kept", "another value")
}

/// FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR of linux/fs.h, for a struct fsxattr of 28 bytes.
const GET: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
const SET: libc::Ioctl = 0x401c_5820_u32 as libc::Ioctl;

fn project(path: &Path) -> io::Result<&'static str> {
    let file = create(path)?;
    let mut about = [0u32; 7];
    // SAFETY: the descriptor is open, and the kernel writes 28 bytes, which `about` has.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), GET, &mut about) })?;
    // SAFETY: the descriptor is open, and the kernel reads 28 bytes, which `about` has.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), SET, &about) })?;
    Ok("kept")
}
