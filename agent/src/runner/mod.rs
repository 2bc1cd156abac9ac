//! The OCI runner: applies a spec to a container's init, and to every further process alike.
//!
//! `container.rs` calls `create` and `exec`. Each starts the agent's own binary anew as a process with one
//! thread, which `main` takes over: it prepares what can be prepared outside, makes the container's process
//! in its namespaces and cgroup, and ends; that process does the rest to itself and becomes the command.
//! The order is runc's, since whatever privileges a step needs must still be there, and images rely on it.
//!
//! What must hold: no step resolves a path of the container outside its root; nothing of the agent's, no
//! file descriptor, keyring, signal mask or score, is left in the command; what the spec asks for and is not
//! done is an error that names the field. Deliberately absent: the limits of the cgroup (`cgroup.rs`), and
//! whoever waits for an exit (`reaper.rs`).

mod channel;
mod client;
mod command;
mod copy_up;
mod device_filter;
mod devices;
mod error;
mod exec;
mod hide;
mod hooks;
mod identity;
mod mounts;
mod namespaces;
mod options;
mod placeholder;
mod request;
mod rootfs;
mod scheduling;
mod seccomp;
mod support;
mod syscall;
mod sysctl;
mod terminal;
#[cfg(test)]
mod tests;
mod users;

use std::convert::Infallible;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use kata_like_failure::{Failure, Step};
use oci_spec::runtime::{LinuxNamespaceType, Process};

pub use client::{Start, create, exec, first_process, hold_in_users};
pub use namespaces::has_users;
pub use placeholder::{PAUSE, hold, pause};
pub use request::{ExecRequest, InitRequest, Joined, PlaceholderRequest, Stdio};

use channel::Channel;
use command::Command;
use error::{Result, Told};
use identity::Identity;
use namespaces::Namespaces;
use request::{Message, Request, START, Size};
use rootfs::{Rootfs, Target};
use scheduling::Scheduling;
use seccomp::Filter;
use syscall::Cloned;
use terminal::Terminal;
use users::{Gate, Users};

/// The entry point of the re-executed binary; its standard input is the channel to the agent.
pub fn main() -> ! {
    let channel = match take_channel() {
        Ok(channel) => channel,
        Err(error) => {
            eprintln!("runner: {}", error.one_line());
            std::process::exit(1);
        }
    };
    let Err(error) = serve(&channel);
    // If nobody listens any more, there is nobody to tell.
    let error = Told::from(&error);
    let _ = channel.send(&Message::Failed { error }, &[]);
    std::process::exit(1);
}

fn serve(channel: &Channel) -> Result<Infallible> {
    // What this process is made of is not to be looked into from a container that it joins.
    syscall::prctl(libc::PR_SET_DUMPABLE, 0).step(|| "make the runner undumpable")?;
    let (request, fds) = channel.receive_request()?;
    match request {
        Request::Init {
            request,
            joined,
            terminal,
        } => init(channel, &request, &joined, terminal, fds),
        Request::Placeholder { request, joined } => {
            placeholder::run(channel, &request, &joined, &fds)
        }
        Request::Hold { request, joined } => {
            placeholder::hold_in_users(channel, &request, &joined, &fds)
        }
        Request::Exec { request, terminal } => exec::run(channel, &request, terminal, fds),
    }
}

