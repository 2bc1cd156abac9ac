//! The mounts that containerd's snapshotters ask for: overlay and bind, with fstab(5) options.
//!
//! Called by `share` with targets it has checked. Every option is either a flag of the mount or
//! handed to the file system; none is dropped.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kata_like_linux::namespace::unshare;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use super::mount::{NODEV, NOSUID, RDONLY, clone_tree, set_flags};
use kata_like_failure::Failure;
use std::os::fd::AsFd;

/// mount(2) copies one page of options, its end included.
const PAGE: usize = 4096;

/// One mount of the root file system that containerd asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// The file system's type, or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Where below the bundle's `rootfs`; empty: on it.
    pub target: String,
    /// Options as in fstab(5).
    pub options: Vec<String>,
}

/// Flags of mount(2), what is left for the file system, and whether a bind takes submounts along.
#[derive(Debug)]
struct Options {
    flags: MountFlags,
    data: Vec<String>,
    recursive: bool,
}

impl Options {
    fn of(mount: &RootfsMount) -> Self {
        let mut options = Self {
            flags: MountFlags::empty(),
            data: Vec::new(),
            recursive: mount.kind == "rbind",
        };
        for option in &mount.options {
            let flag = match option.as_str() {
                "ro" => MountFlags::RDONLY,
                "nosuid" => MountFlags::NOSUID,
                "nodev" => MountFlags::NODEV,
                "noexec" => MountFlags::NOEXEC,
                "noatime" => MountFlags::NOATIME,
                "nodiratime" => MountFlags::NODIRATIME,
                "relatime" => MountFlags::RELATIME,
                "strictatime" => MountFlags::STRICTATIME,
                "sync" => MountFlags::SYNCHRONOUS,
                "dirsync" => MountFlags::DIRSYNC,
                // What a mount is without a flag.
                "rw" | "suid" | "dev" | "exec" | "async" | "defaults" | "bind" | "" => {
                    MountFlags::empty()
                }
                "rbind" => {
                    options.recursive = true;
                    MountFlags::empty()
                }
                other => {
                    options.data.push(other.to_owned());
                    MountFlags::empty()
                }
            };
            options.flags |= flag;
        }
        options
    }
}

/// Binds a directory of the host.
pub(super) fn bind(request: &RootfsMount, target: &Path) -> Result<(), Failure> {
    let options = Options::of(request);
    if let Some(option) = options.data.first() {
        return Err(Failure::unsupported(
            format_args!("option {option:?} of a bind mount"),
            "it is not known",
        ));
    }
    let failed = |cause: io::Error| Failure::failed(format!("bind {}", request.source), cause);
    let tree = clone_tree(Path::new(&request.source), options.recursive).map_err(failed)?;
    let mut attributes = 0;
    for (flag, attribute) in [
        (MountFlags::RDONLY, RDONLY),
        (MountFlags::NOSUID, NOSUID),
        (MountFlags::NODEV, NODEV),
    ] {
        if options.flags.contains(flag) {
            attributes |= attribute;
        }
    }
    set_flags(tree.as_fd(), attributes, false).map_err(failed)?;
    rustix::mount::move_mount(
        &tree,
        "",
        rustix::fs::CWD,
        target,
        rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(|errno| failed(errno.into()))
}

/// Mounts an overlay. Many layers exceed the page of options: their names are then given from the
/// directory that they have in common.
pub(super) fn overlay(request: &RootfsMount, target: &Path) -> Result<(), Failure> {
    let options = Options::of(request);
    let data = options.data.join(",");
    let failed = |cause: io::Error| Failure::failed("mount an overlay", cause);
    let result = if data.len() < PAGE {
        mount_in(None, &request.source, target, options.flags, &data)
    } else {
        let (directory, data) = relative(&options.data).ok_or_else(|| too_long(data.len()))?;
        if data.len() >= PAGE {
            return Err(too_long(data.len()));
        }
        mount_in(
            Some(directory),
            &request.source,
            target,
            options.flags,
            &data,
        )
    };
    result.map_err(failed)?;
    // Nobody else is to follow it.
    mount_change(target, MountPropagationFlags::PRIVATE).map_err(|errno| failed(errno.into()))
}

fn too_long(length: usize) -> Failure {
    Failure::new(
        kata_like_failure::Kind::BadRequest,
        format!(
            "mount an overlay: its options have {length} bytes, the kernel takes {PAGE}: too many layers"
        ),
    )
}

/// mount(2), in a thread of its own when it is to have a directory of its own: the working
/// directory is otherwise the process's.
fn mount_in(
    directory: Option<PathBuf>,
    source: &str,
    target: &Path,
    flags: MountFlags,
    data: &str,
) -> io::Result<()> {
    let source = if source.is_empty() { "overlay" } else { source };
    let data = std::ffi::CString::new(data)?;
    let Some(directory) = directory else {
        return Ok(mount(source, target, "overlay", flags, &*data)?);
    };
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            unshare(rustix::thread::UnshareFlags::FS)?;
            rustix::process::chdir(&directory)?;
            Ok(mount(source, target, "overlay", flags, &*data)?)
        });
        work.join()
            .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

/// The options with each layer's name relative to the directory that all have in common.
fn relative(data: &[String]) -> Option<(PathBuf, String)> {
    let layered = |option: &'_ str| -> Option<(usize, bool)> {
        let (key, _) = option.split_once('=')?;
        match key {
            "lowerdir" => Some((key.len() + 1, true)),
            "upperdir" | "workdir" => Some((key.len() + 1, false)),
            _ => None,
        }
    };
    let mut common: Option<PathBuf> = None;
    for option in data {
        let Some((start, is_list)) = layered(option) else {
            continue;
        };
        let value = option.get(start..)?;
        // A colon or comma in a name is escaped with a backslash: too rare to be taken apart.
        if value.contains('\\') {
            return None;
        }
        let names: Vec<&str> = if is_list {
            value.split(':').collect()
        } else {
            vec![value]
        };
        for name in names {
            let parent = Path::new(name).parent()?;
            common = Some(match common {
                None => parent.to_path_buf(),
                Some(common) => shared(&common, parent),
            });
        }
    }
    let common = common.filter(|common| common.as_os_str().as_bytes().len() > 1)?;
    let prefix = format!("{}/", common.to_str()?);
    let shortened: Vec<String> = data
        .iter()
        .map(|option| match layered(option) {
            None => option.clone(),
            Some((start, _)) => {
                let (key, value) = option.split_at(start);
                let names: Vec<&str> = value
                    .split(':')
                    .map(|name| name.strip_prefix(&prefix).unwrap_or(name))
                    .collect();
                format!("{key}{}", names.join(":"))
            }
        })
        .collect();
    Some((common, shortened.join(",")))
}

fn shared(one: &Path, other: &Path) -> PathBuf {
    one.components()
        .zip(other.components())
        .take_while(|(one, other)| one == other)
        .map(|(part, _)| part)
        .collect()
}
