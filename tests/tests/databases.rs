//! What databases need on volumes and on the root: locks that exclude other pods and the host,
//! shared mapped memory, and writes that survive any killed process.
//!
//! Everything except what concerns the VM also runs against runc.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::process::until;
use kata_like_tests::{CtrContainer, Directory, Host, Parts, TestResult, failure, is_oracle};
use rustix::fs::FlockOperation;
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);

/// Kinds of locks, each with a file of its name.
const KINDS: [&str; 3] = ["flock", "fcntl", "ofd"];

/// How long a lock is waited for, as `docs/limitations.md` says.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs a script and returns its lines.
fn lines(pod: &CtrContainer, script: &str) -> TestResult<Vec<String>> {
    let output = pod.exec_call(&[], &["sh", "-c", script]).ok()?;
    Ok(output.text().lines().map(str::to_owned).collect())
}

/// Waits until a killed process of the pod is gone. It may have no parent there that reaps it.
fn wait_for_end(pod: &CtrContainer, pid: &str) -> TestResult {
    let script = format!(
        "while kill -0 {pid} 2>/dev/null && ! grep -q 'State:.Z' /proc/{pid}/status; do sleep 0.1; done"
    );
    lines(pod, &script).map(drop)
}

/// Tries for a lock of each kind in the pod.
fn try_all(pod: &CtrContainer) -> TestResult<Vec<String>> {
    lines(
        pod,
        "for k in flock fcntl ofd; do /tool lock $k /data/$k try; done",
    )
}

/// Starts processes in the pod that do `how` to a lock of each kind. Each has said so in
/// `/data/NAME-KIND`. Returns their pids.
fn start_all(pod: &CtrContainer, how: &str, name: &str, word: &str) -> TestResult<String> {
    let script = format!(
        "for k in flock fcntl ofd; do /tool lock $k /data/$k {how} >/data/{name}-$k 2>&1 & echo $!; done; \
         until [ $(cat /data/{name}-* | grep -c {word}) = 3 ]; do sleep 0.1; done"
    );
    Ok(lines(pod, &script)?.join(" "))
}

/// What the processes of [`start_all`] have said.
fn told(volume: &Directory, name: &str) -> Vec<String> {
    KINDS
        .map(|kind| fs::read_to_string(volume.join(&format!("{name}-{kind}"))).unwrap_or_default())
        .to_vec()
}

/// Tries for a lock of each kind in the host's own processes.
fn host_tries(volume: &Directory) -> TestResult<Vec<Option<File>>> {
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    KINDS
        .iter()
        .map(|kind| {
            let path = volume.join(kind);
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            let got = match *kind {
                "flock" => rustix::fs::flock(&file, exclusive),
                _ => rustix::fs::fcntl_lock(&file, exclusive), // also excludes locks of open files
            };
            Ok(got.is_ok().then_some(file))
        })
        .collect()
}

