//! A user namespace: its mappings, and what only the guest's own root can do for it.
//!
//! Called by `init`, `exec` and `placeholder`. The container's process is born in its namespaces,
//! all of which belong to the new one. The runner, which is outside, then writes the mappings and
//! lets it go on. Another container's user namespace has its mappings already. Files keep their
//! numbers: we make no id-mapped mounts.
//!
//! Where the network is the guest's, two things that belong to it can't be done from within. sysfs
//! is made outside and handed in, and sysctls of the network are set outside (`sysctl`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use kata_like_failure::{Failure, Step};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType as Kind, Spec};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use rustix::pipe::PipeFlags;

use super::error::Result;
use super::identity::is_null;
use super::namespaces::{Namespaces, has_users};

/// How many lines the kernel takes (user_namespaces(7)).
const MOST_MAPPINGS: usize = 340;

/// The kernel lists there the files of a cgroup that are given away with it.
const DELEGATED: &str = "/sys/kernel/cgroup/delegate";

/// A user namespace to be made or joined.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Users {
    /// It is another container's.
    joined: bool,
    uids: String,
    gids: String,
    /// The container's root, by the guest's numbers.
    root: (u32, u32),
    /// The container may make cgroups of its own.
    delegates: bool,
}

impl Users {
    /// Reads what the spec asks for. `None`: no user namespace.
    pub(super) fn of(spec: &Spec, namespaces: &Namespaces) -> Result<Option<Self>> {
        let linux = spec.linux().as_ref();
        let uids = linux.and_then(|linux| linux.uid_mappings().as_deref());
        let gids = linux.and_then(|linux| linux.gid_mappings().as_deref());
        let (uids, gids) = (uids.unwrap_or_default(), gids.unwrap_or_default());
        let joined = namespaces.is_joined(Kind::User);
        if !joined && !namespaces.is_new(Kind::User) {
            return Ok(None);
        }
        let root = (
            check(uids, "linux.uidMappings")?,
            check(gids, "linux.gidMappings")?,
        );
        Ok(Some(Self {
            joined,
            uids: lines(uids),
            gids: lines(gids),
            root,
            delegates: namespaces.is_new(Kind::Cgroup) && mounts_writable_cgroup(spec),
        }))
    }

    /// In the runner, before the birth: gives the cgroup to the container's root, if the container
    /// is to write to it.
    pub(super) fn delegate(&self, cgroup: BorrowedFd<'_>) -> Result<()> {
        if !self.delegates {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(self.root.0), Gid::from_raw(self.root.1));
        let step = || "give the cgroup to the container's root";
        let files = std::fs::read_to_string(DELEGATED).step(step)?;
        for file in std::iter::once(".").chain(files.lines()) {
            let given = rustix::fs::chownat(cgroup, file, Some(uid), Some(gid), AtFlags::empty());
            match given {
                // The file of a controller that is not there.
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error).step(|| format!("{}: {file}", step())),
            }
        }
        Ok(())
    }

    /// In the runner: maps the ids of the process that was born, unless it was born into a mapping.
    pub(super) fn map(&self, procfs: BorrowedFd<'_>, pid: u32) -> Result<()> {
        if self.joined {
            return Ok(());
        }
        for (file, lines) in [("uid_map", &self.uids), ("gid_map", &self.gids)] {
            let step = || format!("write {file} of the container's process: {lines:?}");
            let path = format!("{pid}/{file}");
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::openat(procfs, path, flags, Mode::empty()).step(step)?;
            // The kernel takes the whole map by one write.
            rustix::io::write(&file, lines.as_bytes()).step(step)?;
        }
        Ok(())
    }
}

/// In the runner: gives the streams to the container's root, who may then give them to another user
/// (`identity`). Callers of runc make them so.
pub(super) fn own_streams(spec: &Spec, streams: &[OwnedFd]) -> Result<()> {
    if !has_users(spec) {
        return Ok(());
    }
    let linux = spec.linux().as_ref();
    let uids = linux.and_then(|linux| linux.uid_mappings().as_deref());
    let gids = linux.and_then(|linux| linux.gid_mappings().as_deref());
    let uid = check(uids.unwrap_or_default(), "linux.uidMappings")?;
    let gid = check(gids.unwrap_or_default(), "linux.gidMappings")?;
    for stream in streams {
        let step = || "give the standard streams to the container's root";
        if !is_null(&rustix::fs::fstat(stream).step(step)?) {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            rustix::fs::fchown(stream, Some(uid), Some(gid)).step(step)?;
        }
    }
    Ok(())
}

/// In the runner, before it joins other mounts: opens the guest's own procfs, for `map`.
pub(super) fn procfs() -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/proc", flags, Mode::empty())
}

/// In the container's process, once its ids are mapped: becomes the root of its namespace.
pub(super) fn become_root() -> Result<()> {
    become_root_around(|| Ok(()))
}

/// The same, with something to do in between, as the new user but with the old groups.
pub(super) fn become_root_around(between: impl FnOnce() -> Result<()>) -> Result<()> {
    let step = || "become the root of the user namespace";
    rustix::thread::set_thread_uid(Uid::ROOT).step(step)?;
    between()?;
    rustix::thread::set_thread_groups(&[]).step(step)?;
    rustix::thread::set_thread_gid(Gid::ROOT).step(step)
}

