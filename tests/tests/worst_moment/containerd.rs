//! containerd is killed and restarted under a pod that writes all the while. It also measures how
//! old a store through a mapping gets before the host has it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::{
    CtrContainer, Directory, Host, TestResult, failure, figures, kata_like_only,
};
use rustix::process::Signal;

use crate::machine::until;
use crate::records::{Checked, Mapped, Told};
use crate::rounds::{FILES, path};
use crate::{Chance, MAPPED_BOUND, rounds};

/// The writers' mapped files: on the root and on the volume.
const MAPPED: [&str; 2] = ["mapped:/mapped", "mapped:/data/mapped"];

/// Milliseconds between two records of a file: the pod lives for minutes.
const PACE: &str = "25";

/// The longest time from containerd's answer to its death, and from that to its return.
const LONGEST: Duration = Duration::from_millis(600);

/// Where the host has the files of the pod.
struct Files {
    volume: PathBuf,
    /// Keeps the root's mount, even if it is unmounted.
    root: File,
}

impl Files {
    fn new(pod: &CtrContainer, volume: &Directory) -> TestResult<Self> {
        let fsd = pod.process("fsd")?;
        let mut roots = fs::read_dir(format!("/proc/{}/root/rootfs", fsd.pid))?;
        let root = roots.next().ok_or_else(|| failure("no root"))??.path();
        Ok(Self {
            volume: volume.join(""),
            root: File::open(root)?,
        })
    }

    fn on_host(&self, file: &str) -> PathBuf {
        match path(file).strip_prefix("/data/") {
            Some(name) => self.volume.join(name),
            None => PathBuf::from(format!(
                "/proc/self/fd/{}{}",
                self.root.as_raw_fd(),
                path(file)
            )),
        }
    }
}

/// Looks at the mapped files until it is stopped: a kill at that moment would leave what is in the
/// host's page cache.
fn watch(output: &std::path::Path, files: &Files, stop: &AtomicBool) -> TestResult<Vec<Mapped>> {
    let mut told = Told::new(output)?;
    let mut all: Vec<Mapped> = MAPPED
        .iter()
        .enumerate()
        .map(|(place, file)| Mapped::new(files.on_host(file), FILES.len() + place))
        .collect();
    loop {
        let last = stop.load(Ordering::SeqCst);
        told.read()?;
        for mapped in &mut all {
            mapped.look(&told, Instant::now())?;
        }
        if last {
            return Ok(all);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Everything acknowledged earlier is there, and the writers go on.
fn check(told: &mut Told, files: &Files, checked: &mut [Checked; FILES.len()]) -> TestResult {
    told.read()?;
    for (place, (file, checked)) in FILES.iter().zip(checked).enumerate() {
        checked.go_on(&files.on_host(file))?;
        if checked.whole < told.last(place) {
            let (whole, last) = (checked.whole, told.last(place));
            return Err(failure(format!("{file}: {whole} records of {last}")));
        }
    }
    match told.errors().is_empty() {
        true => Ok(()),
        false => Err(failure(format!(
            "the writers were told {:?}",
            told.errors()
        ))),
    }
}

/// Waits until each writer has come further.
fn wait_for_more(told: &mut Told) -> TestResult {
    let before: Vec<u64> = (0..FILES.len()).map(|place| told.last(place)).collect();
    until("all writers go on", || {
        told.read()?;
        Ok(before
            .iter()
            .enumerate()
            .all(|(place, last)| told.last(place) > *last))
    })
}

/// One round in four. The pod is the same all the time; in the end its VMM is killed.
#[test]
fn containerd_dies_and_the_pod_writes_on() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let (volume, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let before = host.footprint();
    let output = volume.join("../").join(host.name("output"));
    let log = format!("file://{}", output.display());
    let (data, tool) = (volume.at("/data", "rbind:rw"), tool.mount());
    let options = ["--mount", &data, "--mount", &tool, "--log-uri", &log];
    let mut command = vec![TOOL, "records", PACE];
    command.extend(FILES.iter().chain(&MAPPED));
    let pod = host.start("writes", &options, &command)?;
    let files = Files::new(&pod, &volume)?;
    let stop = AtomicBool::new(false);
    let (all, took) = thread::scope(|scope| -> TestResult<_> {
        let watching = scope.spawn(|| watch(&output, &files, &stop));
        let result = kill_often(&host, &pod, &files, &output);
        stop.store(true, Ordering::SeqCst);
        let all = watching
            .join()
            .map_err(|_| failure("the watch panicked"))??;
        Ok((all, result?))
    })?;
    for (mapped, file) in all.iter().zip(MAPPED) {
        assert!(mapped.stored() > 100, "{file}: {}", mapped.stored());
        figures::note(&format!(
            "{file}: of {} numbers stored within {:.1} s none was older than {:.1} s when it came to the host",
            mapped.stored(),
            took.as_secs_f32(),
            mapped.oldest.as_secs_f32()
        ));
        assert!(mapped.oldest < MAPPED_BOUND, "{file}: {:?}", mapped.oldest);
    }
    fs::remove_file(&output)?;
    drop(files);
    pod.remove()?;
    host.leaves_nothing_but_containerd(&before)
}

fn kill_often(
    host: &Host,
    pod: &CtrContainer,
    files: &Files,
    output: &std::path::Path,
) -> TestResult<Duration> {
    let mut chance = Chance::new("containerd")?;
    let mut told = Told::new(output)?;
    let mut checked = [Checked::default(); FILES.len()];
    wait_for_more(&mut told)?;
    let (begun, kills) = (Instant::now(), rounds()?.div_ceil(5));
    let status = pod.status()?;
    for number in 0..kills {
        let round = || -> TestResult {
            thread::sleep(chance.up_to(LONGEST));
            host.kill_containerd()?;
            wait_for_more(&mut told)?;
            check(&mut told, files, &mut checked)?;
            thread::sleep(chance.up_to(LONGEST));
            host.start_containerd()?;
            assert_eq!(pod.status()?, status, "what containerd knows of the pod");
            check(&mut told, files, &mut checked)
        };
        let mut round = round;
        round().map_err(|error| failure(format!("containerd's death {number}: {error}")))?;
    }
    let took = begun.elapsed();
    wait_for_more(&mut told)?;
    pod.process("vmm")?.signal(Signal::KILL)?;
    pod.wait_status("STOPPED", Duration::from_secs(60))?;
    check(&mut told, files, &mut checked)?;
    figures::note(&format!(
        "{kills} kills of containerd under writers: {:.1} s, {} records acknowledged and there",
        took.as_secs_f32(),
        (0..FILES.len()).map(|place| told.last(place)).sum::<u64>()
    ));
    Ok(took)
}
