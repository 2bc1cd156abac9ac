//! A further process in a running container, in runc's order.
//!
//! Called by `mod`. The container is joined by its init's pidfd, so that no reused pid can be
//! mistaken for it. The process's own object wins. Where it is silent about capabilities and
//! limits, those of the container's spec hold. The seccomp filter is always that of the spec.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};

use kata_like_failure::{Failure, Step};

use super::birth::{born, note};
use super::channel::Channel;
use super::command::Command;
use super::error::Result;
use super::identity::{self, Identity};
use super::program::Program;
use super::request::{ExecRequest, Size};
use super::scheduling::Scheduling;
use super::seccomp::Filter;
use super::{device_filter, namespaces, supported, terminal, users};

/// What the process's own object and the container's spec ask for, checked.
struct Plan {
    program: Program,
    oom_score: i32,
}

/// Runs the process; returns only with an error.
pub(super) fn run(
    channel: &Channel,
    request: &ExecRequest,
    terminal: Option<Size>,
    mut fds: Vec<OwnedFd>,
) -> Result<Infallible> {
    let ExecRequest { spec, process, .. } = request;
    note(channel, supported::check_process("process", process)?)?;
    if fds.is_empty() {
        let why = "no pidfd of its init came along";
        return Err(Failure::failed("join the container", why));
    }
    let init = fds.remove(0);
    users::own_streams(spec, &fds)?;
    let Plan {
        mut program,
        oom_score,
    } = check(request)?;

    let cgroup = device_filter::open_cgroup(&request.cgroup)?;
    // If it is missing, that matters only where it is needed.
    let leaf = device_filter::open_cgroup(&request.cgroup_of_init).ok();
    identity::set_oom_score(oom_score)?;
    let cgroup_namespace = namespaces::cgroup_of(init.as_fd())?;
    namespaces::enter(init.as_fd(), namespaces::has_users(spec))?;
    let cloned = namespaces::spawn_inside(cgroup.as_fd(), leaf.as_ref().map(AsFd::as_fd))?;
    born(channel, cloned, |_| Ok(()))?;

    // From here on in the container's own process.
    drop((cgroup, leaf, init));
    rustix::process::setsid().step(|| "make a session of the process's own")?;
    if let Some(namespace) = cgroup_namespace {
        namespaces::enter_cgroup(namespace.as_fd())?;
    }
    if namespaces::has_users(spec) {
        users::become_root()?;
    }
    identity::join_keyring(&request.container)?;
    let terminal = terminal::give(process, fds, terminal, None)?;
    let path = program.get_ready(channel, process.cwd(), terminal)?;
    program.exec(&path)
}

/// Finds what is wrong with the request, before anything is made.
fn check(request: &ExecRequest) -> Result<Plan> {
    let ExecRequest { spec, process, .. } = request;
    let own = spec.process().as_ref();
    let capabilities = process.capabilities().as_ref();
    let capabilities = capabilities.or_else(|| own.and_then(|own| own.capabilities().as_ref()));
    let limits = process
        .rlimits()
        .as_deref()
        .filter(|limits| !limits.is_empty());
    let limits = limits.or_else(|| own.and_then(|own| own.rlimits().as_deref()));
    let score = process.oom_score_adj();
    let score = score.or_else(|| own.and_then(|own| own.oom_score_adj()));
    let program = Program {
        identity: Identity::of(process, capabilities, limits.unwrap_or_default(), "process")?,
        scheduling: Scheduling::of(process, spec, "process")?,
        command: Command::of(process, "process")?,
        filter: Filter::of(spec)?,
    };
    Ok(Plan {
        program,
        oom_score: score.unwrap_or(0),
    })
}
