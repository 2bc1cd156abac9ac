//! System calls that take numbers and nothing else.
//!
//! One list, so that one argument holds for all of them: the kernel is given no address, so none of
//! them reads or writes memory of ours. What they do to descriptors and processes is for the
//! modules here that call them to answer for.

use std::io;

use libc::{c_int, c_long, c_uint};

/// A system call and its arguments.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// close_range(2).
    CloseRange {
        first: c_uint,
        last: c_uint,
        flags: c_uint,
    },
    /// dup3(2) without flags: the copy stays open when the process runs another program.
    Duplicate { from: c_int, to: c_int },
    /// unshare(2) with `CLONE_…` flags.
    Unshare(c_int),
    /// tgkill(2).
    SignalThread {
        process: c_int,
        thread: c_int,
        signal: c_int,
    },
    /// landlock_create_ruleset(2) with LANDLOCK_CREATE_RULESET_VERSION: no structure.
    LandlockVersion,
    /// landlock_restrict_self(2).
    LandlockRestrict { ruleset: c_int },
    /// exit_group(2).
    Exit(c_int),
}

impl Call {
    /// Makes the call.
    pub(crate) fn make(self) -> io::Result<()> {
        self.answer().map(drop)
    }

    /// Makes the call, and returns what it returns.
    pub(crate) fn answer(self) -> io::Result<c_long> {
        let (number, [first, second, third]): (c_long, [c_long; 3]) = match self {
            Self::CloseRange { first, last, flags } => (
                libc::SYS_close_range,
                [first.into(), last.into(), flags.into()],
            ),
            Self::Duplicate { from, to } => (libc::SYS_dup3, [from.into(), to.into(), 0]),
            Self::Unshare(kinds) => (libc::SYS_unshare, [kinds.into(), 0, 0]),
            Self::SignalThread {
                process,
                thread,
                signal,
            } => (
                libc::SYS_tgkill,
                [process.into(), thread.into(), signal.into()],
            ),
            Self::LandlockVersion => (libc::SYS_landlock_create_ruleset, [0, 0, 1]),
            Self::LandlockRestrict { ruleset } => {
                (libc::SYS_landlock_restrict_self, [ruleset.into(), 0, 0])
            }
            Self::Exit(status) => (libc::SYS_exit_group, [status.into(), 0, 0]),
        };
        // SAFETY: each call of the list above takes integers only, three at most, so whatever their
        // values, the kernel touches no memory of this process.
        match unsafe { libc::syscall(number, first, second, third) } {
            -1 => Err(io::Error::last_os_error()),
            answer => Ok(answer),
        }
    }
}
