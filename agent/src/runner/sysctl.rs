//! The spec's sysctls, and the names of the container's host and domain.
//!
//! Called by `init` and `placeholder`; those of the guest's own network by `container` at the
//! start. We write them through a procfs of our own that is mounted nowhere: something from the
//! image or its volumes may cover the container's.
//!
//! A network's sysctls come after its interfaces and addresses, as under runc: some name an
//! interface, and `default` is meant for interfaces that are still to come. The guest's own network
//! is complete before the first start, so that is when its sysctls are written.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use kata_like_failure::{Failure, Step};
use kata_like_spec::SYSCTL;
use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::error::Result;
use super::namespaces::Namespaces;

const OF_IPC: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// Refuses, before anything is made, what is not the container's own to set.
pub(super) fn check(spec: &Spec, namespaces: &Namespaces) -> Result<()> {
    for key in listed(spec).map(|(key, _)| key) {
        let path = path(key);
        let field = || format!("linux.sysctl[{key:?}]");
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(Failure::bad(field(), "is no name of a sysctl"));
        }
        let own = if OF_IPC.contains(&path.as_str()) || path.starts_with("fs/mqueue/") {
            namespaces.is_new(Kind::Ipc)
        } else if path == "kernel/domainname" {
            namespaces.is_new(Kind::Uts)
        } else if path == "kernel/hostname" {
            return Err(Failure::bad(field(), "is what the field hostname is for"));
        } else {
            path.starts_with("net/")
        };
        if !own {
            return Err(SYSCTL.of(field()));
        }
    }
    for (field, name) in [
        ("hostname", spec.hostname()),
        ("domainname", spec.domainname()),
    ] {
        if name.as_deref().is_some_and(|name| !name.is_empty()) && !namespaces.lists(Kind::Uts) {
            return Err(Failure::bad(field, "can't be set without a UTS namespace"));
        }
    }
    Ok(())
}

/// In the runner, which has joined the network: writes the sysctls of another container's network,
/// whatever user namespace it has. Of the guest's own network it only looks whether they are there.
pub(super) fn apply_to_network(spec: &Spec, namespaces: &Namespaces) -> Result<()> {
    if namespaces.is_joined(Kind::Network) {
        return write_those(spec, of_network, procfs);
    }
    if is_guests(namespaces) {
        let known = |path: &str| of_network(path) && interface(path).is_none();
        return for_those(spec, known, procfs, |procfs, key, _, path| {
            open(procfs, path)
                .map(drop)
                .step(|| format!("find sysctl {key}"))
        });
    }
    Ok(())
}

/// In the agent, as a container starts: writes the sysctls of the guest's own network, if that is
/// the container's.
pub fn apply_to_guest_network(spec: &Spec, joined: &[Kind], guest: &[Kind]) -> Result<()> {
    match is_guests(&Namespaces::of(spec, joined, guest)?) {
        true => write_those(spec, of_network, procfs),
        false => Ok(()),
    }
}

/// Whether the container lives in the guest's own network, which is the pod's.
fn is_guests(namespaces: &Namespaces) -> bool {
    !namespaces.is_new(Kind::Network) && !namespaces.is_joined(Kind::Network)
}

fn of_network(path: &str) -> bool {
    path.starts_with("net/")
}

/// The interface that a sysctl is about, which may not be there yet.
fn interface(path: &str) -> Option<&str> {
    let parts: Vec<_> = path.split('/').collect();
    match parts[..] {
        ["net", _, "conf" | "neigh", name, _] if !matches!(name, "all" | "default") => Some(name),
        _ => None,
    }
}

/// In the container's process: writes all others.
pub(super) fn apply(spec: &Spec, namespaces: &Namespaces) -> Result<()> {
    apply_through(spec, namespaces, procfs)
}

/// The same through another procfs: only those that the PID namespace belongs to can mount a new
/// one.
pub(super) fn apply_through(
    spec: &Spec,
    namespaces: &Namespaces,
    procfs: fn() -> rustix::io::Result<OwnedFd>,
) -> Result<()> {
    let own_network = namespaces.is_new(Kind::Network);
    let wanted = |path: &str| own_network || !of_network(path);
    write_those(spec, wanted, procfs)
}

