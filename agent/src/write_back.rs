//! What containers have written and the host does not have yet.
//!
//! Called by `pod.rs` and `container/` when something ends or is frozen. A write to a share is on
//! the host when it is answered. Data that was stored through a mapping, or written to a disk's
//! file system, is not: the kernel writes it back when the mapping or the file system goes, as part
//! of a process's exit. So we wait for the exits of a container for as long as the dirty bytes go
//! down.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use kata_like_failure::Failure;

use crate::deadline::blocking;

/// How long we wait without the dirty bytes going down.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often we look.
const LOOK: Duration = Duration::from_millis(200);

/// How long we leave the kernel to it before we ask for write-back.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// The lines of /proc/meminfo (proc_meminfo(5)) that count it. FUSE writes from copies, which the
/// last line counts.
const LINES: [&str; 3] = ["Dirty:", "Writeback:", "WritebackTmp:"];

/// How many bytes the host does not have yet: whole pages, of all containers. Each CPU counts on
/// its own until somebody reads `stat_refresh` (Documentation/admin-guide/sysctl/vm.rst).
pub fn dirty_bytes() -> io::Result<u64> {
    fs::read("/proc/sys/vm/stat_refresh")?;
    Ok(dirty_in(&fs::read_to_string("/proc/meminfo")?))
}

fn dirty_in(meminfo: &str) -> u64 {
    let mut sum = 0_u64;
    for line in meminfo.lines() {
        let mut words = line.split_whitespace();
        if words.next().is_some_and(|name| LINES.contains(&name)) {
            let kib = words.next().and_then(|word| word.parse::<u64>().ok());
            sum = sum.saturating_add(kib.unwrap_or(0).saturating_mul(1024));
        }
    }
    sum
}

/// Waits until the host has all that is dirty now.
pub async fn write_back() -> Result<(), Failure> {
    if is_clean().await? {
        return Ok(());
    }
    tokio::time::sleep(ON_ITS_WAY).await;
    if is_clean().await? {
        return Ok(());
    }
    // This also makes the host's own file systems write to their disks, which can take its time.
    let sync = || {
        rustix::fs::sync();
        Ok::<_, io::Error>(())
    };
    blocking("write back what is dirty", sync).await
}

async fn is_clean() -> Result<bool, Failure> {
    let dirty = blocking("ask how much is dirty", dirty_bytes).await?;
    Ok(dirty == 0)
}

/// Waits for `work`, which ends when what is dirty is written back, for as long as that goes down.
pub async fn while_it_shrinks<T>(
    step: impl Fn() -> String,
    work: impl Future<Output = T>,
) -> Result<T, Failure> {
    let mut work = std::pin::pin!(work);
    let mut watch = Shrinking::new();
    loop {
        match tokio::time::timeout(LOOK, &mut work).await {
            Ok(done) => return Ok(done),
            Err(_) if watch.goes_on(dirty_bytes().unwrap_or(u64::MAX)) => {}
            Err(_) => {
                return Err(Failure::late(step(), PATIENCE));
            }
        }
    }
}

/// The fewest dirty bytes seen so far, and when.
struct Shrinking {
    least: u64,
    since: Instant,
}

impl Shrinking {
    fn new() -> Self {
        Self {
            least: u64::MAX,
            since: Instant::now(),
        }
    }

    /// Whether they have gone down within the last [`PATIENCE`].
    fn goes_on(&mut self, now: u64) -> bool {
        if now < self.least {
            (self.least, self.since) = (now, Instant::now());
        }
        self.since.elapsed() < PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dirty_is_the_sum_of_three_lines() {
        let meminfo = "MemTotal: 2048 kB\nDirty:             12 kB\nWriteback:           0 kB\n\
            WritebackTmp:        8 kB\nDirtyOther: 100 kB\n";
        assert_eq!(dirty_in(meminfo), 20 << 10);
        assert_eq!(
            dirty_in("Dirty: 18446744073709551615 kB\nWriteback: x kB\n"),
            u64::MAX
        );
        assert_eq!(dirty_in(""), 0);
    }

    #[tokio::test]
    async fn what_does_not_become_less_is_given_up() {
        let mut watch = Shrinking::new();
        assert!(watch.goes_on(5) && watch.goes_on(4) && watch.goes_on(4));
        watch.since -= PATIENCE;
        assert!(!watch.goes_on(4), "no fewer for so long");
        assert!(watch.goes_on(3), "fewer again");
        let step = || "wait for the init of c1".to_owned();
        assert_eq!(while_it_shrinks(step, async { 7 }).await.unwrap(), 7);
    }
}
