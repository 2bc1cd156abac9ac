//! A container's stats, read from its cgroup into the message that the host gets.
//!
//! Called by `container.rs`. Each file is read whole and at once; a file or a key that this kernel
//! does not have counts as zero, a limit of "max" as none. What has a line for each of something is
//! cut off at a number of lines that no kernel reaches by itself.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use kata_like_agent_protocol::agent::{DeviceIo, HugePages, StatsResponse};

/// The most lines of a file of keys, the most devices, and the most page sizes that are told of.
const MOST_KEYS: usize = 256;
const MOST_DEVICES: usize = 64;
const MOST_SIZES: usize = 16;

/// Reads the stats of the cgroup in `directory`. `agent.proto` says what each is.
pub fn read(directory: &Path) -> StatsResponse {
    let text = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
    let number = |file: &str| limit(&text(file)).unwrap_or(0);
    let limit_of = |file: &str| limit(&text(file)).unwrap_or(u64::MAX);
    let pages = |size: String| HugePages {
        current: number(&format!("hugetlb.{size}.current")),
        max: limit_of(&format!("hugetlb.{size}.max")),
        failures: value(&text(&format!("hugetlb.{size}.events")), "max"),
        size,
        ..Default::default()
    };
    StatsResponse {
        cpu_stat: keys(&text("cpu.stat")),
        memory_stat: keys(&text("memory.stat")),
        memory_events: keys(&text("memory.events")),
        memory_usage: number("memory.current"),
        memory_limit: limit_of("memory.max"),
        memory_peak: number("memory.peak"),
        swap_usage: number("memory.swap.current"),
        swap_limit: limit_of("memory.swap.max"),
        swap_peak: number("memory.swap.peak"),
        pids_current: number("pids.current"),
        // 0 says "no limit" here.
        pids_limit: number("pids.max"),
        io: devices(&text("io.stat")),
        huge_pages: sizes(directory).into_iter().map(pages).collect(),
        ..Default::default()
    }
}

/// The key of `memory.events` that counts the killed, in this cgroup and below.
const OOM_KILLS: &str = "oom_kill";

/// How many processes were killed for OOM, from the text of `memory.events`.
pub fn oom_kills(events: &str) -> u64 {
    value(events, OOM_KILLS)
}

/// The lines `key number` of a file.
fn keys(text: &str) -> HashMap<String, u64> {
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
            ..Default::default()
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
    fn stats_are_taken_from_the_files_of_a_cgroup() {
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
            entries.collect::<HashMap<_, _>>()
        };
        let device = |major, minor, numbers: [u64; 4]| DeviceIo {
            major,
            minor,
            read_bytes: numbers[0],
            written_bytes: numbers[1],
            reads: numbers[2],
            writes: numbers[3],
            ..Default::default()
        };
        let stats = read(directory.path());
        assert_eq!(
            stats,
            StatsResponse {
                cpu_stat: map(&[
                    ("usage_usec", 30),
                    ("user_usec", 20),
                    ("system_usec", 10),
                    ("nr_periods", 3),
                    ("nr_throttled", 2),
                    ("throttled_usec", 1),
                ]),
                memory_usage: 4096,
                memory_limit: u64::MAX,
                memory_stat: map(&[("anon", 5), ("file", 6), ("slab_reclaimable", 1)]),
                memory_events: map(&[("oom", 3), ("oom_kill", 2), ("oom_group_kill", 0)]),
                swap_limit: u64::MAX,
                swap_peak: 11,
                pids_current: 4,
                pids_limit: 100,
                io: vec![device(254, 16, [1, 2, 3, 4]), device(7, 0, [0; 4])],
                huge_pages: vec![HugePages {
                    size: "2MB".into(),
                    current: 2_097_152,
                    max: u64::MAX,
                    failures: 3,
                    ..Default::default()
                }],
                ..Default::default()
            }
        );
    }

    #[test]
    fn stats_are_bounded_whatever_the_files_hold() {
        let lines = |line: fn(usize) -> String| (0..5000).map(line).collect::<String>();
        assert_eq!(keys(&lines(|n| format!("key{n} 1\n"))).len(), MOST_KEYS);
        assert_eq!(
            devices(&lines(|n| format!("8:{n} rios=1\n"))).len(),
            MOST_DEVICES
        );
    }

    #[test]
    fn a_cgroup_without_these_files_has_nothing_and_no_limit() {
        let stats = read(Path::new("/nonexistent"));
        assert_eq!((stats.memory_usage, stats.pids_current), (0, 0));
        assert_eq!((stats.memory_limit, stats.pids_limit), (u64::MAX, 0));
    }

    #[test]
    fn the_largest_answer_is_small() {
        use ttrpc::proto::Codec;

        let keys = || (0..MOST_KEYS).map(|n| (format!("a_key_of_the_kernel_{n}"), u64::MAX));
        let stats = StatsResponse {
            cpu_stat: keys().collect(),
            memory_stat: keys().collect(),
            memory_events: keys().collect(),
            io: vec![DeviceIo::default(); MOST_DEVICES],
            huge_pages: vec![HugePages::default(); MOST_SIZES],
            ..Default::default()
        };
        assert!(stats.encode().unwrap().len() < 64 << 10);
    }
}
