//! What containers have written is on the host when they have ended, however they end.
//!
//! Each stores through shared mappings without a sync: such data is in the guest alone. Everything
//! except what concerns the VM also runs against runc.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use kata_like_tests::disk::LoopDevice;
use kata_like_tests::probe::{TOOL, Tool, check_stored};
use kata_like_tests::process::until;
use kata_like_tests::{
    Call, CtrContainer, Directory, Host, Parts, TestResult, failure, figures, is_oracle,
    kata_like_only,
};
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

/// What the shim says when it has not waited for a guest to write back
/// (`shim-v2/src/vm/ending.rs`).
const CUT_OFF: &str = "the guest is stopped before it has written everything back";

/// How many files a container has looked at before it ends.
const FILES: usize = 20_000;

/// A pod's root on the host. An open directory keeps it, even if it is unmounted.
struct Root(File);

impl Root {
    fn of(pod: &CtrContainer) -> TestResult<Self> {
        let roots = match is_oracle() {
            true => PathBuf::from(format!("/proc/{}/root", pod.status()?.1)),
            false => {
                let fsd = pod.process("fsd")?;
                let all = fs::read_dir(format!("/proc/{}/root/rootfs", fsd.pid))?;
                let mut all = all.flatten().map(|entry| entry.path());
                all.next().ok_or_else(|| failure("no root"))?
            }
        };
        Ok(Self(File::open(roots)?))
    }

    fn join(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(name)
    }
}

/// A pod whose process has stored `bytes` bytes on the root and on the volume, has looked at all
/// files of the volume, and waits.
fn stored<'host>(
    host: &'host Host,
    volume: &Directory,
    tool: &Tool,
    bytes: u64,
) -> TestResult<(CtrContainer<'host>, Root)> {
    let (data, tool) = (volume.at("/data", "rbind:rw"), tool.mount());
    let options = ["--mount", data.as_str(), "--mount", tool.as_str()];
    let script = format!(
        "find /data/many | wc -l >/data/seen
        {TOOL} store /root-file {bytes} hold >/data/root.said &
        until grep -q stored /data/root.said; do sleep 0.1; done
        exec {TOOL} store /data/file {bytes} hold >/data/said"
    );
    let pod = host.start("stored", &options, &["sh", "-c", &script])?;
    let root = Root::of(&pod)?;
    until("all is stored", 120 * SECOND, || {
        fs::read_to_string(volume.join("said")).is_ok_and(|said| said == "stored\n")
    })?;
    Ok((pod, root))
}

fn check(volume: &Directory, root: &Root, bytes: u64) -> TestResult {
    check_stored(&volume.join("file"), bytes)?;
    check_stored(&root.join("root-file"), bytes)
}

fn make_files(volume: &Directory) -> TestResult {
    for directory in 0..FILES / 200 {
        let directory = volume.join(&format!("many/{directory}"));
        fs::create_dir_all(&directory)?;
        for file in 0..199 {
            fs::write(directory.join(file.to_string()), "")?;
        }
    }
    Ok(())
}

/// 64 MiB and 20,000 inodes that the guest knows: a kill, and a deletion by force.
#[test]
fn a_killed_container_loses_nothing() -> TestResult {
    let host = Host::shared()?;
    let tool = Tool::new(&host)?;
    let mut parts = Parts::new();
    for (name, by_force) in [("killed and deleted", false), ("deleted by force", true)] {
        parts.run(name, || {
            let volume = Directory::new(&host)?;
            make_files(&volume)?;
            let (pod, root) = stored(&host, &volume, &tool, 32 * MIB)?;
            let seen = fs::read_to_string(volume.join("seen"))?;
            assert_eq!(seen.trim(), (FILES + 1).to_string());
            let begun = std::time::Instant::now();
            if !by_force {
                assert_eq!(pod.kill("SIGKILL")?.status, 0);
                pod.wait_status("STOPPED", 120 * SECOND)?;
                check(&volume, &root, 32 * MIB)?;
            }
            pod.remove()?;
            figures::note(&format!(
                "64 MiB stored and 20,000 inodes looked at, {name}: {:.1} s",
                begun.elapsed().as_secs_f32()
            ));
            check(&volume, &root, 32 * MIB)
        });
    }
    parts.run("the log", || no_guest_was_cut_off(&host, "stored-"));
    parts.end()
}

