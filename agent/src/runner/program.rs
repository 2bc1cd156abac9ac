//! What a new process becomes at last: a user, and the command as that user finds it.
//!
//! Called by `init` and `exec`. Nothing else is left to do then but the start.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::birth::prepare_exec;
use super::channel::Channel;
use super::command::Command;
use super::error::Result;
use super::identity::Identity;
use super::request::Message;
use super::scheduling::Scheduling;
use super::seccomp::Filter;

/// Checked, and not applied yet.
pub(super) struct Program {
    pub(super) identity: Identity,
    pub(super) scheduling: Scheduling,
    pub(super) command: Command,
    pub(super) filter: Option<Filter>,
}

impl Program {
    /// Becomes the user in `cwd`, finds the command and tells the agent, which gets the terminal's
    /// master. Returns the command's path.
    pub(super) fn get_ready(
        &mut self,
        channel: &Channel,
        cwd: &Path,
        terminal: Option<OwnedFd>,
    ) -> Result<CString> {
        self.command.set_home(self.identity.uid);
        prepare_exec()?;
        self.scheduling.apply()?;
        self.identity.assume(self.filter.as_ref(), cwd)?;
        let path = self.command.find()?;
        let terminal: Vec<_> = terminal.iter().map(AsFd::as_fd).collect();
        channel.send(&Message::Ready, &terminal)?;
        Ok(path)
    }

    /// Becomes the command. A filter that needs no privilege is loaded last, so that it meets none
    /// of our own calls but execve(2).
    pub(super) fn exec(self, path: &CString) -> Result<Infallible> {
        let last = self.identity.loads_filter_last();
        if let Some(filter) = self.filter.filter(|_| last) {
            filter.load()?;
        }
        self.command.run(path)
    }
}
