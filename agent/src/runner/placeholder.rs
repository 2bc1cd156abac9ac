//! The namespaces of a pod's placeholder, and the first process of its PID namespace.
//!
//! The agent calls `hold` when it makes a placeholder. That costs no process: namespaces are open
//! files. Only a user namespace can't be made by one thread of many. Then a process makes all
//! namespaces and ends (`client`, `hold_in_users`).
//!
//! The agent calls `first_process` (`client`) when another container joins the PID namespace, which
//! ends with its first process. That process has the user and the limits of the spec, no capability
//! and an empty root. It reaps orphans, and ends as the usual pause program does.

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use kata_like_failure::{Failure, Step};
use kata_like_linux::clone::sibling;
use kata_like_linux::namespace::unshare;
use kata_like_spec::{JOINED_NAMESPACE, PAUSE_CLOCKS};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, UnmountFlags,
    fsconfig_create, fsmount, fsopen, mount_change, unmount,
};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::UnshareFlags;

use super::birth::{born, note, prepare_exec};
use super::channel::Channel;
use super::error::Result;
use super::identity::{self, Identity};
use super::namespaces::{self, Namespaces};
use super::request::{Joined, Message, PlaceholderRequest};
use super::rootfs::attach;
use super::users::{self, Gate, Users};
use super::{device_filter, supported, sysctl};

/// The name of the first process, in `ps` and as its argument.
pub const PAUSE: &str = "/pause";
const PAUSE_ARGUMENT: &CStr = c"/pause";

/// Any directory of the guest. Only the process sees what is mounted there, and for a moment.
const SPOT: &str = "/run";

/// Makes the namespaces that the spec asks for, with the names and sysctls that it sets in them.
/// The PID namespace is among them only if it is not a new one.
pub fn hold(
    request: &PlaceholderRequest,
    joined: Vec<Joined>,
) -> Result<Vec<(Kind, OwnedFd)>, Failure> {
    let spec = &request.spec;
    for text in supported::check_container(spec)? {
        log::warn!("container {}: {text}", request.container);
    }
    let kinds: Vec<_> = joined.iter().map(|joined| joined.kind).collect();
    let namespaces = check(request, &kinds)?;
    let make = || make(spec, &namespaces, joined);
    // Namespaces belong to a thread, and this one ends with the work.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, make);
        let thread = thread.step(|| "start a thread for the pod's namespaces")?;
        let ended = thread.join();
        ended.unwrap_or_else(|_| Err(Failure::failed("make the pod's namespaces", "it panicked")))
    })
}

fn check(request: &PlaceholderRequest, joined: &[Kind]) -> Result<Namespaces> {
    let namespaces = Namespaces::of(&request.spec, joined, &request.guest_namespaces)?;
    if joined.contains(&Kind::Cgroup) {
        let why = "a container that runs nothing sees no cgroups";
        return Err(JOINED_NAMESPACE.because("linux.namespaces[cgroup].path", why));
    }
    // It would have to be there before the others, and only processes that are still to come could
    // be in it.
    if namespaces.is_new(Kind::Time) {
        return Err(PAUSE_CLOCKS.of("linux.namespaces"));
    }
    sysctl::check(&request.spec, &namespaces)?;
    Ok(namespaces)
}

/// Lists what is kept, and the name of each in /proc/PID/ns.
pub(super) fn kept(spec: &Spec, namespaces: &Namespaces) -> Vec<(Kind, &'static str)> {
    let mut kept = vec![
        (Kind::Ipc, "ipc"),
        (Kind::Uts, "uts"),
        (Kind::Network, "net"),
    ];
    if !namespaces.is_new(Kind::Pid) {
        kept.push((Kind::Pid, "pid_for_children"));
    }
    if namespaces::has_users(spec) {
        kept.push((Kind::User, "user"));
    }
    kept
}

fn make(spec: &Spec, namespaces: &Namespaces, joined: Vec<Joined>) -> Result<Vec<(Kind, OwnedFd)>> {
    let mut new = UnshareFlags::empty();
    for (kind, flag) in [
        (Kind::Ipc, UnshareFlags::NEWIPC),
        (Kind::Uts, UnshareFlags::NEWUTS),
    ] {
        new.set(flag, namespaces.is_new(kind));
    }
    unshare(new).step(|| "make the pod's namespaces")?;
    let (kinds, joined): (Vec<_>, Vec<_>) = joined
        .into_iter()
        .map(|joined| (joined.kind, joined.namespace))
        .unzip();
    namespaces::join_network(&kinds, &joined)?;
    namespaces::join_others(&kinds, &joined)?;
    sysctl::set_names(spec)?;
    sysctl::apply_to_network(spec, namespaces)?;
    sysctl::apply(spec, namespaces)?;
    open(&kept(spec, namespaces))
}

fn open(kept: &[(Kind, &str)]) -> Result<Vec<(Kind, OwnedFd)>> {
    let open = |&(kind, name): &(Kind, &str)| {
        let file = File::open(format!("/proc/thread-self/ns/{name}"));
        let file = file.step(|| format!("keep the pod's {kind} namespace"))?;
        Ok((kind, file.into()))
    };
    kept.iter().map(open).collect()
}