fn write_those(
    spec: &Spec,
    wanted: impl Fn(&str) -> bool,
    procfs: fn() -> rustix::io::Result<OwnedFd>,
) -> Result<()> {
    for_those(spec, wanted, procfs, |procfs, key, value, path| {
        write(procfs, path, value).step(|| format!("write sysctl {key} = {value:?}"))
    })
}

/// Does something with each sysctl of the spec whose path is wanted.
fn for_those(
    spec: &Spec,
    wanted: impl Fn(&str) -> bool,
    procfs: fn() -> rustix::io::Result<OwnedFd>,
    act: impl Fn(&OwnedFd, &str, &str, &str) -> Result<()>,
) -> Result<()> {
    let mut listed = listed(spec)
        .filter(|(key, _)| wanted(&path(key)))
        .peekable();
    if listed.peek().is_none() {
        return Ok(());
    }
    let procfs = procfs().step(|| "open a procfs to write sysctls")?;
    for (key, value) in listed {
        act(&procfs, key, value, &path(key))?;
    }
    Ok(())
}

/// Sets the names of the host and the domain.
pub(super) fn set_names(spec: &Spec) -> Result<()> {
    if let Some(name) = spec.hostname().as_deref().filter(|name| !name.is_empty()) {
        rustix::system::sethostname(name.as_bytes()).step(|| format!("set hostname {name:?}"))?;
    }
    if let Some(name) = spec.domainname().as_deref().filter(|name| !name.is_empty()) {
        rustix::system::setdomainname(name.as_bytes())
            .step(|| format!("set domainname {name:?}"))?;
    }
    Ok(())
}

fn listed(spec: &Spec) -> impl Iterator<Item = (&str, &str)> {
    let listed = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.sysctl().as_ref());
    listed
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.as_str(), value.as_str()))
}

/// Finds the path below /proc/sys. The first of `.` and `/` in the key separates; the other one is
/// part of a name (`net/ipv4/conf/eth0.1/forwarding`), as in sysctl(8).
fn path(key: &str) -> String {
    match key.find(['.', '/']).map(|at| key.as_bytes().get(at)) {
        Some(Some(b'.')) => key
            .chars()
            .map(|letter| match letter {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => key.to_owned(),
    }
}

fn procfs() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
}

fn write(procfs: &OwnedFd, path: &str, value: &str) -> std::io::Result<()> {
    std::fs::File::from(open(procfs, path)?).write_all(value.as_bytes())
}

fn open(procfs: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat2(
        procfs,
        format!("sys/{path}"),
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_separator_separates() {
        assert_eq!(path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding"),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding"),
            "net/ipv4/conf/eth0.1/forwarding"
        );
    }

    #[test]
    fn a_sysctl_may_name_an_interface() {
        assert_eq!(interface("net/ipv4/conf/eth0/forwarding"), Some("eth0"));
        assert_eq!(interface("net/ipv6/neigh/a.7/retrans_time"), Some("a.7"));
        assert_eq!(interface("net/ipv6/conf/all/disable_ipv6"), None);
        assert_eq!(interface("net/ipv4/neigh/default/gc_thresh1"), None);
        assert_eq!(interface("net/core/somaxconn"), None);
    }

    #[test]
    fn what_is_not_the_containers_is_refused() {
        let spec = |key: &str| -> Spec {
            serde_json::from_str(&format!(
                r#"{{"ociVersion": "1.2.0", "linux": {{"sysctl": {{"{key}": "1"}},
                    "namespaces": [{{"type": "mount"}}, {{"type": "ipc"}}]}}}}"#
            ))
            .unwrap()
        };
        let check = |key| {
            let spec = spec(key);
            check(&spec, &Namespaces::of(&spec, &[], &[]).unwrap())
        };
        for key in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max"] {
            check(key).unwrap();
        }
        for key in [
            "vm.overcommit_memory",
            "kernel.hostname",
            "kernel.domainname",
            "fs/mqueue/../file-max",
        ] {
            assert!(check(key).is_err(), "{key}");
        }
    }
}
