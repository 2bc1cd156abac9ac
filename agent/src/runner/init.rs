//! A container's init, in four parts by where they run. The order is runc's: each step still has
//! the privileges that it needs, and images rely on it.
//!
//! | Part      | Process         | Steps, in this order                                         |
//! |-----------|-----------------|--------------------------------------------------------------|
//! | `check`   | the runner's    | refuse what is wrong with the spec; nothing is made yet      |
//! | `outside` | the runner's    | device filter, OOM score, owner of the streams; the joined   |
//! |           |                 | network, its sysctls; for a user namespace: cgroup, procfs,  |
//! |           |                 | rootfs, sysfs; clocks; the other joined namespaces; birth;   |
//! |           |                 | mapping of ids                                               |
//! | `inside`  | the container's | the root's own mount, volumes; root of the user namespace;   |
//! |           |                 | session, cgroup, network, keyring; mounts, devices, working  |
//! |           |                 | directory; streams or terminal; names, sysctls; read-only    |
//! |           |                 | and hidden paths; pivot_root; hooks `createContainer`        |
//! | `last`    | the container's | open files, signals; scheduling; user, capabilities, filter; |
//! |           |                 | "ready", wait for the start; hooks `startContainer`; exec    |
//!
//! Called by `mod`.

use std::convert::Infallible;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use kata_like_failure::{Failure, Step};
use oci_spec::runtime::{LinuxNamespaceType, Process};

use super::birth::{born, note};
use super::channel::Channel;
use super::command::Command;
use super::error::Result;
use super::identity::{self, Identity};
use super::mounts::{self, Entry, Pending};
use super::namespaces::{self, Namespaces};
use super::program::Program;
use super::request::{InitRequest, START, Size};
use super::rootfs::{self, Rootfs, Target};
use super::scheduling::Scheduling;
use super::seccomp::Filter;
use super::users::{self, Gate, Users};
use super::{device_filter, devices, hide, hooks, supported, sysctl, terminal};

/// What the spec asks for, checked.
struct Plan<'a> {
    process: &'a Process,
    namespaces: Namespaces,
    users: Option<Users>,
    program: Program,
    propagation: Option<(u64, bool)>,
    /// `None`: the mounts are those of the mount namespace that is joined.
    mounts: Option<Vec<Entry<'a>>>,
}

/// What came with the request.
struct Handed<'a> {
    joined: &'a [LinuxNamespaceType],
    namespaces: Vec<OwnedFd>,
    /// Three, or none with a terminal.
    streams: Vec<OwnedFd>,
    terminal: Option<Size>,
}

/// What the container's process has from before its birth.
struct Inherited {
    gate: Gate,
    /// A sysfs that the process itself may not make.
    sysfs: Option<OwnedFd>,
}

/// Runs the whole; returns only with an error.
pub(super) fn run(
    channel: &Channel,
    request: &InitRequest,
    joined: &[LinuxNamespaceType],
    terminal: Option<Size>,
    mut fds: Vec<OwnedFd>,
) -> Result<Infallible> {
    note(channel, supported::check_container(&request.spec)?)?;
    let plan = check(request, joined)?;
    if plan.mounts.is_none() {
        let text = "root, mounts, devices and hidden paths are those of the mount namespace that is joined";
        note(channel, vec![text.into()])?;
    }
    let streams = fds.split_off(joined.len().min(fds.len()));
    let handed = Handed {
        joined,
        namespaces: fds,
        streams,
        terminal,
    };
    let inherited = outside(channel, request, &plan, &handed)?;
    // From here on in the container's own process.
    let terminal = inside(request, &plan, handed, inherited)?;
    last(channel, request, plan, terminal)
}

/// Finds what is wrong with the spec, before anything is made.
fn check<'a>(request: &'a InitRequest, joined: &[LinuxNamespaceType]) -> Result<Plan<'a>> {
    let spec = &request.spec;
    let process = spec.process().as_ref();
    let process = process.ok_or_else(|| Failure::bad("process", "is missing"))?;
    let namespaces = Namespaces::of(spec, joined, &request.guest_namespaces)?;
    let users = Users::of(spec, &namespaces)?;
    sysctl::check(spec, &namespaces)?;
    let limits = process.rlimits().as_deref().unwrap_or_default();
    let identity = Identity::of(process, process.capabilities().as_ref(), limits, "process")?;
    let scheduling = Scheduling::of(process, spec, "process")?;
    let command = Command::of(process, "process")?;
    let propagation = rootfs::propagation(spec)?;
    let filter = Filter::of(spec)?;
    let mounts = if namespaces.is_joined(LinuxNamespaceType::Mount) {
        None
    } else {
        Some(mounts::check(spec, &request.binds)?)
    };
    Ok(Plan {
        process,
        namespaces,
        users,
        program: Program {
            identity,
            scheduling,
            command,
            filter,
        },
        propagation,
        mounts,
    })
}