/// Locks exclude across pods and the host; they end with their holder, with its pod, and whoever
/// waits gets them then. A database's log survives the kill of its writer, and that of the machine
/// below it.
#[test]
fn a_database_can_live_on_a_volume_and_on_the_root() -> TestResult {
    let host = Host::shared()?;
    let (volume, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    for kind in KINDS {
        fs::write(volume.join(kind), "")?;
    }
    let (data, tool) = (volume.at("/data", "rbind:rw"), tool.mount());
    let options = ["--mount", data.as_str(), "--mount", tool.as_str()];
    let one = host.start("one", &options, &["sleep", "1000"])?;
    let two = host.start("two", &options, &["sleep", "1000"])?;

    let mut parts = Parts::new();
    parts.run("locks of pods", || {
        locks_of_pods_exclude(&volume, &one, &two)
    });
    parts.run("locks of the host", || {
        let of_host = host_tries(&volume)?;
        assert!(of_host.iter().all(Option::is_some));
        assert_eq!(try_all(&one)?, ["EAGAIN"; 3]);
        drop(of_host);
        assert_eq!(try_all(&one)?, ["locked"; 3]);
        Ok(())
    });
    parts.run("a number behind a lock", || {
        whoever_has_the_lock_reads_what_was_written(&volume, &one, &two)
    });
    parts.run("mappings and unnamed files", || {
        mappings_and_unnamed_files(&volume, &one)
    });
    parts.run("deaths", || {
        the_dead_leave_logs_and_no_locks(&volume, &one, &two)
    });
    parts.run("the pods' end", || {
        two.remove()?;
        one.remove()
    });
    parts.end()
}

/// One pod holds, the other and the host can't have; who waits gets it when the holder is killed.
fn locks_of_pods_exclude(volume: &Directory, one: &CtrContainer, two: &CtrContainer) -> TestResult {
    let holders = start_all(one, "hold", "held", "locked")?;
    assert_eq!(try_all(two)?, ["EAGAIN"; 3]);
    assert!(host_tries(volume)?.iter().all(Option::is_none));
    start_all(two, "wait", "got", "waits")?;
    assert_eq!(told(volume, "got"), ["waits\n"; 3]);
    lines(one, &format!("kill -9 {holders}"))?;
    until("whoever waits has the lock", 60 * SECOND, || {
        told(volume, "got") == ["waits\nlocked\n"; 3]
    })
}

/// Waits that nobody ends, while a database is at work beside them; then its machine is killed.
fn the_dead_leave_logs_and_no_locks(
    volume: &Directory,
    one: &CtrContainer,
    two: &CtrContainer,
) -> TestResult {
    let holders = start_all(one, "hold", "again", "locked")?;
    let begun = Instant::now();
    start_all(two, "wait", "late", "waits")?;
    let script = "/tool lock flock /data/flock wait >/dev/null 2>&1 & kill -9 $!; echo $!";
    let killed = lines(two, script)?.join("");
    the_log_outlasts_its_writer(volume, one)?;
    if is_oracle() {
        lines(one, &format!("kill -9 {holders}"))?;
    } else {
        until("the waits end", 4 * PATIENCE, || {
            told(volume, "late") == ["waits\nEAGAIN\n"; 3]
        })
        .map_err(|error| failure(format!("{error}: {:?}", told(volume, "late"))))?;
        assert!(begun.elapsed() >= PATIENCE, "{:?}", begun.elapsed());
        wait_for_end(two, &killed)?;
        the_log_outlasts_the_machine(volume, one)?;
        until("the locks of the dead pod are gone", 10 * SECOND, || {
            host_tries(volume).is_ok_and(|all| all.iter().all(Option::is_some))
        })?;
        assert_eq!(try_all(two)?, ["locked"; 3]);
    }
    Ok(())
}

/// Both pods have the file open all the time, and pages of it: no number is lost.
fn whoever_has_the_lock_reads_what_was_written(
    volume: &Directory,
    one: &CtrContainer,
    two: &CtrContainer,
) -> TestResult {
    const TIMES: u64 = 30;
    fs::write(volume.join("number"), [0; 8])?;
    let count = |pod: &CtrContainer| -> TestResult {
        let counted = pod.exec_call(&[], &[TOOL, "count", "/data/number", &TIMES.to_string()]);
        let last = counted.ok()?.text();
        last.parse::<u64>().map(drop).map_err(|_| failure(last))
    };
    thread::scope(|scope| {
        let first = scope.spawn(|| count(one));
        let second = count(two);
        first
            .join()
            .map_err(|_| failure("a counter panicked"))?
            .and(second)
    })?;
    let mut number = [0; 8];
    File::open(volume.join("number"))?.read_exact(&mut number)?;
    assert_eq!(u64::from_le_bytes(number), 2 * TIMES);
    Ok(())
}

/// Shared and written mapped memory. Unnamed files are refused, as on many file systems.
fn mappings_and_unnamed_files(volume: &Directory, pod: &CtrContainer) -> TestResult {
    let script =
        "/tool map /data/mapped; /tool map /tmp/mapped; /tool unnamed /data; /tool unnamed /tmp";
    let unnamed = if is_oracle() { "made" } else { "EOPNOTSUPP" };
    assert_eq!(lines(pod, script)?, ["mapped", "mapped", unnamed, unnamed]);
    assert!(fs::read(volume.join("mapped"))?.starts_with(b"through the mapping"));
    Ok(())
}

/// How many frames the writer of this log was told to be durable.
fn acknowledged(volume: &Directory, log: &str) -> u64 {
    let text = fs::read_to_string(volume.join(&format!("{log}.done"))).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let last = whole.lines().last().unwrap_or_default();
    last.parse().unwrap_or(0)
}

fn wait_for_frames(volume: &Directory, log: &str, frames: u64) -> TestResult {
    until("the log grows", 60 * SECOND, || {
        acknowledged(volume, log) >= frames
    })
}

/// One log on the volume and one on the root. The volume's log loses its writer and is whole; the
/// next writer goes on with it.
fn the_log_outlasts_its_writer(volume: &Directory, pod: &CtrContainer) -> TestResult {
    fs::create_dir(volume.join("volume"))?;
    let script = "mkdir /tmp/root; /tool log-write /tmp/root /data/root.done >/data/root.error 2>&1 & \
        /tool log-write /data/volume /data/volume.done >/data/volume.error 2>&1 & echo $!";
    let writer = lines(pod, script)?.join("");
    wait_for_frames(volume, "volume", 10)?;
    lines(pod, &format!("kill -9 {writer}"))?;
    wait_for_end(pod, &writer)?;
    let script = "/tool log-check /data/volume";
    let checked = lines(pod, script)?.join("");
    let done = acknowledged(volume, "volume");
    let counts: Vec<u64> = checked
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [whole, known] = counts[..] else {
        return Err(failure(checked));
    };
    assert!(
        whole >= known && known >= done && done >= 10,
        "{checked}, {done}"
    );
    let script = "/tool log-write /data/volume /data/volume.done >/data/volume.error 2>&1 & echo";
    lines(pod, script)?;
    wait_for_frames(volume, "volume", whole + 10)?;
    wait_for_frames(volume, "root", 10)
}

/// The machine is killed while both logs are written: everything promised is on the host.
fn the_log_outlasts_the_machine(volume: &Directory, pod: &CtrContainer) -> TestResult {
    let fsd = pod.process("fsd")?;
    let roots = fs::read_dir(format!("/proc/{}/root/rootfs", fsd.pid))?;
    let roots: Vec<PathBuf> = roots
        .map(|entry| Ok(entry?.path()))
        .collect::<TestResult<_>>()?;
    let [root] = &roots[..] else {
        return Err(failure(format!("the roots of one container: {roots:?}")));
    };
    let root = File::open(root)?; // keeps the mount, even if it is unmounted
    pod.process("vmm")?.signal(Signal::KILL)?;
    pod.wait_status("STOPPED", 60 * SECOND)?;
    let root = PathBuf::from(format!("/proc/self/fd/{}/tmp/root", root.as_raw_fd()));
    for (log, directory) in [("volume", volume.join("volume")), ("root", root)] {
        let (done, whole) = (acknowledged(volume, log), whole_frames(&directory)?);
        assert!(done >= 10 && whole >= done, "{log}: {whole} of {done}");
    }
    Ok(())
}

/// Frames as in `tests/probe/src/tools/log.rs`.
fn whole_frames(directory: &Path) -> TestResult<u64> {
    let frames = fs::read(directory.join("frames"))?;
    let whole = (1..)
        .zip(frames.chunks(4096))
        .take_while(|(number, frame)| {
            let (Some(head), Some(sum), Some(rest)) =
                (frame.get(..8), frame.get(8..16), frame.get(16..))
            else {
                return false;
            };
            let bytes = head.iter().chain(rest);
            let wanted = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
                (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
            });
            frame.len() == 4096 && head == u64::to_le_bytes(*number) && sum == wanted.to_le_bytes()
        });
    Ok(whole.count() as u64)
}
