//! What a pod is on the host: its processes, as `docs/processes.md` has them, and what they may
//! use.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kata_like_tests::process::Process;
use kata_like_tests::rootfs::Rootfs;
use kata_like_tests::shim_pod::ShimPod;
use kata_like_tests::task::{Streams, Task};
use kata_like_tests::task_api::done;
use kata_like_tests::volume::{bind, memory_of_roots};
use kata_like_tests::{CtrContainer, Directory, Host, TestResult, failure, kata_like_only};
use rustix::fs::StatVfsMountFlags;
use rustix::mount::{MountFlags, UnmountFlags};

const PAGE: &str = include_str!("../../docs/processes.md");

/// The columns of the table.
const PROCESSES: [&str; 5] = ["VMM", "fs server", "proxy", "shim", "stand-in"];

/// A row of the table, and how it is seen in `/proc`.
type Fact = (&'static str, fn(&Seen) -> TestResult<String>);

const FACTS: [Fact; 15] = [
    ("user and group", user),
    ("capabilities", |it| capabilities(it, &["CapEff", "CapPrm"])),
    ("capabilities that an exec can give", |it| {
        capabilities(it, &["CapBnd"])
    }),
    ("no_new_privs", no_new_privs),
    ("seccomp, each thread", seccomp),
    ("namespaces that are not the host's", |it| {
        Ok(list(&it.namespaces(&own_namespaces()?)?))
    }),
    ("of these the shim's", shared_with_shim),
    ("root", root),
    ("oom_score_adj", oom_score),
    ("limit: core file size", |it| {
        limit(it, "Max core file size")
    }),
    ("limit: open files", |it| limit(it, "Max open files")),
    ("limit: file size", |it| limit(it, "Max file size")),
    ("limit: processes", |it| {
        let (own, vcpus) = (limit(it, "Max processes")?, vcpus(it)?);
        Ok(match own.parse::<usize>() {
            Ok(own) if vcpus > 0 && own == vcpus + 16 => "16 and its vCPUs".to_owned(),
            _ => own,
        })
    }),
    ("limit: locked memory", |it| limit(it, "Max locked memory")),
    ("limit: address space", |it| limit(it, "Max address space")),
];

/// The score of the pod whose processes are looked at.
const SCORE: i32 = 200;

/// By their numbers (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// A process of the pod, and those that it is compared with.
struct Seen {
    process: Process,
    shim: Process,
    containerd: Process,
}

#[test]
fn each_process_is_as_the_page_has_it() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let rootfs = Rootfs::mount(&host)?;
    let mut spec = rootfs.spec(&["sleep", "1000"])?;
    spec["process"]["oomScoreAdj"] = SCORE.into();
    let pod = rootfs.start(&host.name("processes"), &spec)?;
    let shim = pod.process("shim")?;
    let mut differences = Vec::new();
    let rows = rows_of_the_page()?;
    for (name, process) in PROCESSES.iter().zip(processes(&pod)?) {
        let seen = Seen {
            process,
            shim: shim.clone(),
            containerd: Process::find(std::process::id().cast_signed())
                .ok_or_else(|| failure("this process is not there"))?,
        };
        for ((fact, look), row) in FACTS.iter().zip(&rows) {
            let column = PROCESSES.iter().position(|it| it == name);
            let cell = column.and_then(|column| row.get(column));
            let found = look(&seen)?;
            if cell != Some(&found) {
                differences.push(format!("{name}, {fact}: {found:?}, the page has {cell:?}"));
            }
        }
    }
    pod.remove()?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// What `kata_like_jail::layers::LEAVE_OUT` is in a build in which layers can be left out. The
/// VMM's unit tests see that such a build has it.
const MARK: &[u8] = b"a test build, whose layers can be left out";

#[test]
fn what_is_installed_has_all_layers() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod = host.start("layers", &[], &["sleep", "1000"])?;
    for name in ["vmm", "fsd", "shim"] {
        let pid = pod.process(name)?.pid;
        let program = fs::read(format!("/proc/{pid}/exe"))?;
        let is_marked = program.windows(MARK.len()).any(|bytes| bytes == MARK);
        assert!(!is_marked, "{name} is a test build");
    }
    pod.remove()
}

