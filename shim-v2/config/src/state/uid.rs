//! The user ids of the VMMs and proxies: which pod has which, as links
//! `/run/kata-like/vmm:uid:NUMBER`, which have the VMM's.
//!
//! A link's text names the state folder of the pod that has the number. It counts for as long as
//! that folder is there: so a number is free when the pod's state is removed, by whomever, and
//! whatever was killed on the way. The link itself goes with [`StateFolder::remove`]; one that was
//! left is taken by the next pod that comes to its number. The lock on `/run/kata-like` keeps two
//! from taking the same.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FlockOperation};
use rustix::io::Errno;

use super::{ROOT, StateError, StateFolder, open_checked};

/// The numbers of the VMMs, for users and for groups: a part that no tool maps to anybody.
///
/// - Below 65,536: users, system users, `DynamicUser=` of systemd (systemd.io/UIDS-GIDS).
/// - 100,000 to 600,100,000: where useradd gives subordinate ids (login.defs, SUB_UID_MAX).
/// - 524,288 to 1,879,048,191: containers of systemd-nspawn and systemd's user namespaces.
/// - 200,000 to 2,000,200,000: SSSD's mapping of Active Directory (sssd-ldap,
///   ldap_idmap_range_max); FreeIPA's ranges of 200,000, of which it takes one of the first 10,000.
/// - 2,147,352,576 to 2,147,418,111: files of foreign images (systemd).
/// - From 2,147,483,647: podman's `--userns=auto`, FreeIPA's subordinate ids, and numbers that
///   programs take for negative ones.
pub const UIDS: Range<u32> = 2_100_000_000..2_100_065_536;

/// The number of the proxy of the pod whose VMM has `uid`: one of the same part, behind [`UIDS`],
/// and no other pod's either.
pub fn proxy_uid(uid: u32) -> u32 {
    uid + (UIDS.end - UIDS.start)
}

/// The link in a state folder whose text is its number.
const OWN: &str = "uid";
/// What a link's text has before the state folder's name, so that it leads nowhere.
const POD: &str = "pod ";
/// How long the lock is waited for. Its holder makes some system calls.
const PATIENCE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(1);

impl StateFolder {
    /// Takes a number of [`UIDS`] for the pod's VMM that no other pod has; one that it had before
    /// is free again, and is the last to be looked at. Blocks, up to two seconds.
    pub fn take_uid(&self) -> Result<u32, StateError> {
        let path = self.path.parent().unwrap_or(Path::new(ROOT));
        // A descriptor of its own: a lock is an open file's.
        let root = open_checked(CWD, path, path)?;
        lock(&root, path)?;
        let begin = match self.own_uid() {
            Some(before) => {
                self.free_uid();
                before + 1 - UIDS.start
            }
            // Not all at the same number: each that is taken is looked at.
            None => std::process::id(),
        };
        let count = UIDS.end - UIDS.start;
        for step in 0..count {
            let uid = UIDS.start + (begin.wrapping_add(step)) % count;
            if self.take(uid)? {
                rustix::fs::symlinkat(uid.to_string(), &self.folder, OWN)
                    .map_err(|errno| StateError::io("make link", &self.path.join(OWN), errno))?;
                return Ok(uid);
            }
        }
        let why = format!(
            "every user id from {} to {} is taken",
            UIDS.start,
            UIDS.end - 1
        );
        Err(StateError::not_safe(&self.path, why))
    }

    /// Under the lock: whether this number is the pod's now.
    fn take(&self, uid: u32) -> Result<bool, StateError> {
        let (name, owner) = (link(uid), format!("{POD}{}", self.name));
        let failed = |step| {
            let path = self.path.with_file_name(&name);
            move |errno: Errno| StateError::io(step, &path, errno)
        };
        match rustix::fs::symlinkat(&owner, &self.root, &name) {
            Ok(()) => return Ok(true),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("make link")(errno)),
        }
        if self.is_taken(&name) {
            return Ok(false);
        }
        rustix::fs::unlinkat(&self.root, &name, AtFlags::empty()).map_err(failed("remove link"))?;
        rustix::fs::symlinkat(&owner, &self.root, &name).map_err(failed("make link"))?;
        Ok(true)
    }

    /// Whether there is a state folder of the pod that a link names. What can't be read is taken.
    fn is_taken(&self, link: &str) -> bool {
        let text = rustix::fs::readlinkat(&self.root, link, Vec::new());
        let Some(text) = text.ok().and_then(|text| text.into_string().ok()) else {
            return true;
        };
        let Some(pod) = text.strip_prefix(POD) else {
            return true;
        };
        let about = rustix::fs::statat(&self.root, pod, AtFlags::SYMLINK_NOFOLLOW);
        // This pod has none yet: the link is of one that had its name.
        pod != self.name && about.err() != Some(Errno::NOENT)
    }

    /// The number that the pod has.
    fn own_uid(&self) -> Option<u32> {
        let text = rustix::fs::readlinkat(&self.folder, OWN, Vec::new()).ok()?;
        let uid = text.to_str().ok()?.parse().ok()?;
        UIDS.contains(&uid).then_some(uid)
    }

    /// The pod has no number any more.
    pub(super) fn free_uid(&self) {
        let Some(uid) = self.own_uid() else {
            return;
        };
        let name = link(uid);
        let text = rustix::fs::readlinkat(&self.root, &name, Vec::new());
        let owner = format!("{POD}{}", self.name);
        if text.is_ok_and(|text| text.to_bytes() == owner.as_bytes()) {
            let _ = rustix::fs::unlinkat(&self.root, &name, AtFlags::empty());
        }
        let _ = rustix::fs::unlinkat(&self.folder, OWN, AtFlags::empty());
    }
}

/// Two colons: no state folder's name.
fn link(uid: u32) -> String {
    format!("vmm:uid:{uid}")
}

fn lock(root: &OwnedFd, path: &Path) -> Result<(), StateError> {
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(root, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(POLL),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(StateError::io("lock", path, errno)),
        }
    }
}
