//! Who changes a share's files beside the guest, and so what the guest may remember. `names` asks.

use std::sync::Arc;
use std::time::Duration;

use virtiofsd::filesystem::Entry;
use virtiofsd::fuse::Attr;

use crate::locks::Locks;

/// Who changes the files beside the guest.
#[derive(Clone, Debug)]
pub enum Others {
    /// Only an administrator. The guest may remember missing names, and its kernel keeps file locks
    /// itself.
    Nobody {
        /// How long the guest may remember that a name does not exist.
        missing_names: Duration,
    },
    /// The host, or other pods. The guest looks up a symbolic link each time, since the host
    /// switches a whole volume by one (`..data`). It asks for locks, since a lock in this guest
    /// alone would let two pods write at once.
    Somebody {
        /// The guest's locks.
        locks: Arc<Locks>,
    },
}

impl Others {
    /// The guest's locks, if others may change the files.
    pub fn locks(&self) -> Option<&Locks> {
        match self {
            Self::Nobody { .. } => None,
            Self::Somebody { locks } => Some(locks),
        }
    }

    /// "There is no such name, and you may remember that", if the guest may.
    pub fn missing(&self) -> Option<Entry> {
        match self {
            &Self::Nobody { missing_names } => Some(Entry {
                inode: 0,
                generation: 0,
                attr: Attr::default(),
                attr_timeout: Duration::ZERO,
                entry_timeout: missing_names,
            }),
            Self::Somebody { .. } => None,
        }
    }

    /// A name that others may remove: where locks are used the guest looks it up each time. If a
    /// guest remembered a database's journal that is gone, it would roll it back once more.
    pub fn named(&self, entry: Entry) -> Entry {
        let Some(locks) = self.locks() else {
            return entry;
        };
        let link = entry.attr.mode & libc::S_IFMT == libc::S_IFLNK;
        Entry {
            entry_timeout: match link || locks.are_used() {
                true => Duration::ZERO,
                false => entry.entry_timeout,
            },
            attr_timeout: self.keep(entry.inode, entry.attr_timeout),
            ..entry
        }
    }

    /// How long the guest may remember a node's attributes.
    pub fn keep(&self, node: u64, usually: Duration) -> Duration {
        match self.locks() {
            Some(locks) if locks.are_on(node) => Duration::ZERO,
            _ => usually,
        }
    }
}
