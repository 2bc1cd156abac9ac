//! The pod's cgroups on the host: where `cgroupsPath` puts them, who made them, who removes them.
//!
//! Called by `bootstrap` (the daemon is born in the leaf), `pod` (a cgroup for each container,
//! its stand-in is born in it) and `cleanup`. cgroup v2 only. Below a container's cgroup the
//! sandbox has one leaf for the shim, the VMM and the fs server; no controller is enabled here, so
//! a cgroup may hold a stand-in beside that leaf (cgroup-v2.rst, "No Internal Process Constraint").
//!
//! A directory made here carries a mark as an extended attribute. Whoever finds a marked one empty
//! may remove it, so the last pod below a shared parent takes that parent away too, while a cgroup
//! that kubelet or systemd made is never touched.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use kata_like_failure::Failure;

pub mod limits;

/// Where cgroup2 is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// The cgroup of shim, VMM, fs server and proxy, below that of the sandbox's first container.
pub const LEAF: &str = "kata-like";

const MARK: &str = "trusted.kata-like";
/// CGROUP2_SUPER_MAGIC of linux/magic.h.
const CGROUP2_MAGIC: i64 = 0x6367_7270;
/// NAME_MAX, and a depth that no real hierarchy reaches.
const MAX_COMPONENT: usize = 255;
const MAX_DEPTH: usize = 64;

/// Why a cgroup can't be had.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup2 at the root.
    #[error(
        "use cgroup v2 at {}: it is not mounted there; kata-like needs a host with the unified hierarchy (systemd.unified_cgroup_hierarchy=1)", root.display()
    )]
    Version1 {
        /// Where it was looked for.
        root: PathBuf,
    },
    /// The path is not one.
    #[error("linux.cgroupsPath {path:?}: {why}")]
    Path {
        /// As the spec has it.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A system call failed.
    #[error("{step} cgroup {}", path.display())]
    Io {
        /// What was being done.
        step: &'static str,
        /// To which cgroup.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The path of a container's cgroup below the root, by the spec's `cgroupsPath`.
///
/// `/a/b` is taken as it is, `SLICE:PREFIX:NAME` as systemd's driver lays it out (the slice's
/// parents, then `PREFIX-NAME.scope`). Without a path it is `kata-like/NAMESPACE/ID`.
pub fn path_of(
    cgroups_path: Option<&str>,
    namespace: &str,
    id: &str,
) -> Result<PathBuf, CgroupError> {
    let given = match cgroups_path {
        None | Some("") => return Ok(Path::new(LEAF).join(namespace).join(id)),
        Some(given) => given,
    };
    let bad = |why| CgroupError::Path {
        path: given.into(),
        why,
    };
    let parts: Vec<&str> = given.split(':').collect();
    let path = match parts.as_slice() {
        [slice, prefix, name] if !given.starts_with('/') => {
            systemd_path(slice, prefix, name).map_err(bad)?
        }
        _ => PathBuf::from(given),
    };
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) if name.len() <= MAX_COMPONENT => clean.push(name),
            Component::Normal(_) => return Err(bad("a part of it is too long")),
            _ => return Err(bad("it must not hold . or ..")),
        }
    }
    match clean.components().count() {
        0 => Err(bad("it is the root")),
        1..=MAX_DEPTH => Ok(clean),
        _ => Err(bad("it is too deep")),
    }
}

fn systemd_path(slice: &str, prefix: &str, name: &str) -> Result<PathBuf, &'static str> {
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let stem = slice
        .strip_suffix(".slice")
        .ok_or("the part before the first colon is not a slice")?;
    if name.is_empty() {
        return Err("the part after the second colon is empty");
    }
    if [slice, prefix, name].iter().any(|part| part.contains('/')) {
        return Err("a name of a unit must not hold a slash");
    }
    let mut path = PathBuf::new();
    // "-.slice" is the root; "a-b.slice" lies in "a.slice" (systemd.slice(5)).
    if stem != "-" {
        let mut parent = String::new();
        for part in stem.split('-') {
            if part.is_empty() {
                return Err("the slice's name has an empty part");
            }
            if !parent.is_empty() {
                parent.push('-');
            }
            parent.push_str(part);
            path.push(format!("{parent}.slice"));
        }
    }
    path.push(match prefix {
        _ if name.ends_with(".slice") => name.to_owned(),
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    });
    Ok(path)
}

/// A cgroup that exists, held open.
#[derive(Debug)]
pub struct Cgroup {
    fd: OwnedFd,
    path: PathBuf,
    made: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes `path` below [`ROOT`], and its parents where they are missing.
    pub fn create(path: &Path) -> Result<Self, CgroupError> {
        Self::create_under(Path::new(ROOT), path)
    }

