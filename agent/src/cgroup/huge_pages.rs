//! The guest's huge pages: the pool holds as many as its containers may have by their limits.
//!
//! Called by `cgroup.rs` as limits come, change and go. On a host an administrator sizes the pool
//! (Documentation/admin-guide/mm/hugetlbpage.rst). A guest has nobody else to do it.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use kata_like_linux::lock;
use rustix::system::sysinfo;

use super::limits::Limits;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FILE: &str = "hugetlb.2MB.max";
/// In bytes.
const PAGE: u64 = 2 << 20;

/// One look at the limits and one write of the pool at a time.
static FITTING: Mutex<()> = Mutex::new(());
/// A limit has asked for pages. Until then the pool is the kernel's, and empty.
static USED: AtomicBool = AtomicBool::new(false);

/// After limits have been set: fits the pool if they are about huge pages.
pub fn limits_changed(root: &Path, limits: &Limits) {
    let mut settings = limits.0.iter();
    if settings.any(|it| it.file == FILE && it.value != "0") {
        USED.store(true, Ordering::Relaxed);
    }
    cgroup_gone(root);
}

/// After a cgroup below `root` has gone: its pages are free for others.
pub fn cgroup_gone(root: &Path) {
    if USED.load(Ordering::Relaxed) {
        fit(root, Path::new(POOL));
    }
}

/// Makes the pool as large as all limits together. The kernel may find fewer pages: a container
/// that wants more than there are gets ENOMEM, as on a host whose pool is too small.
fn fit(root: &Path, pool: &Path) {
    let _one = lock(&FITTING);
    let memory = sysinfo().totalram;
    let wanted = wanted(root, memory);
    if let Err(error) = fs::write(pool, wanted.to_string()) {
        log::warn!("reserve {wanted} huge pages: {error}");
        return;
    }
    let there = fs::read_to_string(pool).ok();
    let there = there.and_then(|text| text.trim().parse::<u64>().ok());
    if there.is_none_or(|there| there < wanted) {
        log::warn!("of {wanted} huge pages for the limits of containers there are {there:?}");
    }
}

/// In pages, of all containers. A limit above all memory asks for none: it is there to be no limit.
fn wanted(root: &Path, memory: u64) -> u64 {
    let cgroups = fs::read_dir(root).into_iter().flatten().flatten();
    let limits = cgroups.filter_map(|cgroup| {
        let limit = fs::read_to_string(cgroup.path().join(FILE)).ok()?;
        limit.trim().parse::<u64>().ok()
    });
    let limits = limits.filter(|limit| *limit <= memory);
    limits.map(|limit| limit / PAGE).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_the_sum_of_the_limits() {
        let root = tempfile::tempdir().unwrap();
        for (name, limit) in [
            ("_a", "4194304\n"),
            ("_b", "max\n"),
            ("_c", "9223372036854771712\n"),
            ("_d", "2097152\n"),
            ("agent", "max\n"),
        ] {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(name).join(FILE), limit).unwrap();
        }
        fs::create_dir(root.path().join("_without")).unwrap();
        assert_eq!(wanted(root.path(), 1 << 30), 3);
        let pool = root.path().join("pool");
        fit(root.path(), &pool);
        assert_eq!(fs::read_to_string(pool).unwrap(), "3");
    }
}