/// `nerdctl commit`, Docker's and BuildKit's: the container is paused, and its root is read on the
/// host.
#[test]
fn a_paused_container_has_written_all() -> TestResult {
    let host = Host::shared()?;
    let (volume, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    fs::create_dir(volume.join("many"))?;
    let (pod, root) = stored(&host, &volume, &tool, 4 * MIB)?;
    host.ctr(["task", "pause", pod.id()]).ok()?;
    check(&volume, &root, 4 * MIB)?;
    host.ctr(["task", "resume", pod.id()]).ok()?;
    pod.remove()
}

/// A process stores data and is then killed for memory.
#[test]
fn a_container_killed_for_memory_loses_nothing() -> TestResult {
    let host = Host::shared()?;
    let (volume, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let (data, tool) = (volume.at("/data", "rbind:rw"), tool.mount());
    let limit = (64 * MIB).to_string();
    let options = ["--mount", &data, "--mount", &tool, "--memory-limit", &limit];
    let events = host.events()?;
    let bytes = (8 * MIB).to_string();
    let command = [TOOL, "store", "/data/file", &bytes, "eat"];
    let pod = host.start("eats", &options, &command)?;
    assert_eq!(events.exit(pod.id(), pod.id(), 120 * SECOND)?.status(), 137);
    check_stored(&volume.join("file"), 8 * MIB)?;
    pod.remove()
}

/// A file system that a container has mounted from a disk, with everything that its kernel keeps
/// for it.
#[test]
fn a_disk_s_file_system_is_whole_when_its_container_was_killed() -> TestResult {
    let host = Host::shared()?;
    let (volume, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let image = volume.join("image");
    File::create(&image)?.set_len(32 * MIB)?;
    run("mkfs.ext4", &["-q", &image.display().to_string()])?;
    let disk = LoopDevice::attach(&image)?;
    let (data, tool) = (volume.at("/data", "rbind:rw"), tool.mount());
    let options = [
        "--mount",
        &data,
        "--mount",
        &tool,
        "--device",
        disk.path(),
        "--cap-add",
        "CAP_SYS_ADMIN",
    ];
    let script = format!(
        "mkdir /disk; mount -t ext4 {} /disk; seq 1000 >/disk/numbers
        exec {TOOL} store /disk/file {} hold >/data/said",
        disk.path(),
        4 * MIB
    );
    let pod = host.start("disk", &options, &["sh", "-c", &script])?;
    until("all is stored", 120 * SECOND, || {
        fs::read_to_string(volume.join("said")).is_ok_and(|said| said == "stored\n")
    })?;
    assert_eq!(pod.kill("SIGKILL")?.status, 0);
    pod.wait_status("STOPPED", 120 * SECOND)?;
    pod.remove()?;
    let there = volume.join("mounted");
    fs::create_dir(&there)?;
    run(
        "mount",
        &["-o", "ro,noload", disk.path(), &there.display().to_string()],
    )?;
    let whole = check_stored(&there.join("file"), 4 * MIB).and_then(|()| {
        let numbers = fs::read_to_string(there.join("numbers"))?;
        assert_eq!(numbers.lines().count(), 1000);
        Ok(())
    });
    run("umount", &[&there.display().to_string()])?;
    whole
}

fn run(program: &str, arguments: &[&str]) -> TestResult {
    let mut command = Command::new(program);
    command.args(arguments);
    Call::new(command).ok().map(drop)
}

/// The file server stands still while a killed process has something to write. The pod is given up
/// after a minute; the log names it and what is lost, and none of its processes stays. Other pods
/// go on meanwhile.
#[test]
fn a_guest_that_gets_no_further_is_cut_off_and_named() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let events = host.events()?;
    let (volume, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let (data, mount) = (volume.at("/data", "rbind:rw"), tool.mount());
    let options = ["--mount", data.as_str(), "--mount", mount.as_str()];
    let script = format!("exec {TOOL} store /data/file {MIB} hold >/data/said");
    let pod = host.start("stuck", &options, &["sh", "-c", &script])?;
    let (fsd, vmm) = (pod.process("fsd")?, pod.process("vmm")?);
    let state = pod.state_folder();
    until("all is stored", 120 * SECOND, || {
        fs::read_to_string(volume.join("said")).is_ok_and(|said| said == "stored\n")
    })?;
    fsd.signal(Signal::STOP)?;
    assert_eq!(pod.kill("SIGKILL")?.status, 0);
    let exit = events.exit(pod.id(), pod.id(), 150 * SECOND)?;
    assert_eq!(exit.status(), 137);
    assert_eq!(pod.status()?.0, "STOPPED");
    let mut line = String::new();
    until("the log says what is lost", 60 * SECOND, || {
        let log = host.log();
        let found = log
            .lines()
            .find(|line| line.contains(CUT_OFF) && line.contains(pod.id()));
        line = found.unwrap_or_default().to_owned();
        !line.is_empty()
    })?;
    let bytes = line.split_once(" bytes are lost").map(|(before, _)| before);
    let bytes = bytes.and_then(|before| before.rsplit(' ').next());
    let bytes: u64 = bytes.ok_or_else(|| failure(line.clone()))?.parse()?;
    assert!(bytes > 0 && bytes <= 2 * MIB, "{line}");
    assert_eq!(pod.delete()?, 137);
    assert!(!fsd.is_alive() && !vmm.is_alive() && !state.exists());
    Ok(())
}

/// Twelve pods at once on one CPU: each ends by itself and writes back its data; none is cut off.
#[test]
fn a_loaded_host_cuts_nobody_off() -> TestResult {
    const COUNT: usize = 12;
    let host = Host::alone()?;
    let (volume, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let (data, tool) = (volume.at("/data", "rbind:rw"), tool.mount());
    let bytes = 2 * MIB;
    let begun = std::time::Instant::now();
    let one = |number: usize| -> TestResult {
        let options = ["--mount", data.as_str(), "--mount", tool.as_str()];
        let (path, bytes) = (format!("/data/{number}"), bytes.to_string());
        let command = [TOOL, "store", &path, &bytes, "end"];
        host.run(&host.name("loaded"), &options, &command).ok()?;
        Ok(())
    };
    thread::scope(|scope| {
        let all: Vec<_> = (0..COUNT).map(|n| scope.spawn(move || one(n))).collect();
        all.into_iter()
            .try_for_each(|one| one.join().map_err(|_| failure("a thread panicked"))?)
    })?;
    figures::note(&format!(
        "{COUNT} containers at once that store {} MiB each: {:.1} s",
        bytes / MIB,
        begun.elapsed().as_secs_f32()
    ));
    for number in 0..COUNT {
        check_stored(&volume.join(&number.to_string()), bytes)?;
    }
    no_guest_was_cut_off(&host, "loaded-")
}

/// For pods whose names begin with `stem`.
fn no_guest_was_cut_off(host: &Host, stem: &str) -> TestResult {
    let log = host.log();
    let cut = log
        .lines()
        .find(|line| line.contains(CUT_OFF) && line.contains(stem));
    match cut {
        None => Ok(()),
        Some(line) => Err(failure(line)),
    }
}
