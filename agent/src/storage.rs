//! The pod's two shares and what the guest holds of them, and its volumes in memory.
//!
//! Called by `pod.rs` (a pod starts) and by `container/` (a container comes and goes). A volume in
//! memory is made when a container first names it, and lives as long as the pod: what one container
//! leaves there, the next one finds, as in `/dev/shm` of a Kubernetes pod.
//!
//! A directory in a share that is a mount on the host appears here as a mount of its own. The
//! kernel makes it when somebody first looks into it (fs/fuse/dir.c, fuse_dentry_automount). The
//! host's file server keeps an inode open for as long as this kernel remembers it, and the host
//! can't free a container's rootfs before that. So forgetting is part of deleting.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use kata_like_agent_protocol::{ROOTFS_TAG, VOLUMES_TAG};
use kata_like_failure::{Failure, Step};
use kata_like_linux::lock;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

/// A virtio-fs device, and where its files are.
pub struct Share {
    /// The tag that the device announces.
    pub tag: &'static str,
    /// The mount point.
    pub target: &'static str,
}

/// Holds each container's rootfs, by the container's name.
pub const ROOTFS: Share = Share {
    tag: ROOTFS_TAG,
    target: "/run/kata-like/rootfs",
};

/// Holds the volumes, by name.
pub const VOLUMES: Share = Share {
    tag: VOLUMES_TAG,
    target: "/run/kata-like/volumes",
};

pub const SHARES: [Share; 2] = [ROOTFS, VOLUMES];

/// Where the volumes in memory are, each by its name.
pub const MEMORY: &str = "/run/kata-like/memory";

/// A tmpfs that containers share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryVolume {
    /// Checked to be a name.
    pub name: String,
    /// In bytes. 0: half of the guest's memory.
    pub size: u64,
    /// The mode of its root directory.
    pub mode: u32,
}

/// Makes the volumes that are not there yet. One that is there stays as it is.
pub fn make_memory_volumes(volumes: &[MemoryVolume]) -> Result<(), Failure> {
    make_memory_volumes_in(Path::new(MEMORY), volumes)
}

fn make_memory_volumes_in(place: &Path, volumes: &[MemoryVolume]) -> Result<(), Failure> {
    /// Two containers that come up at once must not make a volume each.
    static MAKING: Mutex<()> = Mutex::new(());

    let _making = lock(&MAKING);
    for volume in volumes {
        let path = place.join(&volume.name);
        let made = make_memory_volume(place, &path, volume);
        made.step(|| format!("make the volume in memory {}", path.display()))?;
    }
    Ok(())
}

fn make_memory_volume(place: &Path, path: &Path, volume: &MemoryVolume) -> io::Result<()> {
    fs::create_dir_all(path)?;
    if fs::metadata(path)?.dev() != fs::metadata(place)?.dev() {
        return Ok(());
    }
    let mut options = format!("mode={:o}", volume.mode);
    if volume.size != 0 {
        options.push_str(&format!(",size={}", volume.size));
    }
    let options = CString::new(options)?;
    // No flags: the spec gives a container's mount its own.
    let flags = MountFlags::empty();
    let result = mount("tmpfs", path, "tmpfs", flags, Some(options.as_c_str()));
    result.map_err(|errno| {
        let _ = fs::remove_dir(path);
        errno.into()
    })
}

/// Mounts the shares that are there. Returns the tags of those that are missing.
pub fn mount_shares() -> Result<Vec<&'static str>, Failure> {
    let mut missing = Vec::new();
    for share in &SHARES {
        // No flags: a rootfs may hold devices and set-user-id programs.
        let result = mount(
            share.tag,
            share.target,
            "virtiofs",
            MountFlags::empty(),
            None,
        );
        match result {
            Ok(()) => {}
            // The kernel's answer for a tag that no device has (fs/fuse/virtio_fs.c).
            Err(Errno::INVAL) => missing.push(share.tag),
            Err(errno) => {
                let step = || format!("mount the share {} on {}", share.tag, share.target);
                return Err(errno).step(step);
            }
        }
    }
    Ok(missing)
}

/// How many containers have each volume.
#[derive(Default)]
pub struct VolumeHolders(Mutex<HashMap<String, usize>>);

impl VolumeHolders {
    /// Counts a container that has these volumes from now on.
    pub fn add(&self, volumes: &[String]) {
        let mut holders = self.lock();
        for name in volumes {
            *holders.entry(name.clone()).or_default() += 1;
        }
    }

    /// Takes back one `add`. Returns the volumes that no container has now.
    pub fn remove(&self, volumes: &[String]) -> Vec<String> {
        let mut holders = self.lock();
        let mut free = Vec::new();
        for name in volumes {
            let left = holders.get_mut(name).map(|count| {
                *count = count.saturating_sub(1);
                *count
            });
            if left == Some(0) {
                holders.remove(name);
                free.push(name.clone());
            }
        }
        free
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // Held for single operations only.
        lock(&self.0)
    }
}

