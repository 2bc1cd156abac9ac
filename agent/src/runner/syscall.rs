//! The system calls that no library here wraps and that the runner alone needs, each a safe
//! function.
//!
//! Called by the rest of the runner. What other programs need as well is in the crate `linux`.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The cgroup namespace of the process behind a pidfd (PIDFD_GET_CGROUP_NAMESPACE of
/// linux/pidfd.h).
pub(super) fn cgroup_namespace(pidfd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const GET_CGROUP_NAMESPACE: libc::Ioctl = 0xff01;
    // SAFETY: the call takes no argument, and the descriptor is open while it is borrowed. If it
    // has succeeded, the result is a new descriptor that nobody else owns.
    unsafe {
        match libc::ioctl(pidfd.as_raw_fd(), GET_CGROUP_NAMESPACE, 0) {
            -1 => Err(io::Error::last_os_error()),
            namespace => Ok(OwnedFd::from_raw_fd(namespace)),
        }
    }
}

/// `struct sched_attr` in its first size (linux/sched/types.h), which every kernel takes.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct SchedulerAttributes {
    pub(super) size: u32,
    pub(super) policy: u32,
    pub(super) flags: u64,
    pub(super) nice: i32,
    pub(super) priority: u32,
    pub(super) runtime: u64,
    pub(super) deadline: u64,
    pub(super) period: u64,
}

impl SchedulerAttributes {
    /// What `size` must be.
    pub(super) const SIZE: u32 = size_of::<Self>() as u32;
}

/// sched_setattr(2) of this process.
pub(super) fn sched_setattr(attributes: &SchedulerAttributes) -> io::Result<()> {
    debug_assert_eq!(attributes.size, SchedulerAttributes::SIZE);
    // SAFETY: the kernel reads as many bytes as `size` says, which is all of the live structure.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            0,
            std::ptr::from_ref(attributes),
            0,
        )
    })
    .map(drop)
}

/// ioprio_set(2) of this process: class and priority in one number.
pub(super) fn ioprio_set(priority: libc::c_int) -> io::Result<()> {
    const WHO_PROCESS: libc::c_int = 1;
    // SAFETY: takes integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, priority) }).map(drop)
}

/// Joins the session keyring of this name, made if need be; its serial number.
pub(super) fn join_session_keyring(name: &CStr) -> io::Result<libc::c_long> {
    keyctl(Keyctl::JoinSession(name))
}

/// What KEYCTL_DESCRIBE says of a key: type, uid, gid, permissions, name.
pub(super) fn describe_key(key: libc::c_long) -> io::Result<String> {
    let mut text = [0u8; 512];
    let length = keyctl(Keyctl::Describe(key, &mut text))?;
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

/// KEYCTL_SETPERM.
pub(super) fn set_key_permissions(key: libc::c_long, permissions: u32) -> io::Result<()> {
    keyctl(Keyctl::SetPermissions(key, permissions)).map(drop)
}

/// An operation of keyctl(2).
enum Keyctl<'a> {
    JoinSession(&'a CStr),
    Describe(libc::c_long, &'a mut [u8]),
    SetPermissions(libc::c_long, u32),
}

fn keyctl(operation: Keyctl<'_>) -> io::Result<libc::c_long> {
    let (number, first, second, third) = match operation {
        Keyctl::JoinSession(name) => (
            libc::KEYCTL_JOIN_SESSION_KEYRING,
            name.as_ptr() as libc::c_long,
            0,
            0,
        ),
        Keyctl::Describe(key, text) => (
            libc::KEYCTL_DESCRIBE,
            key,
            text.as_mut_ptr() as libc::c_long,
            text.len(),
        ),
        Keyctl::SetPermissions(key, permissions) => {
            (libc::KEYCTL_SETPERM, key, permissions.into(), 0)
        }
    };
    // SAFETY: what the operation refers to outlives the call.
    // - For the first, the kernel reads a C string.
    // - For the second, it writes at most as many bytes as it is told the buffer has.
    // - The third takes numbers.
    check(unsafe { libc::syscall(libc::SYS_keyctl, number, first, second, third) })
}

/// Loads a classic BPF program as this thread's seccomp filter.
pub(super) fn seccomp_set_filter(
    program: &[libc::sock_filter],
    flags: libc::c_ulong,
) -> io::Result<()> {
    let length =
        u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `program` describes a live slice of exactly `length` instructions; the kernel copies
    // it during the call and does not write to it.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::from_ref(&program),
        )
    })
    .map(drop)
}
