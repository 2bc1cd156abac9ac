//! A container's figures, read from its cgroup.
//!
//! Called by `container.rs`. Each file is read whole and at once; a file or a key that this kernel
//! does not have counts as zero, a limit of "max" as none. What has a line for each of something is
//! cut off at a number of lines that no kernel reaches by itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The most lines of a file of keys, the most devices, and the most page sizes that are told of.
const MOST_KEYS: usize = 256;
const MOST_DEVICES: usize = 64;
const MOST_SIZES: usize = 16;

/// A container's figures: memory in bytes, times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// `usage_usec`, `user_usec`, `system_usec`.
    pub cpu: [u64; 3],
    /// `nr_periods`, `nr_throttled`, `throttled_usec`.
    pub throttling: [u64; 3],
    pub memory_usage: u64,
    pub memory_limit: Option<u64>,
    pub memory_peak: u64,
    /// The whole of `memory.stat` and `memory.events`.
    pub memory_stat: BTreeMap<String, u64>,
    pub memory_events: BTreeMap<String, u64>,
    pub swap_usage: u64,
    pub swap_limit: Option<u64>,
    pub swap_peak: u64,
    pub pids: u64,
    pub pids_limit: Option<u64>,
    pub io: Vec<DeviceIo>,
    pub huge_pages: Vec<HugePages>,
}

/// What was read from and written to one block device, in bytes and in operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    pub major: u64,
    pub minor: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// Pages of one size, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// As in the files' names: "2MB".
    pub size: String,
    pub current: u64,
    pub limit: Option<u64>,
    /// How often the limit was met.
    pub failures: u64,
}

impl Stats {
    /// Reads the figures of the cgroup in `directory`.
    pub fn read(directory: &Path) -> Self {
        let text = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
        let number = |file: &str| limit(&text(file)).unwrap_or(0);
        let cpu = text("cpu.stat");
        Self {
            cpu: ["usage_usec", "user_usec", "system_usec"].map(|key| value(&cpu, key)),
            throttling: ["nr_periods", "nr_throttled", "throttled_usec"]
                .map(|key| value(&cpu, key)),
            memory_usage: number("memory.current"),
            memory_limit: limit(&text("memory.max")),
            memory_peak: number("memory.peak"),
            memory_stat: keys(&text("memory.stat")),
            memory_events: keys(&text("memory.events")),
            swap_usage: number("memory.swap.current"),
            swap_limit: limit(&text("memory.swap.max")),
            swap_peak: number("memory.swap.peak"),
            pids: number("pids.current"),
            pids_limit: limit(&text("pids.max")),
            io: devices(&text("io.stat")),
            huge_pages: sizes(directory)
                .into_iter()
                .map(|size| HugePages {
                    current: number(&format!("hugetlb.{size}.current")),
                    limit: limit(&text(&format!("hugetlb.{size}.max"))),
                    failures: value(&text(&format!("hugetlb.{size}.events")), "max"),
                    size,
                })
                .collect(),
        }
    }

    /// A figure of `memory.stat`.
    pub fn memory(&self, key: &str) -> u64 {
        self.memory_stat.get(key).copied().unwrap_or(0)
    }

    /// How many processes were killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        self.memory_events.get(OOM_KILLS).copied().unwrap_or(0)
    }
}

/// The key of `memory.events` that counts the killed, in this cgroup and below.
const OOM_KILLS: &str = "oom_kill";

/// How many processes were killed for want of memory, from the text of `memory.events`.
pub fn oom_kills(events: &str) -> u64 {
    value(events, OOM_KILLS)
}

/// The lines `key number` of a file.
fn keys(text: &str) -> BTreeMap<String, u64> {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .filter_map(|(key, number)| Some((key.to_owned(), number.trim().parse().ok()?)))
        .take(MOST_KEYS)
        .collect()
}

