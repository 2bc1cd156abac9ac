//! The container's /dev: the devices that every container has, those of the spec, and the symlinks.
//!
//! Called by `init` in the container's process after the mounts, unless /dev itself is a bind
//! mount. We make nodes in a directory that was resolved inside the root. Where a file system
//! refuses nodes, we bind-mount the guest's own device instead.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use kata_like_failure::{Failure, Step};
use oci_spec::runtime::{LinuxDeviceType, Spec};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::error::Result;
use super::rootfs::{Rootfs, Target, attach, clone_mount, split};

/// A node to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device<'a> {
    path: &'a Path,
    kind: FileType,
    number: u64,
    mode: u32,
    owner: (u32, u32),
}

impl Device<'static> {
    fn usual(path: &'static str, major: u32, minor: u32) -> Self {
        Self {
            path: Path::new(path),
            kind: FileType::CharacterDevice,
            number: rustix::fs::makedev(major, minor),
            mode: 0o666,
            owner: (0, 0),
        }
    }
}

/// Makes everything in /dev.
pub(super) fn apply(spec: &Spec, rootfs: &Rootfs) -> Result<()> {
    if is_bind_mounted(spec) {
        return Ok(());
    }
    for device in list(spec)? {
        make(rootfs, &device).step(|| format!("make device {}", device.path.display()))?;
    }
    for (path, target) in [
        ("/dev/ptmx", "pts/ptmx"),
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/dev/core", "/proc/kcore"),
    ] {
        if path == "/dev/core" && rootfs.resolve_nofollow(Path::new(target)).is_err() {
            continue;
        }
        link(rootfs, Path::new(path), target).step(|| format!("make symlink {path}"))?;
    }
    Ok(())
}

/// Whoever binds a whole /dev into the container brings the devices with it.
fn is_bind_mounted(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(|mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        let bind = mount.typ().as_deref() == Some("bind")
            || options
                .iter()
                .any(|option| matches!(option.as_str(), "bind" | "rbind"));
        let path: std::path::PathBuf = Path::new("/")
            .join(mount.destination())
            .components()
            .collect();
        bind && path == Path::new("/dev")
    })
}

/// Lists the usual devices, then the spec's. One with the path of an earlier one replaces it.
fn list(spec: &Spec) -> Result<Vec<Device<'_>>> {
    let mut devices: Vec<Device<'_>> = vec![
        Device::usual("/dev/null", 1, 3),
        Device::usual("/dev/random", 1, 8),
        Device::usual("/dev/full", 1, 7),
        Device::usual("/dev/tty", 5, 0),
        Device::usual("/dev/zero", 1, 5),
        Device::usual("/dev/urandom", 1, 9),
    ];
    let listed = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_ref());
    for (index, device) in listed.into_iter().flatten().enumerate() {
        let field = |name: &str| format!("linux.devices[{index}].{name}");
        let number = |value: i64, name: &str| {
            u32::try_from(value)
                .map_err(|_| Failure::bad(field(name), format!("{value} is no device number")))
        };
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                return Err(Failure::bad(field("type"), "\"a\" is no type of a device"));
            }
        };
        if split(device.path()).is_none() {
            return Err(Failure::bad(
                field("path"),
                format!("{:?} names nothing below the root", device.path()),
            ));
        }
        let number = match kind {
            FileType::Fifo => 0,
            _ => rustix::fs::makedev(
                number(device.major(), "major")?,
                number(device.minor(), "minor")?,
            ),
        };
        devices.retain(|earlier| earlier.path != device.path());
        devices.push(Device {
            path: device.path(),
            kind,
            number,
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
        });
    }
    // These two are the container's own: a pseudo-terminal, and the multiplexer of its devpts.
    devices.retain(|device| {
        device.path != Path::new("/dev/ptmx") && device.path != Path::new("/dev/console")
    });
    Ok(devices)
}

fn make(rootfs: &Rootfs, device: &Device<'_>) -> std::io::Result<()> {
    let (parent, name) = split(device.path).ok_or(Errno::NOENT)?;
    let directory = rootfs.ensure(parent, Target::Directory)?;
    match rustix::fs::mknodat(
        &directory,
        name,
        device.kind,
        Mode::from(device.mode),
        device.number,
    ) {
        Ok(()) => {}
        // What is there may be the image's own or a mount. Then it must be the same device.
        Err(Errno::EXIST) => {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let found = rustix::fs::openat(&directory, name, flags, Mode::empty())?;
            return check(&found, device);
        }
        Err(Errno::PERM) => return bind(rootfs, device),
        Err(error) => return Err(error.into()),
    }
    let (uid, gid) = (Uid::from_raw(device.owner.0), Gid::from_raw(device.owner.1));
    rustix::fs::chownat(
        &directory,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    Ok(())
}

/// Bind-mounts the guest's device of the same path, instead of a node.
fn bind(rootfs: &Rootfs, device: &Device<'_>) -> std::io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let source = rustix::fs::openat(CWD, device.path, flags, Mode::empty())?;
    check(&source, device)?;
    let target = rootfs.ensure(device.path, Target::File)?;
    let mount = clone_mount(source.as_fd(), false)?;
    Ok(attach(mount.as_fd(), target.as_fd())?)
}

fn check(found: &OwnedFd, device: &Device<'_>) -> std::io::Result<()> {
    let status = rustix::fs::fstat(found)?;
    let kind = FileType::from_raw_mode(status.st_mode);
    if kind != device.kind || (kind != FileType::Fifo && status.st_rdev != device.number) {
        return Err(std::io::Error::other("another file is in its place"));
    }
    Ok(())
}

fn link(rootfs: &Rootfs, path: &Path, target: &str) -> rustix::io::Result<()> {
    let (parent, name) = split(path).ok_or(Errno::NOENT)?;
    let directory = rootfs.ensure(parent, Target::Directory)?;
    if name == "ptmx" {
        // A node in the image would be that of the guest's devpts.
        match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    match rustix::fs::symlinkat(target, &directory, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion": "1.2.0", "linux": {linux}}}"#)).unwrap()
    }

    #[test]
    fn a_device_of_the_spec_replaces_the_usual_one() {
        let spec = spec(
            r#"{"devices": [{"path": "/dev/full", "type": "c", "major": 1, "minor": 7, "fileMode": 384},
                            {"path": "/dev/console", "type": "c", "major": 5, "minor": 1}]}"#,
        );
        let devices = list(&spec).unwrap();
        assert_eq!(devices.len(), 6);
        let full = devices
            .iter()
            .find(|device| device.path == Path::new("/dev/full"))
            .unwrap();
        assert_eq!(full.mode, 0o600);
    }

    #[test]
    fn nonsense_is_named() {
        let spec =
            spec(r#"{"devices": [{"path": "/dev/x", "type": "c", "major": -1, "minor": 0}]}"#);
        let error = list(&spec).unwrap_err();
        assert_eq!(
            error.to_string(),
            "linux.devices[0].major: -1 is no device number"
        );
    }
}