/// In the order of [`PROCESSES`].
fn processes(pod: &CtrContainer) -> TestResult<[Process; 5]> {
    let (_, stand_in) = pod.status()?;
    let stand_in = Process::find(stand_in).ok_or_else(|| failure("no stand-in"))?;
    Ok([
        pod.process("vmm")?,
        pod.process("fsd")?,
        pod.process("proxy")?,
        pod.process("shim")?,
        stand_in,
    ])
}

/// The cells of each row, which are those of [`FACTS`] in their order.
fn rows_of_the_page() -> TestResult<Vec<Vec<String>>> {
    let mut rows = PAGE
        .lines()
        .filter(|line| line.starts_with('|'))
        .map(|line| {
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
        });
    let header = rows.next().ok_or_else(|| failure("no table"))?;
    assert_eq!(header[1..], PROCESSES);
    let (names, cells): (Vec<_>, Vec<_>) = rows
        .skip(1)
        .filter_map(|row| Some((row.first()?.clone(), row[1..].to_vec())))
        .unzip();
    assert_eq!(names, FACTS.map(|(name, _)| name));
    Ok(cells)
}

impl Seen {
    fn status(&self, key: &str) -> TestResult<String> {
        status(&self.process.read("status")?, key)
    }

    /// The kinds of its namespaces that are not among `others`.
    fn namespaces(&self, others: &[(String, PathBuf)]) -> TestResult<Vec<String>> {
        let own = namespaces(self.process.pid)?;
        let differ = own.into_iter().filter(|it| !others.contains(it));
        Ok(differ.map(|(kind, _)| kind).collect())
    }
}

fn status(text: &str, key: &str) -> TestResult<String> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let words = line.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    words.ok_or_else(|| failure(format!("no {key} in {text}")))
}

fn namespaces(pid: i32) -> TestResult<Vec<(String, PathBuf)>> {
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
    let read = |kind: &str| {
        Ok((
            kind.to_owned(),
            fs::read_link(format!("/proc/{pid}/ns/{kind}"))?,
        ))
    };
    kinds.into_iter().map(read).collect()
}

fn own_namespaces() -> TestResult<Vec<(String, PathBuf)>> {
    namespaces(std::process::id().cast_signed())
}

fn list(words: &[String]) -> String {
    match words {
        [] => "none".to_owned(),
        words => words.join(", "),
    }
}

fn user(it: &Seen) -> TestResult<String> {
    let ids = [it.status("Uid")?, it.status("Gid")?];
    if ids.iter().all(|ids| ids == "0 0 0 0") {
        return Ok("root".to_owned());
    }
    let id = ids[0].split(' ').next().unwrap_or_default();
    let is_own = ids.iter().all(|ids| *ids == [id; 4].join(" "));
    let mut others = Process::all()
        .into_iter()
        .filter(|other| *other != it.process);
    let is_unique = !others.any(|other| {
        let text = other.read("status").unwrap_or_default();
        status(&text, "Uid").is_ok_and(|ids| ids.split(' ').any(|other| other == id))
    });
    let is_free = (2_100_000_000..2_100_131_072).contains(&id.parse::<u32>()?);
    match is_own && is_free && is_unique && it.status("Groups")?.is_empty() {
        true => Ok("its own".to_owned()),
        false => Ok(format!("{ids:?} {}", it.status("Groups")?)),
    }
}

fn capabilities(it: &Seen, sets: &[&str]) -> TestResult<String> {
    let mut found = Vec::new();
    for set in sets {
        let bits = u64::from_str_radix(&it.status(set)?, 16)?;
        let all = status(&it.containerd.read("status")?, set)?;
        found.push(match bits == u64::from_str_radix(&all, 16)? {
            true => "all".to_owned(),
            false => {
                let names = CAPABILITIES.iter().enumerate();
                let has = names.filter(|(number, _)| bits & (1 << number) != 0);
                list(&has.map(|(_, name)| (*name).to_owned()).collect::<Vec<_>>())
            }
        });
    }
    found.dedup();
    Ok(found.join("; "))
}