/// A container's init, from its request to its command.
fn init(
    channel: &Channel,
    request: &InitRequest,
    joined: &[LinuxNamespaceType],
    terminal: Option<Size>,
    mut fds: Vec<OwnedFd>,
) -> Result<Infallible> {
    let InitRequest {
        container,
        spec,
        rootfs,
        volumes,
        memory,
        cgroup,
    } = request;

    // What is wrong with the spec is found before anything is made.
    note(channel, support::check_container(spec)?)?;
    let process = process(request)?;
    let namespaces = Namespaces::of(spec, joined)?;
    let users = Users::of(spec, &namespaces)?;
    sysctl::check(spec, &namespaces)?;
    let limits = process.rlimits().as_deref().unwrap_or_default();
    let identity = Identity::of(process, process.capabilities().as_ref(), limits, "process")?;
    let scheduling = Scheduling::of(process, spec, "process")?;
    let mut command = Command::of(process, "process")?;
    let propagation = rootfs::propagation(spec)?;
    let profile = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref());
    let filter = profile.map(Filter::compile).transpose()?;

    // The birth.
    let cgroup = device_filter::open_cgroup(cgroup)?;
    device_filter::attach(spec, cgroup.as_fd())?;
    identity::set_oom_score(process.oom_score_adj().unwrap_or(0))?;
    let streams = fds.split_off(joined.len().min(fds.len()));
    users::own_streams(spec, &streams)?;
    namespaces::join_network(joined, &fds)?;
    sysctl::apply_to_network(spec, &namespaces)?;
    let shares_mounts = namespaces.is_joined(LinuxNamespaceType::Mount);
    let (mut sysfs, mut procfs) = (None, None);
    if let Some(users) = &users {
        users.delegate(cgroup.as_fd())?;
        procfs = Some(users::procfs().step(|| "open the guest's /proc")?);
        if !shares_mounts {
            users::look_into(rootfs)?;
        }
        if !namespaces.is_new(LinuxNamespaceType::Network) {
            sysfs = Some(users::sysfs()?);
        }
    }
    namespaces.own_clocks(spec)?;
    namespaces::join_others(joined, &fds)?;
    let gate = Gate::new()?;
    let cloned = namespaces.spawn(cgroup.as_fd())?;
    born(channel, cloned, |pid| match (&users, &procfs) {
        (Some(users), Some(procfs)) => users.map(procfs.as_fd(), pid).and_then(|()| gate.open()),
        _ => Ok(()),
    })?;

    // From here on in the container's own process.
    drop((cgroup, procfs));
    if users.is_some() {
        gate.pass()?;
    }
    let files = match shares_mounts {
        true => None,
        false => {
            let rootfs = Rootfs::prepare(rootfs)?;
            Some((rootfs, mounts::open_sources(spec, [volumes, memory])?))
        }
    };
    if users.is_some() {
        users::become_root_around(|| namespaces.own_ipc())?;
    }
    rustix::process::setsid().step(|| "make a session of the container's own")?;
    namespaces.own_cgroup(joined, &fds)?;
    drop(fds);
    namespaces.own_network()?;
    identity::make_keyring(container, users.is_some())?;

    // What is in its root, unless that is another's. Modes are what the spec says, whatever the umask was.
    rustix::process::umask(rustix::fs::Mode::empty());
    let files = match files {
        None => None,
        Some((rootfs, sources)) => {
            let pending = mounts::apply(spec, &namespaces, &rootfs, sources, sysfs)?;
            devices::apply(spec, &rootfs)?;
            rootfs
                .ensure(process.cwd(), Target::Directory)
                .step(|| format!("make the working directory {:?}", process.cwd()))?;
            Some((rootfs, pending))
        }
    };
    let terminal = match terminal {
        None => {
            take_streams(streams)?;
            None
        }
        Some(size) => {
            let terminal = match &files {
                None => Terminal::of_root()?,
                Some((rootfs, _)) => {
                    let terminal = Terminal::of_rootfs(rootfs)?;
                    terminal.bind_console(rootfs)?;
                    terminal
                }
            };
            terminal.take(process, size)?;
            Some(terminal.master)
        }
    };
    sysctl::set_names(spec)?;
    sysctl::apply(spec, &namespaces)?;
    let rootfs = match files {
        None => None,
        Some((rootfs, pending)) => {
            pending.make_read_only()?;
            hide::apply(spec, &rootfs)?;
            rootfs.pivot()?;
            Some(rootfs)
        }
    };
    hooks::create_container(container, spec, &identity)?;
    if let Some(rootfs) = rootfs {
        rootfs.finish(spec, propagation)?;
    }

    // Its user, and its command as that user would find it.
    command.set_home(identity.uid);
    prepare_exec()?;
    scheduling.apply()?;
    identity.assume(filter.as_ref(), process.cwd())?;
    let path = command.find()?;
    let terminal: Vec<_> = terminal.iter().map(AsFd::as_fd).collect();
    channel.send(&Message::Ready, &terminal)?;

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
    let last_steps = || {
        hooks::start_container(container, spec)?;
        if let Some(filter) = filter.filter(|_| identity.loads_filter_last()) {
            filter.load()?;
        }
        command.run(&path)
    };
    let Err::<Infallible, _>(error) = last_steps();
    let _ = writeln!(std::io::stderr(), "{}", error.one_line());
    std::process::exit(1)
}

fn process(request: &InitRequest) -> Result<&Process> {
    let process = request.spec.process().as_ref();
    process.ok_or_else(|| Failure::bad("process", "is missing"))
}

/// Our channel, out of the way of the standard streams.
fn take_channel() -> Result<Channel> {
    let step = || "take over the channel to the agent";
    let channel = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).step(step)?;
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .step(step)?;
    rustix::stdio::dup2_stdin(&null).step(step)?;
    Ok(Channel::from_fd(channel))
}

/// Goes on in the new process; the runner does what is to be done from outside, tells the agent and ends.
fn born(channel: &Channel, cloned: Cloned, outside: impl FnOnce(u32) -> Result<()>) -> Result<()> {
    match cloned {
        Cloned::Child => Ok(()),
        Cloned::Parent(pid, pidfd) => {
            let told = channel.send(&Message::Spawned { pid }, &[pidfd.as_fd()]);
            outside(pid)?;
            std::process::exit(i32::from(told.is_err()));
        }
    }
}

fn note(channel: &Channel, notes: Vec<String>) -> Result<()> {
    notes
        .into_iter()
        .try_for_each(|text| channel.send(&Message::Note { text }, &[]))
}

/// The three standard streams.
fn take_streams(streams: Vec<OwnedFd>) -> Result<()> {
    let step = || "take over the standard streams";
    let Ok([stdin, stdout, stderr]) = <[OwnedFd; 3]>::try_from(streams) else {
        return Err(Failure::failed(step(), "there must be three"));
    };
    rustix::stdio::dup2_stdin(&stdin).step(step)?;
    rustix::stdio::dup2_stdout(&stdout).step(step)?;
    rustix::stdio::dup2_stderr(&stderr).step(step)
}

/// What exec(2) would otherwise keep: open files, ignored and blocked signals.
fn prepare_exec() -> Result<()> {
    syscall::close_on_exec_from(3).step(|| "close the runner's files at exec")?;
    syscall::reset_signals().step(|| "reset the signals")
}