    /// As [`Cgroup::create`], below another mount of cgroup2.
    pub fn create_under(root: &Path, path: &Path) -> Result<Self, CgroupError> {
        let stat =
            rustix::fs::statfs(root).map_err(|errno| io_error("use the root", root, errno))?;
        if stat.f_type != CGROUP2_MAGIC {
            return Err(CgroupError::Version1 { root: root.into() });
        }
        // Another pod may remove a parent that was empty when we found it: look again then.
        for _ in 0..16 {
            match Self::descend(root, path) {
                Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                }
                other => return other,
            }
        }
        Self::descend(root, path)
    }

    fn descend(root: &Path, path: &Path) -> Result<Self, CgroupError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut here = root.to_path_buf();
        let mut fd = rustix::fs::openat(CWD, root, flags, Mode::empty())
            .map_err(|errno| io_error("open", root, errno))?;
        let mut made = Vec::new();
        for name in path.iter() {
            here.push(name);
            let new = match rustix::fs::mkdirat(&fd, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(errno) => return Err(io_error("make", &here, errno)),
            };
            fd = rustix::fs::openat(&fd, name, flags, Mode::empty())
                .map_err(|errno| io_error("open", &here, errno))?;
            if new {
                rustix::fs::fsetxattr(&fd, MARK, b"1", XattrFlags::empty())
                    .map_err(|errno| io_error("mark", &here, errno))?;
            }
            if new || is_marked(&fd) {
                made.push(here.clone());
            }
        }
        made.reverse();
        Ok(Self {
            fd,
            path: here,
            made,
        })
    }

    /// Its directory and its parents that carry our mark, a child before its parent: what
    /// [`remove`] may take.
    pub fn made(&self) -> &[PathBuf] {
        &self.made
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn is_marked(fd: &OwnedFd) -> bool {
    let mut value = [0u8; 8];
    rustix::fs::fgetxattr(fd, MARK, &mut value[..]).is_ok()
}

/// The marked directories of `path` below [`ROOT`], as far as they exist: what a pod that left no
/// record may have made.
pub fn marked(path: &Path) -> Vec<PathBuf> {
    marked_under(Path::new(ROOT), path)
}

fn marked_under(root: &Path, path: &Path) -> Vec<PathBuf> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut found = Vec::new();
    let mut here = root.to_path_buf();
    let Ok(mut fd) = rustix::fs::openat(CWD, root, flags, Mode::empty()) else {
        return found;
    };
    for name in path.iter() {
        here.push(name);
        match rustix::fs::openat(&fd, name, flags, Mode::empty()) {
            Ok(next) => fd = next,
            Err(_) => break,
        }
        if is_marked(&fd) {
            found.push(here.clone());
        }
    }
    found.reverse();
    found
}

/// The path of the cgroup of the container in `bundle`.
fn path_for(namespace: &str, id: &str, bundle: &Path) -> Result<PathBuf, Failure> {
    let given = crate::spec::cgroups_path(&crate::spec::read(bundle)?)?;
    path_of(given.as_deref(), namespace, id)
        .map_err(|cause| Failure::failed(format!("find the cgroup of container {id}"), cause))
}

/// Makes the leaf of the sandbox whose first container is in `bundle`: its shim is born there.
pub fn make_leaf(namespace: &str, id: &str, bundle: &Path) -> Result<Cgroup, Failure> {
    let path = path_for(namespace, id, bundle)?.join(LEAF);
    Cgroup::create(&path).map_err(|cause| {
        remove(&marked(&path), Duration::ZERO);
        Failure::failed(format!("make the cgroup of sandbox {id}"), cause)
    })
}

/// Removes what [`make_leaf`] has made, as far as it is empty.
pub fn remove_leaf(namespace: &str, id: &str, bundle: &Path) {
    if let Ok(path) = path_for(namespace, id, bundle) {
        remove(&marked(&path.join(LEAF)), Duration::from_millis(100));
    }
}

