//! The two shares of the pod, and what the guest holds of them.
//!
//! Called by `sandbox.rs` (a pod starts, ends) and `container.rs` (a container is deleted). Each
//! directory in a share that is a mount on the host appears here as a mount of its own, made by the
//! kernel when somebody first looks into it (fs/fuse/dir.c, fuse_dentry_automount). The host's file
//! server keeps an inode open for as long as this kernel remembers it, and the host can't free a
//! container's rootfs before that: so forgetting is part of deleting.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use kata_like_agent_protocol::{ROOTFS_TAG, VOLUMES_TAG};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

/// Why a share could not be mounted or freed.
#[derive(Debug, thiserror::Error)]
#[error("{step} {}", path.display())]
pub struct StorageError {
    step: String,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A virtio-fs device and where its files are.
pub struct Share {
    /// The tag the device announces.
    pub tag: &'static str,
    /// The mount point.
    pub target: &'static str,
}

/// Each container's rootfs, by the container's name.
pub const ROOTFS: Share = Share {
    tag: ROOTFS_TAG,
    target: "/run/kata-like/rootfs",
};

/// The volumes, by name.
pub const VOLUMES: Share = Share {
    tag: VOLUMES_TAG,
    target: "/run/kata-like/volumes",
};

/// Both.
pub const SHARES: [Share; 2] = [ROOTFS, VOLUMES];

/// Mounts the shares that there are; gives the tags of those that are missing.
pub fn mount_shares() -> Result<Vec<&'static str>, StorageError> {
    let mut missing = Vec::new();
    for share in &SHARES {
        // No flags: what a rootfs may hold, devices and set-user-id programs, it may hold here too.
        let result = mount(
            share.tag,
            share.target,
            "virtiofs",
            MountFlags::empty(),
            None,
        );
        match result {
            Ok(()) => {}
            // The kernel's words for a tag that no device has (fs/fuse/virtio_fs.c).
            Err(Errno::INVAL) => missing.push(share.tag),
            Err(errno) => {
                return Err(StorageError {
                    step: format!("mount the share {} on", share.tag),
                    path: share.target.into(),
                    source: errno.into(),
                });
            }
        }
    }
    Ok(missing)
}

/// Frees what the guest holds of a container's rootfs and volumes.
pub fn forget(container: &str, volumes: &[String]) -> Result<(), StorageError> {
    let rootfs = [Path::new(ROOTFS.target).join(container)];
    let volumes: Vec<_> = volumes
        .iter()
        .map(|name| Path::new(VOLUMES.target).join(name))
        .collect();
    for (share, roots) in [(&ROOTFS, &rootfs[..]), (&VOLUMES, &volumes)] {
        if roots.is_empty() {
            continue;
        }
        unmount_below(roots)?;
        forget_names(share)?;
    }
    Ok(())
}

/// Unmounts both shares with all in them. What is busy is detached: the machine ends.
pub fn unmount_shares() -> Result<(), StorageError> {
    let roots = SHARES.map(|share| PathBuf::from(share.target));
    unmount_below(&roots)
}

/// Unmounts every mount at or below `roots`, the latest first.
fn unmount_below(roots: &[PathBuf]) -> Result<(), StorageError> {
    let table = fs::read("/proc/thread-self/mountinfo").map_err(|source| StorageError {
        step: "read the mounts in".into(),
        path: "/proc/thread-self/mountinfo".into(),
        source,
    })?;
    let mounts = mount_points(&table);
    let ours = |mount: &&PathBuf| roots.iter().any(|root| mount.starts_with(root));
    for mount in mounts.iter().rev().filter(ours) {
        let mut result = unmount(mount, UnmountFlags::NOFOLLOW);
        if result == Err(Errno::BUSY) {
            log::warn!("unmount {}: busy, so it is only detached", mount.display());
            result = unmount(mount, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
        }
        match result {
            // Not a mount any more: somebody was faster.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(errno) => {
                return Err(StorageError {
                    step: "unmount".into(),
                    path: mount.clone(),
                    source: errno.into(),
                });
            }
        }
    }
    Ok(())
}

/// Drops the names that nobody uses from the share's cache, and with them the inodes that the host
/// keeps for us. A remount does it (fs/super.c, reconfigure_super, shrink_dcache_sb) and changes
/// nothing else; it reaches the share's own directory only, since each mount in it has a cache of
/// its own.
fn forget_names(share: &Share) -> Result<(), StorageError> {
    match mount_remount(share.target, MountFlags::empty(), c"") {
        // Not mounted: the pod has no such share.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(StorageError {
            step: "drop the unused names of".into(),
            path: share.target.into(),
            source: errno.into(),
        }),
    }
}

/// The mount points in a mountinfo file (proc_pid_mountinfo(5)), in its order.
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    let lines = table.split(|byte| *byte == b'\n');
    let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    points.map(unescape).collect()
}

/// Undoes `\040` and its like.
fn unescape(escaped: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (byte, code) {
            (b'\\', Some(code)) => {
                path.push(code);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                path.push(byte);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_whatever_is_in_them() {
        let table = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            30 22 0:30 / /run/kata-like/rootfs/a/with\\040space\\134x rw - virtiofs rootfs rw\n\n";
        let points = mount_points(table);
        assert_eq!(
            points,
            [
                Path::new("/proc"),
                Path::new("/run/kata-like/rootfs/a/with space\\x")
            ]
        );
        assert_eq!(unescape(b"a\\9"), Path::new("a\\9"));
    }

    /// In a mount namespace of its own; needs root.
    #[test]
    fn a_containers_mounts_go_and_no_others_though_its_name_begins_alike() {
        use rustix::mount::{MountPropagationFlags, mount_change};
        use rustix::thread::{UnshareFlags, unshare_unsafe};

        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name);
        let test = || {
            // SAFETY: only this thread changes its mount namespace, root and working directory; it
            // shares none of them with another, and ends with this closure.
            unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            for name in ["a", "a/b", "ab", "a/b"] {
                fs::create_dir_all(place(name)).unwrap();
                mount("none", place(name), "tmpfs", MountFlags::empty(), None).unwrap();
            }
            let busy = fs::File::create(place("a/b/open")).unwrap();
            unmount_below(&[place("a")]).unwrap();
            drop(busy);
            let table = fs::read("/proc/thread-self/mountinfo").unwrap();
            let mut left = mount_points(&table);
            left.retain(|mount| mount.starts_with(directory.path()));
            left
        };
        let left = std::thread::scope(|scope| scope.spawn(test).join().unwrap());
        assert_eq!(left, [place("ab")]);
    }
}