/// Looks into volumes, so that the kernel mounts them in the agent's namespace, before a container
/// has a mount namespace of its own. All containers with such a volume then see one file system.
/// Blocks.
pub fn look_into(volumes: &[String]) -> Result<(), Failure> {
    volumes.iter().try_for_each(|name| {
        let path = Path::new(VOLUMES.target).join(name);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            // A file is no mount.
            Ok(_) | Err(Errno::NOTDIR) => Ok(()),
            Err(errno) => Err(errno).step(|| format!("look into the volume {}", path.display())),
        }
    })
}

/// Frees what the guest holds of a container's rootfs, and of volumes that no other container has.
pub fn forget(container: &str, volumes: &[String]) -> Result<(), Failure> {
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

/// Unmounts every mount at or below `roots`, the latest first.
fn unmount_below(roots: &[PathBuf]) -> Result<(), Failure> {
    const TABLE: &str = "/proc/thread-self/mountinfo";
    let table = fs::read(TABLE).step(|| format!("read the mounts in {TABLE}"))?;
    let mounts = mount_points(&table);
    let ours = |mount: &&PathBuf| roots.iter().any(|root| mount.starts_with(root));
    for mount in mounts.iter().rev().filter(ours) {
        let mut result = unmount(mount, UnmountFlags::NOFOLLOW);
        if result == Err(Errno::BUSY) {
            log::warn!("unmount {}: busy, so it is only detached", mount.display());
            result = unmount(mount, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
        }
        match result {
            // No longer a mount: somebody was faster.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(errno) => {
                return Err(errno).step(|| format!("unmount {}", mount.display()));
            }
        }
    }
    Ok(())
}

/// Drops the unused names from the share's cache, and with them the inodes that the host keeps for
/// us. A remount does it (fs/super.c, reconfigure_super, shrink_dcache_sb) and changes nothing
/// else. It reaches the share's own directory only: each mount in it has a cache of its own.
fn forget_names(share: &Share) -> Result<(), Failure> {
    match mount_remount(share.target, MountFlags::empty(), c"") {
        // Not mounted: the pod has no such share.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(errno).step(|| format!("drop the unused names of {}", share.target)),
    }
}

/// Lists the mount points in a mountinfo file (proc_pid_mountinfo(5)), in its order.
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    let lines = table.split(|byte| *byte == b'\n');
    let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    points.map(unescape).collect()
}

/// Decodes `\040` and the like.
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

    /// Does `test` in a mount namespace of its own; needs root.
    fn with_own_mounts<T: Send>(test: impl FnOnce() -> T + Send) -> T {
        use rustix::mount::{MountPropagationFlags, mount_change};
        use rustix::thread::UnshareFlags;

        let test = || {
            kata_like_linux::namespace::unshare(UnshareFlags::NEWNS | UnshareFlags::FS).unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            test()
        };
        std::thread::scope(|scope| scope.spawn(test).join().unwrap())
    }

    #[test]
    fn a_containers_mounts_go_and_no_others_though_its_name_begins_alike() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name);
        let left = with_own_mounts(|| {
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
        });
        assert_eq!(left, [place("ab")]);
    }

    #[test]
    fn a_volume_is_free_when_the_last_container_has_left_it() {
        let holders = VolumeHolders::default();
        let names = |names: &[&str]| names.iter().map(|&name| name.into()).collect::<Vec<_>>();
        holders.add(&names(&["a", "b"]));
        holders.add(&names(&["b", "b"]));
        assert_eq!(holders.remove(&names(&["a", "b"])), ["a"]);
        assert_eq!(holders.remove(&names(&["b", "never"])), [""; 0]);
        assert_eq!(holders.remove(&names(&["b"])), ["b"]);
    }

    #[test]
    fn a_volume_in_memory_is_made_once_with_its_size_and_mode() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("memory");
        let volume = |name: &str, size, mode| MemoryVolume {
            name: name.into(),
            size,
            mode,
        };
        with_own_mounts(|| {
            let shm = [volume("shm", 1 << 20, 0o1777), volume("all", 0, 0o755)];
            make_memory_volumes_in(&place, &shm).unwrap();
            fs::write(place.join("shm/kept"), "x").unwrap();
            make_memory_volumes_in(&place, &[volume("shm", 5 << 20, 0o700)]).unwrap();
            let status = fs::metadata(place.join("shm")).unwrap();
            assert_eq!(status.mode() & 0o7777, 0o1777);
            let system = rustix::fs::statvfs(place.join("shm")).unwrap();
            assert_eq!(system.f_blocks * system.f_frsize, 1 << 20);
            assert!(place.join("shm/kept").exists());
            let half = rustix::fs::statvfs(place.join("all")).unwrap();
            assert!(half.f_blocks * half.f_frsize > 1 << 20);
            fs::write(place.join("file"), "").unwrap();
            let error = make_memory_volumes_in(&place, &[volume("file", 0, 0o755)]);
            let error = error.unwrap_err().to_string();
            assert!(error.starts_with("make the volume in memory /"), "{error}");
        });
    }
}
