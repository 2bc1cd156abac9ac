//! The disk below fails while pods write: the writer hears of it, and what `fsync` has acknowledged
//! is on the disk.
//!
//! ext4 on a loop device is shut down as by a power cut (EXT4_IOC_SHUTDOWN without a flush of its
//! journal, as file systems' own tests use it). From then on it refuses everything; mounted again,
//! it holds what had reached the device. No kill of a process can show this.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::probe::Tool;
use kata_like_tests::{Call, Directory, Host, TestResult, failure, figures, kata_like_only};

use crate::machine::{Ground, until};
use crate::records::{Checked, Told};
use crate::rounds::{FILES, command, lower, path};

/// How long pods write to it.
const LIFE: Duration = Duration::from_secs(1);

/// A file system on a loop device, unmounted with the value.
struct Disk {
    image: PathBuf,
    place: PathBuf,
}

impl Disk {
    fn new(directory: &Directory) -> TestResult<Self> {
        let disk = Self {
            image: directory.join("image"),
            place: directory.join("disk"),
        };
        File::create(&disk.image)?.set_len(256 << 20)?;
        let mut make = Command::new("mkfs.ext4");
        make.args(["-q", "-F", "-E", "lazy_itable_init=1"])
            .arg(&disk.image);
        Call::new(make).ok()?;
        fs::create_dir(&disk.place)?;
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&self) -> TestResult {
        let mut mount = Command::new("mount");
        // By itself it commits its journal after ten minutes.
        mount
            .args(["-o", "loop,commit=600"])
            .arg(&self.image)
            .arg(&self.place);
        Call::new(mount).ok().map(drop)
    }

    fn unmount(&self) -> TestResult {
        let mut unmount = Command::new("umount");
        unmount.arg(&self.place);
        Call::new(unmount).ok().map(drop)
    }

    /// Makes everything so far durable.
    fn sync(&self) -> TestResult {
        Ok(rustix::fs::syncfs(File::open(&self.place)?)?)
    }

    /// From now on nothing reaches the device.
    fn cut_power(&self) -> TestResult {
        const SHUTDOWN: libc::c_ulong = 0x8004_587d; // _IOR('X', 125, __u32) in fs/ext4/ext4.h
        let without_log: u32 = 2;
        let top = File::open(&self.place)?;
        // SAFETY: the kernel reads a number that lives.
        match unsafe { libc::ioctl(top.as_raw_fd(), SHUTDOWN, &raw const without_log) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.place).output();
    }
}

fn whole(place: &Path, file: &str) -> TestResult<u64> {
    let mut checked = Checked::default();
    let on_host = match path(file).strip_prefix("/data") {
        Some(rest) => format!("volume{rest}"),
        None => format!("upper{}", path(file)),
    };
    checked.go_on(&place.join(on_host))?;
    Ok(checked.whole)
}

#[test]
fn what_fsync_acknowledged_was_on_the_disk_and_a_dead_disk_is_an_error() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let (directory, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let ground = Ground::new(&host, &lower(&directory, &tool)?, None)?;
    let before = host.footprint();
    let begun = Instant::now();
    let disk = Disk::new(&directory)?;
    let place = disk.place.join("place");
    for name in ["upper", "work", "volume"] {
        fs::create_dir_all(place.join(name))?;
    }
    disk.sync()?;
    let machine = ground.start(&host.name("disk"), &place, &command(), &[])?;
    let mut told = Told::new(machine.output())?;
    until("all writers have begun", || {
        told.read()?;
        Ok((0..FILES.len()).all(|place| told.last(place) > 0))
    })?;
    thread::sleep(LIFE);
    disk.cut_power()?;
    until("each writer is told", || {
        told.read()?;
        Ok(told.errors().len() == FILES.len())
    })
    .map_err(|error| failure(format!("{error}: {:?}", told.errors())))?;
    assert!(
        told.errors().values().all(|error| error == "EIO"),
        "{:?}",
        told.errors()
    );
    machine.kill("vmm")?;
    drop(machine);
    disk.unmount()?;
    disk.mount()?;
    let mut there = Vec::new();
    for (number, file) in FILES.iter().enumerate() {
        let (acknowledged, whole) = (told.last(number), whole(&place, file)?);
        there.push(format!("{file}: {whole} of {acknowledged}"));
        // The loss of the writer that never syncs shows that the power was cut.
        if file.starts_with("synced") && whole < acknowledged
            || file.starts_with("plain") && whole >= acknowledged
        {
            return Err(failure(there.join(", ")));
        }
    }
    figures::note(&format!(
        "records on the disk of those acknowledged before a power cut: {} ({:.1} s)",
        there.join(", "),
        begun.elapsed().as_secs_f32()
    ));
    drop(disk);
    host.leaves_nothing(&before)
}