/// The lines `major:minor rbytes=number …` of `io.stat`.
fn devices(text: &str) -> Vec<DeviceIo> {
    let device = |line: &str| {
        let (numbers, figures) = line.split_once(' ').unwrap_or((line, ""));
        let (major, minor) = numbers.split_once(':')?;
        let figure = |key: &str| {
            let mut figures = figures
                .split(' ')
                .filter_map(|figure| figure.split_once('='));
            let found = figures.find(|(name, _)| *name == key);
            found
                .and_then(|(_, number)| number.parse().ok())
                .unwrap_or(0)
        };
        Some(DeviceIo {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            read_bytes: figure("rbytes"),
            written_bytes: figure("wbytes"),
            reads: figure("rios"),
            writes: figure("wios"),
        })
    };
    text.lines().filter_map(device).take(MOST_DEVICES).collect()
}

/// The page sizes that have a file `hugetlb.SIZE.max`.
fn sizes(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".max")?;
        // The other ones are `hugetlb.SIZE.rsvd.max`.
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut found: Vec<_> = entries.filter_map(size).take(MOST_SIZES).collect();
    found.sort();
    found
}

/// The number after `key` in a file of lines `key number`.
fn value(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, number)| number.trim().parse().ok())
        .unwrap_or(0)
}

/// A file of one number; "max" and nonsense are no limit.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_taken_from_the_files_of_a_cgroup() {
        let directory = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        put(
            "cpu.stat",
            "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 3\nnr_throttled 2\nthrottled_usec 1\n",
        );
        put("memory.current", "4096\n");
        put("memory.max", "max\n");
        put("memory.swap.peak", "11\n");
        put(
            "memory.stat",
            "anon 5\nfile 6\nslab_reclaimable 1\nno number\n",
        );
        put("memory.events", "oom 3\noom_kill 2\noom_group_kill 0\n");
        put("pids.current", "4\n");
        put("pids.max", "100\n");
        put(
            "io.stat",
            "254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:0 \nnonsense\n",
        );
        put("hugetlb.2MB.current", "2097152\n");
        put("hugetlb.2MB.max", "max\n");
        put("hugetlb.2MB.rsvd.max", "max\n");
        put("hugetlb.2MB.events", "max 3\n");
        let map = |entries: &[(&str, u64)]| {
            let entries = entries
                .iter()
                .map(|(key, value)| ((*key).to_owned(), *value));
            entries.collect::<BTreeMap<_, _>>()
        };
        let stats = Stats::read(directory.path());
        assert_eq!(
            stats,
            Stats {
                cpu: [30, 20, 10],
                throttling: [3, 2, 1],
                memory_usage: 4096,
                memory_stat: map(&[("anon", 5), ("file", 6), ("slab_reclaimable", 1)]),
                memory_events: map(&[("oom", 3), ("oom_kill", 2), ("oom_group_kill", 0)]),
                swap_peak: 11,
                pids: 4,
                pids_limit: Some(100),
                io: vec![
                    DeviceIo {
                        major: 254,
                        minor: 16,
                        read_bytes: 1,
                        written_bytes: 2,
                        reads: 3,
                        writes: 4
                    },
                    DeviceIo {
                        major: 7,
                        ..DeviceIo::default()
                    }
                ],
                huge_pages: vec![HugePages {
                    size: "2MB".into(),
                    current: 2_097_152,
                    limit: None,
                    failures: 3
                }],
                ..Stats::default()
            }
        );
        assert_eq!((stats.memory("anon"), stats.oom_kills()), (5, 2));
    }

    #[test]
    fn figures_are_bounded_whatever_the_files_hold() {
        let lines = |line: fn(usize) -> String| (0..5000).map(line).collect::<String>();
        assert_eq!(keys(&lines(|n| format!("key{n} 1\n"))).len(), MOST_KEYS);
        assert_eq!(
            devices(&lines(|n| format!("8:{n} rios=1\n"))).len(),
            MOST_DEVICES
        );
    }

    #[test]
    fn a_cgroup_without_these_files_has_figures_of_zero() {
        assert_eq!(Stats::read(Path::new("/nonexistent")), Stats::default());
    }
}