/// Does in the runner what can't be done from inside. Returns in the container's process only.
fn outside(
    channel: &Channel,
    request: &InitRequest,
    plan: &Plan,
    handed: &Handed,
) -> Result<Inherited> {
    let spec = &request.spec;
    let Plan { namespaces, .. } = plan;
    let cgroup = device_filter::open_cgroup(&request.cgroup)?;
    device_filter::attach(spec, cgroup.as_fd())?;
    identity::set_oom_score(plan.process.oom_score_adj().unwrap_or(0))?;
    users::own_streams(spec, &handed.streams)?;
    namespaces::join_network(handed.joined, &handed.namespaces)?;
    sysctl::apply_to_network(spec, namespaces)?;
    let (mut sysfs, mut procfs) = (None, None);
    if let Some(users) = &plan.users {
        users.delegate(cgroup.as_fd())?;
        procfs = Some(users::procfs().step(|| "open the guest's /proc")?);
        if plan.mounts.is_some() {
            users::look_into(&request.rootfs)?;
        }
        if !namespaces.is_new(LinuxNamespaceType::Network) {
            sysfs = Some(users::sysfs()?);
        }
    }
    namespaces.own_clocks(spec)?;
    namespaces::join_others(handed.joined, &handed.namespaces)?;
    let gate = Gate::new()?;
    let cloned = namespaces.spawn(cgroup.as_fd())?;
    born(channel, cloned, |pid| match (&plan.users, &procfs) {
        (Some(users), Some(procfs)) => users.map(procfs.as_fd(), pid).and_then(|()| gate.open()),
        _ => Ok(()),
    })?;
    Ok(Inherited { gate, sysfs })
}

/// Makes in the container's process what the container sees. Returns the master of its terminal.
fn inside(
    request: &InitRequest,
    plan: &Plan,
    handed: Handed,
    inherited: Inherited,
) -> Result<Option<OwnedFd>> {
    let InitRequest {
        container, spec, ..
    } = request;
    let Plan {
        namespaces, users, ..
    } = plan;
    if users.is_some() {
        inherited.gate.pass()?;
    }
    // The volumes are the agent's alone, so they are opened before the process is another user.
    let root = match &plan.mounts {
        None => None,
        Some(mounts) => {
            let rootfs = Rootfs::prepare(&request.rootfs)?;
            let sources = mounts::open_sources(mounts, &request.volumes, &request.memory)?;
            Some((rootfs, sources))
        }
    };
    if users.is_some() {
        users::become_root_around(|| namespaces.own_ipc())?;
    }
    rustix::process::setsid().step(|| "make a session of the container's own")?;
    namespaces.own_cgroup(handed.joined, &handed.namespaces)?;
    drop(handed.namespaces);
    namespaces.own_network()?;
    identity::make_keyring(container, users.is_some())?;

    // Modes are what the spec says, whatever the umask was.
    rustix::process::umask(rustix::fs::Mode::empty());
    let root = match (root, &plan.mounts) {
        (Some((rootfs, sources)), Some(mounts)) => {
            let pending = mounts::apply(mounts, namespaces, &rootfs, sources, inherited.sysfs)?;
            furnish(request, plan, &rootfs)?;
            Some((rootfs, pending))
        }
        _ => None,
    };
    let rootfs = root.as_ref().map(|(rootfs, _)| rootfs);
    let terminal = terminal::give(plan.process, handed.streams, handed.terminal, rootfs)?;
    sysctl::set_names(spec)?;
    sysctl::apply(spec, namespaces)?;
    close(request, plan, root)?;
    Ok(terminal)
}

/// Makes what is in the root beside the mounts.
fn furnish(request: &InitRequest, plan: &Plan, rootfs: &Rootfs) -> Result<()> {
    devices::apply(&request.spec, rootfs)?;
    let cwd = plan.process.cwd();
    rootfs
        .ensure(cwd, Target::Directory)
        .map(drop)
        .step(|| format!("make the working directory {cwd:?}"))
}

/// Makes the root `/`, with all that is read-only or hidden in it, and runs the hooks
/// `createContainer`.
fn close(request: &InitRequest, plan: &Plan, root: Option<(Rootfs, Pending)>) -> Result<()> {
    let InitRequest {
        container, spec, ..
    } = request;
    let rootfs = match root {
        None => None,
        Some((rootfs, pending)) => {
            pending.make_read_only()?;
            hide::apply(spec, &rootfs)?;
            rootfs.pivot()?;
            Some(rootfs)
        }
    };
    hooks::create_container(container, spec, &plan.program.identity)?;
    match rootfs {
        None => Ok(()),
        Some(rootfs) => rootfs.finish(spec, plan.propagation),
    }
}

/// Becomes the user, waits for the start and becomes the command, as that user would find it.
fn last(
    channel: &Channel,
    request: &InitRequest,
    plan: Plan,
    terminal: Option<OwnedFd>,
) -> Result<Infallible> {
    let mut program = plan.program;
    let path = program.get_ready(channel, plan.process.cwd(), terminal)?;

    // Created; nothing is left but the start.
    match channel
        .receive_byte()
        .step(|| "wait for the container's start")?
    {
        Some(START) => {}
        // The agent has given it up.
        _ => std::process::exit(1),
    }
    // It has been started: whatever fails now is the container's own end, as under runc.
    let after_start = || {
        hooks::start_container(&request.container, &request.spec)?;
        program.exec(&path)
    };
    let Err::<Infallible, _>(error) = after_start();
    let _ = writeln!(std::io::stderr(), "{}", error.one_line());
    std::process::exit(1)
}