/// In a runner: makes the namespaces that a user namespace is to own, and sends them in the order
/// of `kept`.
pub(super) fn hold_in_users(
    channel: &Channel,
    request: &PlaceholderRequest,
    joined: &[Kind],
    fds: &[OwnedFd],
) -> Result<Infallible> {
    let PlaceholderRequest { spec, cgroup, .. } = request;
    note(channel, supported::check_container(spec)?)?;
    let namespaces = check(request, joined)?;
    let users = Users::of(spec, &namespaces)?;
    let users = users.ok_or_else(|| Failure::failed("make the pod's users", "it has none"))?;
    let cgroup = device_filter::open_cgroup(cgroup)?;
    namespaces::join_network(joined, fds)?;
    sysctl::apply_to_network(spec, &namespaces)?;
    namespaces::join_others(joined, fds)?;
    let procfs = users::procfs().step(|| "open the guest's /proc")?;
    let gate = Gate::new()?;
    let cloned = namespaces.spawn_holder(cgroup.as_fd())?;
    born(channel, cloned, |pid| {
        users.map(procfs.as_fd(), pid).and_then(|()| gate.open())
    })?;

    // From here on in a process that is in them.
    gate.pass()?;
    users::become_root_around(|| namespaces.own_ipc())?;
    namespaces.own_network()?;
    sysctl::set_names(spec)?;
    sysctl::apply_through(spec, &namespaces, users::procfs)?;
    let held = open(&kept(spec, &namespaces))?;
    let held: Vec<_> = held.iter().map(|(_, file)| file.as_fd()).collect();
    channel.send(&Message::Ready, &held)?;
    std::process::exit(0)
}

/// In a runner: makes the first process. `joined` are the namespaces that `hold` has made.
pub(super) fn run(
    channel: &Channel,
    request: &PlaceholderRequest,
    joined: &[Kind],
    namespaces: &[OwnedFd],
) -> Result<Infallible> {
    let PlaceholderRequest {
        container,
        spec,
        cgroup,
        ..
    } = request;
    let process = spec.process().as_ref();
    let process = process.ok_or_else(|| Failure::bad("process", "is missing"))?;
    note(channel, supported::check_process("process", process)?)?;
    let limits = process.rlimits().as_deref().unwrap_or_default();
    // It needs no capability, unlike what the usual pause program is given.
    let identity = Identity::of(process, None, limits, "process")?;
    let step = || "open the agent's own program";
    let program = rustix::fs::open("/proc/self/exe", OFlags::CLOEXEC, Mode::empty()).step(step)?;
    let cgroup = device_filter::open_cgroup(cgroup)?;
    identity::set_oom_score(process.oom_score_adj().unwrap_or(0))?;
    namespaces::join_network(joined, namespaces)?;
    namespaces::join_others(joined, namespaces)?;
    let kinds = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    let cloned = sibling(kinds as u64, cgroup.as_fd());
    born(
        channel,
        cloned.step(|| "make the first process of the pod")?,
        |_| Ok(()),
    )?;

    // From here on in the process itself.
    drop(cgroup);
    let users = namespaces::has_users(spec);
    if users {
        users::become_root()?;
    }
    rustix::process::setsid().step(|| "make a session of its own")?;
    identity::make_keyring(container, users)?;
    empty_root().step(|| "give it an empty root")?;
    rustix::stdio::dup2_stdout(rustix::stdio::stdin()).step(|| "give it no stdout")?;
    rustix::stdio::dup2_stderr(rustix::stdio::stdin()).step(|| "give it no stderr")?;
    prepare_exec()?;
    // Signals from now on stay pending until `pause` waits for them.
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None).step(|| "block its signals")?;
    identity.assume(None, Path::new("/"))?;
    channel.send(&Message::Ready, &[])?;
    match nix::unistd::fexecve(program, &[PAUSE_ARGUMENT], &[] as &[&CStr]) {
        // A build with a loader, which is not in the empty root: the process goes on as it is.
        Err(nix::errno::Errno::ENOENT) => {
            // The runner that told of this process has a copy of the channel, and `pause` needs
            // nothing.
            let _ = kata_like_linux::fd::close(3..=u32::MAX);
            pause()
        }
        result => result.step(|| "run it"),
    }
}

/// Replaces the guest's root by an empty file system that can't be written to.
fn empty_root() -> rustix::io::Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let spot = rustix::fs::openat(CWD, SPOT, flags, Mode::empty())?;
    attach(root.as_fd(), spot.as_fd())?;
    rustix::process::fchdir(&root)?;
    // The old root lands on the new one, and is unmounted.
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)
}

/// The first process itself: reaps, and ends by SIGINT and SIGTERM.
pub fn pause() -> ! {
    // Nobody may look into its memory. If this fails, there is nobody to tell.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    // Run by a descriptor, it has the name of the file.
    let _ = rustix::thread::set_name(c"pause");
    let signals = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM]);
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => reap(),
            Ok(_) => std::process::exit(0),
            Err(_) => std::process::exit(1),
        }
    }
}

fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}
