//! The namespaces of a container: which are new, which are another container's, and the birth in
//! them.
//!
//! Called by `init`, `exec` and `placeholder`. A container without a network of another one has the
//! guest's own, which is the pod's, unless a new user namespace is to own its network: a user
//! namespace's capabilities mean something only in a network that belongs to it. The cgroup
//! namespace is made after the birth (`own_cgroup`): its root is the cgroup of the process that
//! calls unshare. The time namespace is made before it (`own_clocks`): its offsets can be set only
//! while nobody is in it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kata_like_failure::{Failure, Step};
use kata_like_linux::clone::{Cloned, sibling};
use kata_like_linux::namespace::unshare;
use kata_like_netlink::loopback_up;
use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};
use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags, move_into_link_name_space,
    move_into_thread_name_spaces,
};

use super::error::Result;
use super::syscall;

/// From linux/sched.h; not in the libc crate.
const CLONE_NEWTIME: libc::c_int = 0x80;

/// What the spec asks for, as flags of clone(2).
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Namespaces {
    new: libc::c_int,
    joined: libc::c_int,
    listed: libc::c_int,
}

impl Namespaces {
    /// Reads the spec's list. An entry is a new namespace, unless it is one of `joined`, which are
    /// other containers', or of `guest`, which are the guest's own.
    pub(super) fn of(spec: &Spec, joined: &[Kind], guest: &[Kind]) -> Result<Self> {
        let listed = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        let mut ours = Self::default();
        let mut own_network = false;
        let mut seen = Vec::new();
        for (index, namespace) in listed.into_iter().flatten().enumerate() {
            let field = || format!("linux.namespaces[{index}]");
            let kind = namespace.typ();
            if seen.contains(&kind) {
                return Err(Failure::bad(field(), format!("a second entry for {kind}")));
            }
            seen.push(kind);
            let flag = flag(kind);
            match kind {
                _ if joined.contains(&kind) => ours.joined |= flag,
                _ if guest.contains(&kind) => {}
                Kind::Network => own_network = true,
                _ => ours.new |= flag,
            }
            ours.listed |= flag;
        }
        if !ours.is_new(Kind::Mount) && !ours.is_joined(Kind::Mount) {
            return Err(Failure::bad(
                "linux.namespaces",
                "no entry is of type mount",
            ));
        }
        if own_network && ours.is_new(Kind::User) {
            ours.new |= libc::CLONE_NEWNET;
        }
        let offsets = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.time_offsets().as_ref());
        for (clock, offset) in offsets.into_iter().flatten() {
            let field = format!("linux.timeOffsets.{clock}");
            if !ours.is_new(Kind::Time) {
                let reason = "needs a time namespace of the container's own";
                return Err(Failure::bad(field, reason));
            }
            if !matches!(clock.as_str(), "boottime" | "monotonic") {
                return Err(Failure::bad(field, "is no clock that can be set"));
            }
            if offset.nanosecs().unwrap_or(0) > 999_999_999 {
                return Err(Failure::bad(field, "a second has fewer nanoseconds"));
            }
        }
        Ok(ours)
    }

    /// Whether the container has a new namespace of this kind.
    pub(super) fn is_new(&self, kind: Kind) -> bool {
        self.new & flag(kind) != 0
    }

    /// Whether the container lives in another one's namespace of this kind.
    pub(super) fn is_joined(&self, kind: Kind) -> bool {
        self.joined & flag(kind) != 0
    }

    /// Whether the spec has an entry of this kind, new or not.
    pub(super) fn lists(&self, kind: Kind) -> bool {
        self.listed & flag(kind) != 0
    }

    /// Makes the container's process, in its new namespaces and in its cgroup from birth.
    pub(super) fn spawn(&self, cgroup: BorrowedFd<'_>) -> Result<Cloned> {
        self.clone_without(0, cgroup)
            .step(|| "make the container's process in its namespaces and cgroup")
    }

    /// Makes a process that opens a placeholder's namespaces. Those of mounts and pids are not
    /// among them.
    pub(super) fn spawn_holder(&self, cgroup: BorrowedFd<'_>) -> Result<Cloned> {
        self.clone_without(libc::CLONE_NEWNS | libc::CLONE_NEWPID, cgroup)
            .step(|| "make the pod's namespaces")
    }

    fn clone_without(&self, kinds: libc::c_int, cgroup: BorrowedFd<'_>) -> std::io::Result<Cloned> {
        let mut later = kinds | libc::CLONE_NEWCGROUP | CLONE_NEWTIME;
        if self.is_new(Kind::User) {
            later |= libc::CLONE_NEWIPC;
        }
        sibling((self.new & !later) as u64, cgroup)
    }

    /// In the container's process, as it becomes the root of a new user namespace. The queues of an
    /// IPC namespace belong to the user that makes it (ipc/mqueue.c, `mqueue_get_inode`); under
    /// runc that is a root whose group is not set yet.
    pub(super) fn own_ipc(&self) -> Result<()> {
        if !self.is_new(Kind::Ipc) || !self.is_new(Kind::User) {
            return Ok(());
        }
        unshare(UnshareFlags::NEWIPC).step(|| "make the container's IPC namespace")
    }

    /// In the runner: the process that is born next has clocks of its own.
    pub(super) fn own_clocks(&self, spec: &Spec) -> Result<()> {
        if !self.is_new(Kind::Time) {
            return Ok(());
        }
        unshare(UnshareFlags::NEWTIME).step(|| "make the container's time namespace")?;
        let offsets = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.time_offsets().as_ref());
        for (clock, offset) in offsets.into_iter().flatten() {
            let (seconds, rest) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
            std::fs::write(
                "/proc/self/timens_offsets",
                format!("{clock} {seconds} {rest}\n"),
            )
            .step(|| format!("set linux.timeOffsets.{clock} to {seconds} s, {rest} ns"))?;
        }
        Ok(())
    }

    /// In the container's process: brings the loopback interface of a network of its own up, as
    /// runc does.
    pub(super) fn own_network(&self) -> Result<()> {
        if !self.is_new(Kind::Network) {
            return Ok(());
        }
        loopback_up().step(|| "bring the loopback interface of the container's network up")
    }

    /// In the container's process: makes its cgroup the root of what it can see, or joins another
    /// container's cgroup namespace.
    pub(super) fn own_cgroup(&self, joined: &[Kind], namespaces: &[OwnedFd]) -> Result<()> {
        join(joined, namespaces, |kind| kind == Kind::Cgroup)?;
        if self.new & libc::CLONE_NEWCGROUP == 0 {
            return Ok(());
        }
        unshare(UnshareFlags::NEWCGROUP).step(|| "make the container's cgroup namespace")
    }
}

