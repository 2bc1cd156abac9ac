//! The system calls that no library here wraps, each a safe function.
//!
//! Called by the rest of the runner, in its single-threaded process only: `clone3` would otherwise copy a
//! process whose other threads' locks stay held for ever.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// clone3's flag (linux/sched.h); the libc crate's constant doesn't fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Of linux/fcntl.h; not in the libc crate.
const AT_RECURSIVE: libc::c_int = 0x8000;

/// mount_setattr(2): what to set, what to clear, and the propagation to give.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct MountAttributes {
    pub(super) set: u64,
    pub(super) clear: u64,
    pub(super) propagation: u64,
    pub(super) userns_fd: u64,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Changes the mount that `mount` is the root of; with `recursive`, all below it as well.
pub(super) fn mount_setattr(
    mount: impl AsFd,
    recursive: bool,
    attributes: &MountAttributes,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a static C string, the structure is `struct mount_attr` (four u64), read only
    // during the call, and its size is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    check(result).map(drop)
}

/// What came of `clone3`.
pub(super) enum Cloned {
    /// In the new process.
    Child,
    /// In the caller: the new process's pid and pidfd.
    Parent(u32, OwnedFd),
}

/// Makes a sibling of this process in the given new namespaces, born in `cgroup`.
///
/// It is a child of our parent (CLONE_PARENT), so that the agent reaps it although we are gone by then.
pub(super) fn clone3(namespaces: u64, cgroup: BorrowedFd<'_>) -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: `clone_args` is plain integers, for which all zero is valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags =
        namespaces | (libc::CLONE_PARENT as u64) | (libc::CLONE_PIDFD as u64) | CLONE_INTO_CGROUP;
    arguments.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    arguments.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM this is a fork: the child goes on with a copy of our memory, on a copy of
    // our stack. We have one thread, so no lock is held by a thread that the child lacks. The kernel
    // writes the pidfd to `pidfd`, which outlives the call.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_ref(&arguments),
            size_of::<libc::clone_args>(),
        )
    };
    match check(pid)? {
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: clone3 has succeeded with CLONE_PIDFD, so `pidfd` is a new descriptor that nobody
            // else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent(pid as u32, pidfd))
        }
    }
}

/// setns(2) with the namespaces of a process (`CLONE_NEW…`) or with one namespace (its own kind or 0).
pub(super) fn setns(fd: BorrowedFd<'_>, kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: takes integers only, and the descriptor is open while it is borrowed.
    check(unsafe { libc::setns(fd.as_raw_fd(), kinds) }.into()).map(drop)
}

/// The cgroup namespace of the process behind a pidfd (PIDFD_GET_CGROUP_NAMESPACE of linux/pidfd.h).
pub(super) fn cgroup_namespace(pidfd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const GET_CGROUP_NAMESPACE: libc::Ioctl = 0xff01;
    // SAFETY: takes no argument, and the descriptor is open while it is borrowed.
    let namespace = unsafe { libc::ioctl(pidfd.as_raw_fd(), GET_CGROUP_NAMESPACE, 0) };
    check(namespace.into())?;
    // SAFETY: the call has succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}

/// unshare(2).
pub(super) fn unshare(kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: takes an integer only; we have one thread, so nobody shares what is unshared.
    check(unsafe { libc::unshare(kinds) }.into()).map(drop)
}

/// prctl(2) with integers.
pub(super) fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<libc::c_long> {
    // SAFETY: the options used here (PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_KEEPCAPS,
    // PR_CAPBSET_READ, PR_CAPBSET_DROP) take no pointer.
    check(unsafe { libc::prctl(option, value, 0, 0, 0) }.into())
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

/// personality(2).
pub(super) fn personality(persona: libc::c_ulong) -> io::Result<()> {
    // SAFETY: takes an integer only.
    check(unsafe { libc::personality(persona) }.into()).map(drop)
}

/// Joins the session keyring of this name, made if need be; its serial number.
pub(super) fn join_session_keyring(name: &CStr) -> io::Result<libc::c_long> {
    // SAFETY: the name is a C string that outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING,
            name.as_ptr(),
        )
    })
}

/// What KEYCTL_DESCRIBE says of a key: type, uid, gid, permissions, name.
pub(super) fn describe_key(key: libc::c_long) -> io::Result<String> {
    let mut text = [0u8; 512];
    // SAFETY: the kernel writes at most the length passed into the buffer, which outlives the call.
    let length = check(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_DESCRIBE,
            key,
            text.as_mut_ptr(),
            text.len(),
        )
    })?;
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

/// KEYCTL_SETPERM.
pub(super) fn set_key_permissions(key: libc::c_long, permissions: u32) -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_SETPERM, key, permissions) })
        .map(drop)
}

/// close_range(2) with CLOSE_RANGE_CLOEXEC: whatever is open from `first` on closes at exec.
pub(super) fn close_on_exec_from(first: libc::c_uint) -> io::Result<()> {
    // SAFETY: takes integers only; no descriptor is closed now, so no owner is left with a stale one.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
    .map(drop)
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
    // SAFETY: `program` describes a live slice of exactly `length` instructions; the kernel copies it
    // during the call and does not write to it.
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

/// faccessat2(2) for execution, with the effective ids; no fallback of the C library in between.
pub(super) fn may_execute(path: &CStr) -> io::Result<()> {
    // SAFETY: the path is a C string that outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::X_OK,
            libc::AT_EACCESS,
        )
    })
    .map(drop)
}

/// bpf(2) with an attribute union of plain integers and addresses.
///
/// # Safety
///
/// Every address in `attributes` must be valid for what `command` does with it.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the structure is read only during the call and its size is passed; for the addresses in
    // it the caller vouches.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    })?;
    libc::c_int::try_from(result).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Every signal back to its default action, and none blocked.
pub(super) fn reset_signals() -> io::Result<()> {
    /// `struct sigaction` as the kernel has it; all zero is the default action.
    #[repr(C)]
    struct Action([u64; 4]);
    /// The kernel's signal set has a bit for each of 64 signals.
    const SET_SIZE: usize = 8;

    let (default, none) = (Action([0; 4]), 0u64);
    for signal in 1..=64 {
        // SAFETY: the kernel reads `default`, which is live, and sets no handler. We go by the C library,
        // which keeps two signals to itself and had posix_spawn ignore them. EINVAL for SIGKILL and
        // SIGSTOP is as it should be: nothing changes for them.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                std::ptr::from_ref(&default),
                std::ptr::null_mut::<Action>(),
                SET_SIZE,
            )
        };
    }
    // SAFETY: the kernel reads eight bytes of `none`, which is live, and writes nothing.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            std::ptr::from_ref(&none),
            std::ptr::null_mut::<u64>(),
            SET_SIZE,
        )
    })
    .map(drop)
}
