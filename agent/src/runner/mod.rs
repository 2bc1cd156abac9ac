//! The OCI runner: applies a spec to a container's init, and to every further process.
//!
//! `container/` calls `create` and `exec`. Each starts the agent's own binary again, as a process
//! with one thread, which `main` takes over. That process, the runner, prepares what it can from
//! outside, makes the container's process in its namespaces and cgroup, and ends. The new process
//! does the rest to itself and becomes the command.
//!
//! What must hold: no step resolves a path of the container outside its root. The command keeps
//! nothing of the agent's: no file descriptor, keyring, signal mask or score. A field of the spec
//! that is not applied is an error that names it. Not here: the limits of the cgroup (`cgroup.rs`),
//! and the wait for an exit (`reaper.rs`).

mod birth;
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
mod init;
mod mounts;
mod namespaces;
mod options;
mod placeholder;
mod program;
mod request;
mod rootfs;
mod scheduling;
mod seccomp;
mod supported;
mod syscall;
mod sysctl;
mod terminal;
#[cfg(test)]
mod tests;
mod users;

use std::convert::Infallible;

use kata_like_failure::Step;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

pub use client::{Start, create, exec, first_process, hold_in_users};
pub use namespaces::has_users;
pub use placeholder::{PAUSE, hold, pause};
pub use request::{Bind, ExecRequest, InitRequest, Joined, PlaceholderRequest, Stdio};
pub use sysctl::apply_to_guest_network;

use channel::Channel;
use error::{Result, Told};
use request::{Message, Request};

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
    // A container that the runner joins must not look into the memory of this process.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).step(|| "make the runner undumpable")?;
    let (request, fds) = channel.receive_request()?;
    match request {
        Request::Init {
            request,
            joined,
            terminal,
        } => init::run(channel, &request, &joined, terminal, fds),
        Request::Placeholder { request, joined } => {
            placeholder::run(channel, &request, &joined, &fds)
        }
        Request::Hold { request, joined } => {
            placeholder::hold_in_users(channel, &request, &joined, &fds)
        }
        Request::Exec { request, terminal } => exec::run(channel, &request, terminal, fds),
    }
}

/// Moves our channel out of the way of the standard streams.
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
