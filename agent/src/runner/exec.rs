//! A further process in a running container, in runc's order.
//!
//! Called by `mod`. The container is joined by its init's pidfd, so that no reused pid can be mistaken for
//! it. What the process's own object says wins; where it is silent about capabilities and limits, those of
//! the container's spec hold, and the seccomp filter is always that of the spec.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};

use kata_like_failure::{Failure, Step};

use super::channel::Channel;
use super::command::Command;
use super::error::Result;
use super::identity::{self, Identity};
use super::request::{ExecRequest, Message, Size};
use super::scheduling::Scheduling;
use super::seccomp::Filter;
use super::terminal::Terminal;
use super::{born, device_filter, namespaces, support, users};

/// Runs the process; returns only with an error.
pub(super) fn run(
    channel: &Channel,
    request: &ExecRequest,
    terminal: Option<Size>,
    mut fds: Vec<OwnedFd>,
) -> Result<Infallible> {
    let ExecRequest {
        container,
        spec,
        process,
        cgroup,
        cgroup_of_init,
    } = request;
    super::note(channel, support::check_process("process", process)?)?;
    if fds.is_empty() {
        return Err(Failure::failed(
            "join the container",
            "no pidfd of its init came along",
        ));
    }
    let init = fds.remove(0);
    users::own_streams(spec, &fds)?;
    let own = spec.process().as_ref();
    let capabilities = process.capabilities().as_ref();
    let capabilities = capabilities.or_else(|| own.and_then(|own| own.capabilities().as_ref()));
    let limits = process
        .rlimits()
        .as_deref()
        .filter(|limits| !limits.is_empty());
    let limits = limits.or_else(|| own.and_then(|own| own.rlimits().as_deref()));
    let identity = Identity::of(process, capabilities, limits.unwrap_or_default(), "process")?;
    let scheduling = Scheduling::of(process, spec, "process")?;
    let mut command = Command::of(process, "process")?;
    let profile = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref());
    let filter = profile.map(Filter::compile).transpose()?;
    let score = process
        .oom_score_adj()
        .or_else(|| own.and_then(|own| own.oom_score_adj()));

    let cgroup = device_filter::open_cgroup(cgroup)?;
    // Only where it is needed does it matter that it was there.
    let leaf = device_filter::open_cgroup(cgroup_of_init).ok();
    identity::set_oom_score(score.unwrap_or(0))?;
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
    identity::join_keyring(container)?;
    let terminal = match terminal {
        None => {
            super::take_streams(fds)?;
            None
        }
        Some(size) => {
            let terminal = Terminal::of_root()?;
            terminal.take(process, size)?;
            Some(terminal.master)
        }
    };
    command.set_home(identity.uid);
    super::prepare_exec()?;
    scheduling.apply()?;
    identity.assume(filter.as_ref(), process.cwd())?;
    let path = command.find()?;
    let terminal: Vec<_> = terminal.iter().map(AsFd::as_fd).collect();
    channel.send(&Message::Ready, &terminal)?;
    if let Some(filter) = filter.filter(|_| identity.loads_filter_last()) {
        filter.load()?;
    }
    command.run(&path)
}