/// In the runner, first of all: joins a network. What is done to a network from outside is then
/// done to the joined one.
pub(super) fn join_network(joined: &[Kind], namespaces: &[OwnedFd]) -> Result<()> {
    join(joined, namespaces, |kind| kind == Kind::Network)
}

/// In the runner: enters the other namespaces of other containers. Those of pids and clocks count
/// for the process that is made next. From here on paths may be another container's. `own_cgroup`
/// joins that of cgroups.
///
/// The user namespace comes last: a process in it has no right to enter what does not belong to it.
pub(super) fn join_others(joined: &[Kind], namespaces: &[OwnedFd]) -> Result<()> {
    let first = |kind| !matches!(kind, Kind::Network | Kind::User | Kind::Cgroup);
    join(joined, namespaces, first)?;
    join(joined, namespaces, |kind| kind == Kind::User)
}

fn join(joined: &[Kind], namespaces: &[OwnedFd], wanted: fn(Kind) -> bool) -> Result<()> {
    if joined.len() != namespaces.len() {
        return Err(Failure::failed(
            format!("join {} namespaces", joined.len()),
            format!("{} were handed over", namespaces.len()),
        ));
    }
    let all = joined.iter().zip(namespaces);
    for (&kind, namespace) in all.filter(|(kind, _)| wanted(**kind)) {
        move_into_link_name_space(namespace.as_fd(), Some(link(kind)))
            .step(|| format!("join the {kind} namespace of another container"))?;
    }
    Ok(())
}

/// In the runner, for an exec: enters the namespaces of the container's init, except that of
/// cgroups, which would hide the cgroup that the process is to be born in. The guest's own user
/// namespace can't be entered again: `users` says whether the container has another.
pub(super) fn enter(init: BorrowedFd<'_>, users: bool) -> Result<()> {
    let mut kinds = ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::TIME;
    kinds.set(ThreadNameSpaceType::USER, users);
    move_into_thread_name_spaces(init, kinds).step(|| "join the container's namespaces")
}

/// Whether a container of this spec has a user namespace that is not the guest's.
pub fn has_users(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let listed = linux.and_then(|linux| linux.namespaces().as_ref());
    listed
        .into_iter()
        .flatten()
        .any(|it| it.typ() == Kind::User)
}

/// In the runner, before `enter`, which may take the right to do so: opens the container's cgroup
/// namespace. `None`: it is the guest's own, which the root of a user namespace could not enter
/// again.
pub(super) fn cgroup_of(init: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    let step = || "open the container's cgroup namespace";
    let theirs = syscall::cgroup_namespace(init).step(step)?;
    let own = rustix::fs::stat("/proc/self/ns/cgroup").step(step)?;
    let same = rustix::fs::fstat(&theirs).step(step)?.st_ino == own.st_ino;
    Ok((!same).then_some(theirs))
}

