//! What the guest knows of files, so that an open finds what the host has changed meanwhile.
//!
//! `names` asks. The guest's kernel keeps pages and attributes; before it opens a file it sends
//! nothing but the open itself. If the file is not what the guest was told, we refuse the open with
//! ESTALE. Then the kernel looks the name up once more (fs/namei.c, do_filp_open), takes the
//! attributes, drops the pages, and opens the file again. So a file is right from open to close, as
//! on a network file system.
//!
//! We remember only files that were changed since the server began: time and length of their
//! content, and whether they have a name. A file that we don't remember is looked up once more. So
//! too many files ([`MOST`]) cost one request each, no more.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use kata_like_linux::lock;
use virtiofsd::fuse::Attr;

/// The most files that we remember.
const MOST: usize = 65_536;

/// How far the kernel's clock for files may be behind the clock that is read here, in seconds: more
/// than a tick.
const BEHIND: u64 = 1;

/// When the content was changed (seconds, nanoseconds), its length, and whether the file has lost
/// its name: then another file may have it.
type Content = (u64, u32, u64, bool);

/// See the module.
#[derive(Debug)]
pub struct Seen {
    /// CLOCK_REALTIME in seconds. A file last changed before it is as it was when the guest came.
    begun: u64,
    files: Mutex<HashMap<u64, Content>>,
}

impl Seen {
    /// The guest knows nothing yet.
    pub fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            begun: now.map_or(0, |now| now.as_secs().saturating_sub(BEHIND)),
            files: Mutex::default(),
        }
    }

    /// The guest was told these attributes of a node, or has made the change itself.
    pub fn tell(&self, node: u64, attr: &Attr) {
        if attr.ctime < self.begun {
            return;
        }
        let mut files = self.files();
        if files.len() >= MOST && !files.contains_key(&node) {
            files.clear();
        }
        files.insert(node, content(attr));
    }

    /// Whether a node is what the guest was told. From now on the guest counts as knowing it.
    pub fn is_current(&self, node: u64, attr: &Attr) -> bool {
        if attr.ctime < self.begun {
            return true;
        }
        let known = self.files().get(&node) == Some(&content(attr));
        self.tell(node, attr);
        known
    }

    fn files(&self) -> MutexGuard<'_, HashMap<u64, Content>> {
        // A thread that panics ends the process (`last_words`), so nobody sees its state.
        lock(&self.files)
    }
}

fn content(attr: &Attr) -> Content {
    (attr.mtime, attr.mtimensec, attr.size, attr.nlink == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(ctime: u64, mtime: u64, size: u64) -> Attr {
        Attr {
            ctime,
            mtime,
            size,
            nlink: 1,
            ..Attr::default()
        }
    }

    #[test]
    fn a_file_is_current_until_somebody_else_changes_it() {
        let seen = Seen::new();
        let now = seen.begun + 5;
        // An old file needs no memory, whatever its content's time says.
        assert!(seen.is_current(1, &attr(seen.begun - 1, now, 3)));
        assert!(seen.files().is_empty());
        // A file that was changed since is unknown once.
        assert!(!seen.is_current(2, &attr(now, 7, 3)));
        assert!(seen.is_current(2, &attr(now, 7, 3)));
        // Its length or its content's time counts, and not a new name or mode.
        assert!(!seen.is_current(2, &attr(now, 7, 4)));
        assert!(!seen.is_current(2, &attr(now, 8, 4)));
        assert!(seen.is_current(2, &attr(now + 1, 8, 4)));
        // Another file has its name.
        let nameless = Attr {
            nlink: 0,
            ..attr(now + 1, 8, 4)
        };
        assert!(!seen.is_current(2, &nameless));
        assert!(
            seen.is_current(2, &nameless),
            "it is open, and opened by its descriptor"
        );
        // The guest knows what it was told or has done itself.
        seen.tell(2, &attr(now, 9, 9));
        assert!(seen.is_current(2, &attr(now, 9, 9)));
    }

    #[test]
    fn a_guest_can_not_make_it_grow_without_end() {
        let seen = Seen::new();
        for node in 0..MOST as u64 + 10 {
            seen.tell(node, &attr(seen.begun, 1, 1));
        }
        assert!(seen.files().len() <= MOST);
        assert!(
            !seen.is_current(1, &attr(seen.begun, 1, 1)),
            "forgotten, and asked for"
        );
    }
}
