//! Who changes a share's files beside the guest, and so what the guest may remember of them. `names` asks.

use std::sync::Arc;
use std::time::Duration;

use virtiofsd::filesystem::Entry;
use virtiofsd::fuse::Attr;

use crate::locks::Locks;

/// Who changes the files beside the guest.
#[derive(Clone, Debug)]
pub enum Others {
    /// Nobody but an administrator. For so long the guest may remember that a name does not exist; its kernel's own file
    /// locks are all there are.
    Nobody {
        /// How long.
        missing_names: Duration,
    },
    /// The host, or other pods. A symbolic link is looked up each time, for the host switches a
    /// whole volume by one (`..data`). Locks are asked for, since one that held in this guest alone
    /// would let two pods write at once.
    Somebody {
        /// Those that the guest has.
        locks: Arc<Locks>,
    },
}

impl Others {
    /// The guest's locks, where others may be.
    pub fn locks(&self) -> Option<&Locks> {
        match self {
            Self::Nobody { .. } => None,
            Self::Somebody { locks } => Some(locks),
        }
    }

    /// "There is no such name, and you may remember it", where the guest may.
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

    /// A name that others may take away: where locks are used it is looked up each time. A database's journal
    /// that is gone, yet remembered, would be rolled back once more.
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

    /// For how long the guest may remember a node's attributes.
    pub fn keep(&self, node: u64, usually: Duration) -> Duration {
        match self.locks() {
            Some(locks) if locks.are_on(node) => Duration::ZERO,
            _ => usually,
        }
    }
}
