//! What every process that a runner makes goes through: birth, notes, exec.
//!
//! Called by `init`, `exec` and `placeholder`.

use std::os::fd::AsFd;

use kata_like_failure::Step;
use kata_like_linux::clone::Cloned;
use kata_like_linux::fd::close_at_exec;
use kata_like_linux::signal;

use super::channel::Channel;
use super::error::Result;
use super::request::Message;

/// Returns in the new process. The runner tells the agent, does what is left to do from `outside`,
/// and ends.
pub(super) fn born(
    channel: &Channel,
    cloned: Cloned,
    outside: impl FnOnce(u32) -> Result<()>,
) -> Result<()> {
    match cloned {
        Cloned::Child => Ok(()),
        Cloned::Parent { pid, pidfd } => {
            let told = channel.send(&Message::Spawned { pid }, &[pidfd.as_fd()]);
            outside(pid)?;
            std::process::exit(i32::from(told.is_err()));
        }
    }
}

/// Tells the agent which fields have no effect here.
pub(super) fn note(channel: &Channel, notes: Vec<String>) -> Result<()> {
    notes
        .into_iter()
        .try_for_each(|text| channel.send(&Message::Note { text }, &[]))
}

/// Clears what exec(2) would keep: open files, ignored and blocked signals.
pub(super) fn prepare_exec() -> Result<()> {
    close_at_exec(3).step(|| "close the runner's files at exec")?;
    signal::reset().step(|| "reset the signals")
}