fn no_new_privs(it: &Seen) -> TestResult<String> {
    Ok(match it.status("NoNewPrivs")?.as_str() {
        "0" => "no".to_owned(),
        _ => "yes".to_owned(),
    })
}

fn seccomp(it: &Seen) -> TestResult<String> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{}/task", it.process.pid))? {
        let text = fs::read_to_string(thread?.path().join("status"))?;
        found.push(match status(&text, "Seccomp")?.as_str() {
            "0" => "none",
            "2" => "filter",
            _ => "strict",
        });
    }
    found.sort_unstable();
    found.dedup();
    Ok(found.join(", "))
}

fn shared_with_shim(it: &Seen) -> TestResult<String> {
    let (others, shim) = (it.namespaces(&own_namespaces()?)?, namespaces(it.shim.pid)?);
    let own = it.namespaces(&shim)?;
    let shared = others.into_iter().filter(|kind| !own.contains(kind));
    Ok(list(&shared.collect::<Vec<_>>()))
}

fn root(it: &Seen) -> TestResult<String> {
    let path = PathBuf::from(format!("/proc/{}/root", it.process.pid));
    let [own, host] = [path.as_path(), Path::new("/")].map(fs::metadata);
    let (own, host) = (own?, host?);
    let mut names = Vec::new();
    for entry in fs::read_dir(&path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    let what = match names.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        _ if (own.dev(), own.ino()) == (host.dev(), host.ino()) => return Ok("the host's".into()),
        [] => "an empty directory".to_owned(),
        ["rootfs", "volumes"] => "the share".to_owned(),
        _ => list(&names),
    };
    let flags = rustix::fs::statvfs(&path)?.f_flag;
    Ok(match flags.contains(StatVfsMountFlags::RDONLY) {
        true => what + ", read-only",
        false => what,
    })
}

fn oom_score(it: &Seen) -> TestResult<String> {
    let score = score_of(&it.process)?;
    let containerd = score_of(&it.containerd)?;
    Ok(match score {
        SCORE => "the pod's".to_owned(),
        _ if score == containerd + 1 => "containerd's + 1".to_owned(),
        _ => score.to_string(),
    })
}

fn score_of(process: &Process) -> TestResult<i32> {
    Ok(process.read("oom_score_adj")?.trim().parse()?)
}

fn limit(it: &Seen, name: &str) -> TestResult<String> {
    let hard = |process: &Process| -> TestResult<String> {
        let text = process.read("limits")?;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        word.map(str::to_owned)
            .ok_or_else(|| failure(format!("no {name} in {text}")))
    };
    let (own, containerd) = (hard(&it.process)?, hard(&it.containerd)?);
    Ok(match own == containerd && own != "0" {
        true => "containerd's".to_owned(),
        false => own,
    })
}

/// How many threads of it run a vCPU.
fn vcpus(it: &Seen) -> TestResult<usize> {
    let mut count = 0;
    for thread in fs::read_dir(format!("/proc/{}/task", it.process.pid))? {
        let name = fs::read_to_string(thread?.path().join("comm"))?;
        count += usize::from(name.starts_with("vcpu"));
    }
    Ok(count)
}

/// The host's limit of the cgroup that holds all of a pod.
fn memory_max(pod: &CtrContainer) -> TestResult<u64> {
    let leaf = pod.process("vmm")?.read("cgroup")?;
    let leaf = leaf.trim().strip_prefix("0::").unwrap_or_default();
    let cgroup = Path::new(leaf)
        .parent()
        .map_or("", |it| it.to_str().unwrap_or_default());
    let read = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup{cgroup}/{file}"));
    assert_eq!(read("memory.oom.group")?, "1\n");
    let max = read("memory.max")?;
    max.trim()
        .parse()
        .map_err(|_| failure(format!("memory.max of {cgroup} is {max}")))
}