/// In the process of an exec: the rest of `enter`.
pub(super) fn enter_cgroup(namespace: BorrowedFd<'_>) -> Result<()> {
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::ControlGroup))
        .step(|| "join the container's cgroup namespace")
}

/// Makes a process in the caller's own namespaces, for an exec.
///
/// Once the container has handed controllers down, as systemd does, its cgroup takes no process any
/// more (cgroup-v2.rst, "No Internal Process Constraint"). Then the process is born beside the
/// init, as under runc.
pub(super) fn spawn_inside(cgroup: BorrowedFd<'_>, leaf: Option<BorrowedFd<'_>>) -> Result<Cloned> {
    let cloned = match (sibling(0, cgroup), leaf) {
        (Err(error), Some(leaf)) if error.raw_os_error() == Some(libc::EBUSY) => sibling(0, leaf),
        (cloned, _) => cloned,
    };
    cloned.step(|| "make the process in the container's cgroup")
}

/// What a link in `/proc/PID/ns` leads to.
fn link(kind: Kind) -> LinkNameSpaceType {
    match kind {
        Kind::Mount => LinkNameSpaceType::Mount,
        Kind::Cgroup => LinkNameSpaceType::ControlGroup,
        Kind::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
        Kind::Ipc => LinkNameSpaceType::InterProcessCommunication,
        Kind::Pid => LinkNameSpaceType::ProcessID,
        Kind::Network => LinkNameSpaceType::Network,
        Kind::User => LinkNameSpaceType::User,
        Kind::Time => LinkNameSpaceType::Time,
    }
}

fn flag(kind: Kind) -> libc::c_int {
    match kind {
        Kind::Mount => libc::CLONE_NEWNS,
        Kind::Cgroup => libc::CLONE_NEWCGROUP,
        Kind::Uts => libc::CLONE_NEWUTS,
        Kind::Ipc => libc::CLONE_NEWIPC,
        Kind::Pid => libc::CLONE_NEWPID,
        Kind::Network => libc::CLONE_NEWNET,
        Kind::User => libc::CLONE_NEWUSER,
        Kind::Time => CLONE_NEWTIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_like_failure::Kind as FailureKind;

    fn spec(namespaces: &str) -> Spec {
        serde_json::from_str(&format!(
            r#"{{"ociVersion": "1.2.0", "linux": {{"namespaces": {namespaces}}}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn new_and_shared_namespaces_are_told_apart() {
        let spec = spec(
            r#"[{"type": "mount"}, {"type": "pid"}, {"type": "ipc"},
                {"type": "uts"}, {"type": "network"}]"#,
        );
        let namespaces = Namespaces::of(&spec, &[Kind::Ipc], &[Kind::Uts]).unwrap();
        assert_eq!(namespaces.new, libc::CLONE_NEWNS | libc::CLONE_NEWPID);
        assert!(namespaces.is_new(Kind::Pid));
        assert!(!namespaces.is_new(Kind::Ipc));
        assert!(namespaces.is_joined(Kind::Ipc));
        assert!(namespaces.lists(Kind::Uts) && !namespaces.is_new(Kind::Uts));
    }

    #[test]
    fn a_network_of_its_own_comes_only_with_users_of_its_own() {
        let own = |namespaces: &str, joined: &[Kind], guest: &[Kind]| {
            let spec = spec(&format!(r#"[{{"type": "mount"}}, {namespaces}]"#));
            let namespaces = Namespaces::of(&spec, joined, guest);
            namespaces.unwrap().is_new(Kind::Network)
        };
        let both = r#"{"type": "network"}, {"type": "user"}"#;
        assert!(own(both, &[], &[]));
        assert!(own(r#"{"type": "user"}, {"type": "network"}"#, &[], &[]));
        assert!(!own(r#"{"type": "network"}"#, &[], &[]));
        assert!(!own(both, &[], &[Kind::Network]));
        assert!(!own(both, &[Kind::User], &[]));
    }

    #[test]
    fn none_of_mounts_and_two_of_a_kind_are_refused() {
        let none = spec(r#"[{"type": "pid"}]"#);
        let kind_of = |spec| Namespaces::of(spec, &[], &[]).unwrap_err().kind();
        assert_eq!(kind_of(&none), FailureKind::BadRequest);
        let twice = spec(r#"[{"type": "mount"}, {"type": "mount"}]"#);
        assert_eq!(kind_of(&twice), FailureKind::BadRequest);
    }
}