/// Removes cgroups, a child before its parent. Those that are still used by others stay: a parent
/// with another pod below it. Waits up to `limit` for processes that are on their way out. Answers
/// those that still hold processes.
pub fn remove(cgroups: &[PathBuf], limit: Duration) -> Vec<PathBuf> {
    let end = Instant::now() + limit;
    let mut busy = Vec::new();
    for path in cgroups {
        loop {
            match rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR) {
                Err(Errno::BUSY) if !has_children(path) => {
                    if Instant::now() >= end {
                        busy.push(path.clone());
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => break,
            }
        }
    }
    busy
}

fn has_children(path: &Path) -> bool {
    std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
}

/// Kills whatever lives in a cgroup (cgroup-v2.rst, `cgroup.kill`).
pub fn kill(path: &Path) {
    let _ = std::fs::write(path.join("cgroup.kill"), "1");
}

/// The calling process, a shim at its very end, leaves its leaf for the root cgroup and removes the
/// leaf and its parents, as far as they are empty. Where it can't leave, `delete` removes them.
pub fn retire() {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"));
    if let Some(path) = path.map(Path::new)
        && path.file_name().is_some_and(|name| name == LEAF)
        && std::fs::write(Path::new(ROOT).join("cgroup.procs"), "0").is_ok()
    {
        remove(&marked(path), Duration::ZERO);
    }
}

fn io_error(step: &'static str, path: &Path, errno: Errno) -> CgroupError {
    CgroupError::Io {
        step,
        path: path.into(),
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(given: &str) -> Result<String, String> {
        path_of(Some(given), "ns", "id")
            .map(|path| path.display().to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn both_forms_and_none_lead_to_a_path() {
        let good = [
            ("/default/a", "default/a"),
            ("/kubepods/burstable/pod1/a", "kubepods/burstable/pod1/a"),
            ("a//b/", "a/b"),
            ("", "kata-like/ns/id"),
            ("/a:b:c", "a:b:c"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:a",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-a.scope",
            ),
            (":nerdctl:a", "system.slice/nerdctl-a.scope"),
            ("-.slice::a", "a.scope"),
            ("user.slice:x:b.slice", "user.slice/b.slice"),
        ];
        for (given, wanted) in good {
            assert_eq!(path(given).as_deref(), Ok(wanted), "{given}");
        }
        let none = path_of(None, "ns", "id").unwrap();
        assert_eq!(none, Path::new("kata-like/ns/id"));
    }

    #[test]
    fn a_path_never_leaves_the_root() {
        let long = format!("/{}", "x".repeat(MAX_COMPONENT + 1));
        let deep = "/a".repeat(MAX_DEPTH + 1);
        for bad in [
            "/",
            "/a/../b",
            "../a",
            "a.slice/..:b:c",
            "a:b:c",
            "a.slice:b:",
            "a--b.slice:b:c",
            "a.slice:b/..:c",
            &long,
            &deep,
        ] {
            assert!(path(bad).is_err(), "{bad}: {:?}", path(bad));
        }
    }

    /// Where this machine has cgroup2, if it has.
    fn root() -> Option<PathBuf> {
        let places = [ROOT, "/sys/fs/cgroup/unified"];
        places
            .into_iter()
            .map(PathBuf::from)
            .find(|root| rustix::fs::statfs(root).is_ok_and(|stat| stat.f_type == CGROUP2_MAGIC))
    }

    #[test]
    fn the_last_pod_takes_the_shared_parent_away() {
        let Some(root) = root() else { return };
        let parent = format!("kata-like-test-{}", std::process::id());
        let [a, b] = ["a", "b"].map(|name| Path::new(&parent).join(name));
        let first = Cgroup::create_under(&root, &a).unwrap();
        let second = Cgroup::create_under(&root, &b).unwrap();
        assert_eq!(second.made(), [root.join(&b), root.join(&parent)]);
        assert_eq!(marked_under(&root, &b), second.made());
        assert!(remove(first.made(), Duration::ZERO).is_empty());
        assert!(root.join(&b).exists() && !root.join(&a).exists());
        remove(second.made(), Duration::ZERO);
        assert!(!root.join(&parent).exists());
        // A parent that we did not make stays.
        std::fs::create_dir(root.join(&parent)).unwrap();
        let third = Cgroup::create_under(&root, &a).unwrap();
        remove(third.made(), Duration::ZERO);
        assert!(root.join(&parent).exists());
        std::fs::remove_dir(root.join(&parent)).unwrap();
    }

    #[test]
    fn a_child_is_born_in_it_and_holds_it() {
        let Some(root) = root() else { return };
        let name = format!("kata-like-birth-{}", std::process::id());
        let cgroup = Cgroup::create_under(&root, Path::new(&name)).unwrap();
        let newborn = crate::spawn::birth(&crate::spawn::Birth {
            program: Path::new("/bin/sleep"),
            arguments: &["sleep", "60"],
            environment: &[],
            directory: Path::new("/"),
            cgroup: Some(cgroup.as_fd()),
            network: crate::spawn::Network::New,
            namespaces: rustix::thread::UnshareFlags::empty(),
            mounts: None,
            label: None,
            oom_score: None,
            descriptors: &[],
        })
        .unwrap();
        let own = std::fs::read_to_string(format!("/proc/{}/cgroup", newborn.pid)).unwrap();
        assert!(own.contains(&format!("0::/{name}\n")), "{own}");
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_ne!(namespace(&newborn.pid.to_string()), namespace("self"));
        assert_eq!(remove(cgroup.made(), Duration::ZERO), [root.join(&name)]);
        kill(&root.join(&name));
        assert!(remove(cgroup.made(), Duration::from_secs(5)).is_empty());
        let gone = rustix::process::WaitIdOptions::EXITED;
        let id = rustix::process::WaitId::PidFd(newborn.pidfd.as_fd());
        rustix::process::waitid(id, gone).unwrap();
    }

    #[test]
    fn another_file_system_is_told_as_version_1() {
        let error = Cgroup::create_under(Path::new("/proc"), Path::new("a")).unwrap_err();
        assert!(matches!(error, CgroupError::Version1 { .. }), "{error}");
    }
}
