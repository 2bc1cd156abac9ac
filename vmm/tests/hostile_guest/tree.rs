//! The host's files: what a guest must not change.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Trees of files, and what in them the guest may change.
pub struct Trees {
    roots: Vec<PathBuf>,
    except: Vec<PathBuf>,
}

impl Trees {
    pub fn new(roots: Vec<PathBuf>, except: Vec<PathBuf>) -> Self {
        Self { roots, except }
    }

    /// The host's own configuration.
    pub fn of_the_host() -> Self {
        Self::new(vec!["/etc".into()], Vec::new())
    }

    /// Names, kinds, modes, owners, sizes and contents of all files.
    pub fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for root in &self.roots {
            self.add(root, &mut hasher);
        }
        hasher.finish()
    }

    fn add(&self, path: &Path, hasher: &mut DefaultHasher) {
        if self.except.iter().any(|except| except == path) {
            return;
        }
        let Ok(of) = fs::symlink_metadata(path) else {
            panic!("{} is gone", path.display());
        };
        (path, of.mode(), of.uid(), of.gid(), of.rdev()).hash(hasher);
        if of.is_dir() {
            let entries = fs::read_dir(path).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
            names.sort();
            names.iter().for_each(|name| self.add(name, hasher));
        } else if of.is_symlink() {
            fs::read_link(path).unwrap().hash(hasher);
        } else if of.is_file() {
            of.len().hash(hasher);
            fs::read(path).unwrap().hash(hasher);
        }
    }
}