/// In the runner: makes a sysfs, which only those can make that the network belongs to.
pub(super) fn sysfs() -> Result<OwnedFd> {
    let make = || {
        let context = fsopen("sysfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(context.as_fd(), "source", "sysfs")?;
        fsconfig_create(context.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        fsmount(context.as_fd(), flags, MountAttrFlags::empty())
    };
    make().step(|| "make a sysfs for the container")
}

/// In the runner: looks into `path`, so that the kernel mounts what the share holds there, while we
/// still may.
pub(super) fn look_into(path: &Path) -> Result<()> {
    std::fs::read_dir(path)
        .map(drop)
        .step(|| format!("look into {}", path.display()))
}

/// A gate: the container's process waits there until its ids are mapped.
pub(super) struct Gate {
    waits: OwnedFd,
    opens: OwnedFd,
}

impl Gate {
    pub(super) fn new() -> Result<Self> {
        let (waits, opens) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .step(|| "make a pipe for the container's process to wait at")?;
        Ok(Self { waits, opens })
    }

    /// In the runner.
    pub(super) fn open(&self) -> Result<()> {
        rustix::io::write(&self.opens, b"m")
            .map(drop)
            .step(|| "let the container's process go on")
    }

    /// In the container's process. Fails if the runner has ended instead.
    pub(super) fn pass(self) -> Result<()> {
        let step = || "wait for the mapping of ids";
        drop(self.opens);
        let mut byte = [0];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.waits, &mut byte)).step(step)? {
            1 => Ok(()),
            _ => Err(Failure::failed(step(), "it was not made")),
        }
    }
}

/// Checks a list, and finds the id of the container's root.
fn check(list: &[LinuxIdMapping], field: &str) -> Result<u32> {
    if list.is_empty() || list.len() > MOST_MAPPINGS {
        let reason = format!("must have 1 to {MOST_MAPPINGS} entries with a user namespace");
        return Err(Failure::bad(field, reason));
    }
    for (index, mapping) in list.iter().enumerate() {
        let ends =
            [mapping.host_id(), mapping.container_id()].map(|id| id.checked_add(mapping.size()));
        if mapping.size() == 0 || ends.contains(&None) {
            let reason = "its size is 0 or leads beyond the highest id";
            return Err(Failure::bad(format!("{field}[{index}]"), reason));
        }
    }
    let root = list.iter().find(|mapping| mapping.container_id() == 0);
    root.map(LinuxIdMapping::host_id)
        .ok_or_else(|| Failure::bad(field, "maps no root of the container"))
}

/// Formats a list as the kernel reads it.
fn lines(list: &[LinuxIdMapping]) -> String {
    list.iter()
        .map(|it| format!("{} {} {}\n", it.container_id(), it.host_id(), it.size()))
        .collect()
}

fn mounts_writable_cgroup(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(|mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"))
            && !options.iter().any(|option| option == "ro")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(uids: &str, gids: &str, namespaces: &str) -> Result<Option<Users>> {
        users_of(uids, gids, namespaces, &[])
    }

    fn users_of(
        uids: &str,
        gids: &str,
        namespaces: &str,
        joined: &[Kind],
    ) -> Result<Option<Users>> {
        let spec: Spec = serde_json::from_str(&format!(
            r#"{{"ociVersion": "1.2.0", "linux": {{"uidMappings": {uids}, "gidMappings": {gids},
                "namespaces": [{{"type": "mount"}} {namespaces}]}}}}"#
        ))
        .unwrap();
        let namespaces = Namespaces::of(&spec, joined, &[])?;
        Users::of(&spec, &namespaces)
    }

    const ONE: &str = r#"[{"containerID": 0, "hostID": 1000, "size": 10},
                          {"containerID": 10, "hostID": 5000, "size": 1}]"#;
    const USER: &str = r#", {"type": "user"}"#;

    #[test]
    fn mappings_become_lines() {
        assert_eq!(users(ONE, ONE, "").unwrap(), None);
        let users = users(ONE, ONE, USER).unwrap().unwrap();
        assert_eq!(users.uids, "0 1000 10\n10 5000 1\n");
        assert_eq!((users.root, users.joined), ((1000, 1000), false));
    }

    #[test]
    fn a_joined_one_has_the_mappings_of_its_container() {
        let users = users_of(ONE, ONE, USER, &[Kind::User]).unwrap().unwrap();
        assert_eq!((users.root, users.joined), ((1000, 1000), true));
    }

    #[test]
    fn nonsense_is_named() {
        let beyond = r#"[{"containerID": 0, "hostID": 4294967295, "size": 2}]"#;
        let none = r#"[{"containerID": 0, "hostID": 1, "size": 0}]"#;
        let no_root = r#"[{"containerID": 1, "hostID": 1, "size": 1}]"#;
        for (uids, gids, namespaces, field) in [
            ("[]", ONE, USER, "linux.uidMappings:"),
            (ONE, "[]", USER, "linux.gidMappings:"),
            (beyond, ONE, USER, "linux.uidMappings[0]:"),
            (ONE, none, USER, "linux.gidMappings[0]:"),
            (no_root, ONE, USER, "linux.uidMappings:"),
        ] {
            let error = users(uids, gids, namespaces).unwrap_err().one_line();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