/// Also a pod without a limit, and one that may write to memory of the host.
#[test]
fn every_pod_has_a_memory_limit() -> TestResult {
    kata_like_only!();
    const MIB: u64 = 1 << 20;
    let overhead = |guest: u64| 96 * MIB + guest / 128;
    let host = Host::shared()?;
    let plain = host.start("plain", &[], &["sleep", "1000"])?;
    let (default, roots) = (2048 * MIB, memory_of_roots()?);
    let wanted = 2 * default + overhead(default) + roots;
    assert_eq!(memory_max(&plain)?, wanted, "memory_mib is 2048");
    plain.remove()?;

    let place = Directory::new(&host)?;
    let tmpfs = place.join("memory");
    fs::create_dir(&tmpfs)?;
    let size = c"size=48m";
    rustix::mount::mount("none", &tmpfs, "tmpfs", MountFlags::empty(), size)?;
    let mounts = ["/written:rbind:rw", "/read:rbind:ro", "/file:rbind:rw"].map(|mount| {
        let (target, options) = mount.split_once(':').unwrap_or_default();
        bind(&tmpfs, target, options)
    });
    let mut options = vec!["--memory-limit", "134217728"];
    for mount in &mounts {
        options.extend(["--mount", mount]);
    }
    let result = (|| {
        let pod = host.start("limited", &options, &["sleep", "1000"])?;
        let guest = 258 * MIB;
        assert_eq!(
            memory_max(&pod)?,
            guest + overhead(guest) + roots + 48 * MIB
        );
        pod.remove()
    })();
    rustix::mount::unmount(&tmpfs, UnmountFlags::DETACH)?;
    result
}

/// The pod's processes but for the shim have one score: the highest of the containers.
#[test]
fn the_pod_s_score_follows_its_containers() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod = ShimPod::start(&host)?;
    let start = |score: Option<i32>| -> TestResult<Task> {
        let mut spec = pod.spec(&["sleep", "1000"]);
        if let Some(score) = score {
            spec["process"]["oomScoreAdj"] = score.into();
        }
        let task = pod.task("scored");
        done(task.create(&spec, &Streams::default())?)?;
        done(task.start("")?)?;
        Ok(task)
    };
    let end = |task: Task| -> TestResult {
        done(task.kill("", 9, true)?)?;
        done(task.wait("")?)?;
        done(task.delete("")?).map(drop)
    };
    let shim = score_of(&pod.first().process("shim")?)?;
    let scores = || -> TestResult<i32> {
        let mut found = Vec::new();
        let (_, sandbox) = pod.first().status()?;
        let names = ["vmm", "fsd", "proxy"].map(|role| pod.first().process(role));
        let names: Vec<Process> = names.into_iter().collect::<TestResult<_>>()?;
        let stand_ins = Process::all().into_iter().filter(|it| {
            it.name == "stand-in" && (it.pid == sandbox || it.parent == names[0].parent)
        });
        for process in names.iter().cloned().chain(stand_ins) {
            found.push(score_of(&process)?);
        }
        found.dedup();
        match found[..] {
            [score] => Ok(score),
            _ => Err(failure(format!("many scores: {found:?}"))),
        }
    };
    assert_eq!(scores()?, 0, "a pod that has begun");
    let guaranteed = start(Some(-997))?;
    assert_eq!(scores()?, -997);
    let burstable = start(Some(900))?;
    assert_eq!(scores()?, 900);
    let best_effort = start(Some(1000))?;
    assert_eq!(scores()?, 1000);
    end(best_effort)?;
    assert_eq!(scores()?, 900);
    end(burstable)?;
    assert_eq!(scores()?, -997);
    end(guaranteed)?;
    assert_eq!(scores()?, -997, "what was used is still there");
    let lowest = start(Some(-1000))?;
    assert_eq!(scores()?, -997);
    let plain = start(None)?;
    assert_eq!(scores()?, 0);
    end(lowest)?;
    end(plain)?;
    assert_eq!(score_of(&pod.first().process("shim")?)?, shim);
    pod.remove()
}
