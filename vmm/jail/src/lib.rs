//! What a process of a pod gives up before it meets the guest.
//!
//! Called by vmm and fsd, each once, before they have a second thread. Every step succeeds or
//! returns an error that names it. The caller then ends: nothing runs half jailed.
//!
//! The order that works: first what needs privileges (mounts, limits), then [`close_other_fds`],
//! then [`drop_identity`] or [`drop_capabilities`] with [`no_new_privileges`], and last a
//! [`seccomp::Filter`], which forbids all the others. [`lists`] has the lists of all processes;
//! [`layers`] names what a test can leave out.

pub mod layers;
pub mod lists;
mod root;
pub mod seccomp;

pub use root::{enter_empty_root, own_mounts};

use std::io;
use std::os::fd::RawFd;

use caps::{CapSet, Capability, CapsHashSet};
use kata_like_linux::fd::close;
use kata_like_linux::landlock;
use layers::{Layer, is_kept};
use rustix::fs::{Gid, Uid};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// The step that failed, and what the kernel said.
#[derive(Debug, thiserror::Error)]
#[error("jail the process: {step}")]
pub struct JailError {
    step: &'static str,
    #[source]
    source: io::Error,
}

impl JailError {
    /// A thread has not closed its jail in time.
    pub fn late() -> Self {
        Self::new("wait for all threads", io::ErrorKind::TimedOut.into())
    }

    /// A step failed, for this reason.
    pub fn new(step: &'static str, source: io::Error) -> Self {
        Self { step, source }
    }
}

/// Becomes user and group `uid`, which must not be 0, without groups and capabilities. The process
/// can't gain any again: no_new_privs, no core dump, no ptrace by others of the same id (dumpable
/// 0).
pub fn drop_identity(uid: u32) -> Result<(), JailError> {
    if uid == 0 {
        let why = io::Error::new(io::ErrorKind::InvalidInput, "user id 0 gives nothing up");
        return Err(JailError::new("take a user id of its own", why));
    }
    if is_kept(Layer::User) {
        become_user(uid)?;
    }
    no_core_dump()?;
    no_new_privileges()
}

fn become_user(uid: u32) -> Result<(), JailError> {
    drop_bounding_set(&CapsHashSet::new())?;
    clear(CapSet::Ambient, "empty the ambient capabilities")?;
    // These calls change only the calling thread, which is the only one (module header).
    set_thread_groups(&[]).map_err(failed("give up all groups"))?;
    let group = Gid::from_raw(uid);
    set_thread_res_gid(group, group, group).map_err(failed("take a group id of its own"))?;
    let user = Uid::from_raw(uid);
    set_thread_res_uid(user, user, user).map_err(failed("take a user id of its own"))?;
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        clear(set, "empty the capability sets")?;
    }
    Ok(())
}

/// Keeps only the capabilities in `keep`, effective and permitted, and lets no later `execve` bring
/// one back. For a process that stays root.
pub fn drop_capabilities(keep: &[Capability]) -> Result<(), JailError> {
    let keep: CapsHashSet = keep.iter().copied().collect();
    let step = "reduce the capabilities";
    if !is_kept(Layer::Capabilities) {
        return no_core_dump();
    }
    drop_bounding_set(&keep)?;
    clear(CapSet::Ambient, step)?;
    clear(CapSet::Inheritable, step)?;
    caps::set(None, CapSet::Effective, &keep).map_err(|why| from_caps(step, why))?;
    caps::set(None, CapSet::Permitted, &keep).map_err(|why| from_caps(step, why))?;
    no_core_dump()
}

/// From now on no set-user-id file and no file capability gives this process or its children
/// anything (prctl(2), PR_SET_NO_NEW_PRIVS). Seccomp filters need this, too.
pub fn no_new_privileges() -> Result<(), JailError> {
    set_no_new_privs(true).map_err(failed("set no_new_privs"))
}

/// Gives up all that the kernel's Landlock knows: every file by its path, TCP, signals to other
/// processes and their abstract sockets. Needs [`no_new_privileges`]. False: the kernel has no
/// Landlock, or it is switched off, and nothing has changed.
pub fn shut_out() -> Result<bool, JailError> {
    if landlock::version() == 0 {
        return Ok(false);
    }
    let restrict = || restrict(landlock::Ruleset::everything()?);
    restrict().map_err(failed("give up all files by Landlock"))?;
    Ok(true)
}

/// Gives up what `rules` restrict, in the calling thread and those that it makes. Needs
/// [`no_new_privileges`].
pub fn restrict(rules: landlock::Ruleset) -> io::Result<()> {
    match is_kept(Layer::Landlock) {
        true => rules.restrict_thread(),
        false => Ok(()),
    }
}

/// The process may have `most` of a resource from now on, and never more (getrlimit(2)).
pub fn limit(what: Resource, most: u64) -> Result<(), JailError> {
    if !is_kept(Layer::Limit(what)) {
        return Ok(());
    }
    let both = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    setrlimit(what, both).map_err(failed("limit what the process may have"))
}

/// For a thread that has nothing to do any more, and whose jail forbids the calls of a thread's
/// end. It goes with the process.
pub fn rest() -> ! {
    loop {
        std::thread::park();
    }
}

/// Closes every file descriptor from 3 up that is not in `keep`: if a parent forgot close-on-exec,
/// the descriptor must be gone before the guest attacks.
///
/// The caller guarantees that nothing in the process owns one of the others.
pub fn close_other_fds(keep: &[RawFd]) -> Result<(), JailError> {
    let mut kept: Vec<u32> = keep
        .iter()
        .filter_map(|fd| u32::try_from(*fd).ok())
        .filter(|fd| *fd >= 3)
        .collect();
    if !is_kept(Layer::Descriptors) {
        return Ok(());
    }
    kept.sort_unstable();
    let step = "close inherited file descriptors";
    let mut first = 3;
    for fd in kept {
        if fd > first {
            close(first..=fd - 1).map_err(failed(step))?;
        }
        first = first.max(fd + 1);
    }
    close(first..=u32::MAX).map_err(failed(step))
}

fn drop_bounding_set(keep: &CapsHashSet) -> Result<(), JailError> {
    let step = "reduce the capability bounding set";
    for capability in caps::all() {
        if keep.contains(&capability) {
            continue;
        }
        // The kernel may be older than the list. A capability that it does not know is not there.
        if caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, capability).map_err(|why| from_caps(step, why))?;
        }
    }
    Ok(())
}

fn clear(set: CapSet, step: &'static str) -> Result<(), JailError> {
    caps::clear(None, set).map_err(|why| from_caps(step, why))
}

fn no_core_dump() -> Result<(), JailError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("forbid dumps and tracing"))?;
    limit(Resource::Core, 0)
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |why| JailError::new(step, why.into())
}

fn from_caps(step: &'static str, why: caps::errors::CapsError) -> JailError {
    JailError::new(step, io::Error::other(why.to_string()))
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod verdicts;
