//! Hosts that are slow, nested or lack something: a start takes as long as it must, and no longer.
//!
//! A guest that makes progress is waited for. One that does not is given up, with the step that it
//! has reached. Users of nested hosts have met runtimes that gave up after a fixed time, or that
//! needed a module which their host lacked.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::process::{Process, until};
use kata_like_tests::{Host, TestResult, failure, figures, in_time, kata_like_only};
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);
/// How long the guest of these tests may show no progress.
const PATIENCE: Duration = Duration::from_secs(3);

fn configuration(host: &Host) -> TestResult<String> {
    let path = format!("/run/{}.toml", host.name("patience"));
    let lines = format!(
        "max_vcpus = 1\nboot_deadline_seconds = {}\n",
        PATIENCE.as_secs()
    );
    fs::write(&path, lines)?;
    Ok(path)
}

/// A cgroup whose processes get two fifths of one CPU.
struct Slow {
    name: String,
}

impl Slow {
    fn new(host: &Host) -> TestResult<Self> {
        let slow = Self {
            name: host.name("slow"),
        };
        fs::create_dir(slow.path())?;
        fs::write(slow.path().join("cpu.max"), "40000 100000")?;
        Ok(slow)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/sys/fs/cgroup").join(&self.name)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.path());
    }
}

/// The boot takes several times the patience (on the emulated host; hardware is faster than any
/// quota), and yet the container runs: the guest's progress counts.
#[test]
fn a_guest_that_boots_slowly_is_waited_for() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    let slow = Slow::new(&host)?;
    let config = configuration(&host)?;
    let id = host.name("crawls");
    let cgroup = format!("/{}/{id}", slow.name);
    let options = ["--runtime-config-path", &config, "--cgroup", &cgroup];
    let output = host.run(&id, &options, &["echo", "at last"]).ok()?;
    assert_eq!(output.text(), "at last");
    figures::note(&format!(
        "a start on two fifths of a CPU: {:.1} s",
        output.took.as_secs_f32()
    ));
    if std::env::var("TEST_HOST").is_ok_and(|kind| kind == "emulated") {
        assert!(output.took > PATIENCE * 2, "only {:?}", output.took);
    }
    drop(slow);
    host.leaves_nothing(&before)
}

/// A VMM is stopped in the middle of its guest's boot. The start fails when the patience is over;
/// its one line has the finished steps with their times, and nothing stays.
#[test]
fn a_guest_that_stands_still_is_given_up() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    let config = configuration(&host)?;
    let call = host.run(
        &host.name("stands"),
        &["--runtime-config-path", &config],
        &["true"],
    );
    let running = thread::spawn(move || call.output());
    let stopped = stop_booting_vmm()?;
    let output = running
        .join()
        .map_err(|_| failure("the thread of ctr panicked"))??;
    let took = stopped.elapsed();
    assert_ne!(output.status, 0, "it ran: {}", output.both());
    let line = output.error_text();
    assert_eq!(line.lines().count(), 1, "not one line: {line}");
    for words in [
        "start sandbox",
        "no progress for 3s",
        "where it stands is not known",
        "done before: read ",
    ] {
        assert!(line.contains(words), "no {words:?} in: {line}");
    }
    // Each call that a stopped VMM does not answer is also waited for, for a while.
    assert!(
        in_time(took, PATIENCE + 12 * SECOND),
        "after {took:?}: {line}"
    );
    host.leaves_nothing(&before)
}

/// Stops the only VMM once its vCPUs run; returns the moment.
fn stop_booting_vmm() -> TestResult<Instant> {
    let mut vmm = None;
    until("a VMM whose guest boots", 60 * SECOND, || {
        let of_vmm = |process: &Process| process.is("kata-like-vmm");
        vmm = Process::all().into_iter().find(of_vmm);
        let status = vmm.as_ref().and_then(|vmm| vmm.read("status").ok());
        let threads = status.as_deref().and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("Threads:"));
            line?.trim().parse().ok()
        });
        threads.unwrap_or(0) > 1
    })?;
    thread::sleep(SECOND / 2); // some way into the boot
    let vmm = vmm.ok_or_else(|| failure("no VMM"))?;
    vmm.signal(Signal::STOP)?;
    Ok(Instant::now())
}

/// Our own processes serve vsock and the file systems: none has a vhost device open, and the test
/// host has not even loaded their modules.
#[test]
fn no_vhost_module_is_needed() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod = host.start("no-vhost", &[], &["sleep", "1000"])?;
    for role in ["shim", "vmm", "fsd", "proxy"] {
        let process = pod.process(role)?;
        let mut files = 0;
        for entry in fs::read_dir(format!("/proc/{}/fd", process.pid))?.flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            files += 1;
            assert!(
                !target.starts_with("/dev/vhost-net") && !target.starts_with("/dev/vhost-vsock"),
                "{role} has {} open",
                target.display()
            );
        }
        assert!(files > 0, "no open file of {role} was seen");
    }
    if std::env::var("TEST_HOST").is_ok_and(|kind| kind == "emulated") {
        let modules = fs::read_to_string("/proc/modules")?;
        let vhost = modules.lines().find(|line| line.starts_with("vhost"));
        assert_eq!(vhost, None);
    }
    pod.remove()
}
