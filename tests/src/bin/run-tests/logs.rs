//! What a failure leaves: what the tests printed, the log of containerd and its shims, each guest's
//! own log.
//!
//! All of it is in `target/test-run/logs/BINARY`. `make logs` shows its ends.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use kata_like_tests::TestResult;

use crate::count::struck;

/// Where a host keeps the tests' containerds.
const CONTAINERDS: &str = "/run";

/// Where the product keeps each pod, and in it the guest's log.
const PODS: &str = "/run/kata-like";

/// Where the guests' logs outlive their pods: on the same file system.
const GUESTS: &str = "/run/guest-logs";

/// How often the host is searched for new guests. One needs longer than that to boot.
const LOOK: Duration = Duration::from_millis(500);

/// How many lines of each file are shown.
const TAIL: usize = 40;

/// The names of the tests of a binary that are to be run, a line each.
pub fn list(work: &Path, name: &str) -> PathBuf {
    work.join("lists").join(name)
}

/// What a binary's failure left.
pub fn folder(work: &Path, name: &str) -> PathBuf {
    work.join("logs").join(name)
}

/// The logs of all guests of this host, also of those that are gone.
pub struct Guests;

impl Guests {
    /// Gives each new guest's log a second name.
    pub fn watch() -> Self {
        thread::spawn(|| {
            loop {
                let _ = link_all();
                thread::sleep(LOOK);
            }
        });
        Self
    }

    /// Lets go of all logs so far.
    pub fn forget(&self) {
        let _ = fs::remove_dir_all(GUESTS);
    }
}

fn link_all() -> io::Result<()> {
    fs::create_dir_all(GUESTS)?;
    for pod in fs::read_dir(PODS)?.flatten() {
        let log = pod.path().join("guest.log");
        if let Ok(metadata) = fs::symlink_metadata(&log) {
            let name = pod.file_name().to_string_lossy().replace(':', "-");
            let _ = fs::hard_link(
                &log,
                Path::new(GUESTS).join(format!("{name}.{}.log", metadata.ino())),
            );
        }
    }
    Ok(())
}

/// The logs of the tests' containerds, each with the name under which it is kept.
fn containerds() -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(CONTAINERDS).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let rest = name.strip_prefix("tests.")?;
            let log = entry.path().join("log");
            log.is_file()
                .then(|| (format!("containerd.{rest}.log"), log))
        })
        .collect()
}

/// What a shim has logged of a guest that the emulator broke.
pub fn containerd_struck() -> Option<String> {
    containerds()
        .into_iter()
        .filter_map(|(_, log)| fs::read(log).ok())
        .find_map(|log| struck(&String::from_utf8_lossy(&log)).map(str::to_owned))
}

/// Copies all logs of this host for whoever looks into a failure.
pub fn keep(folder: &Path, _guests: &Guests) {
    let _ = fs::create_dir_all(folder);
    let guests = fs::read_dir(GUESTS).into_iter().flatten().flatten();
    let guests = guests.map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        (format!("guest.{name}"), entry.path())
    });
    for (name, log) in containerds().into_iter().chain(guests) {
        // Contents only: owners and holes are the host's affair.
        if let (Ok(mut from), Ok(mut to)) = (File::open(log), File::create(folder.join(name))) {
            let _ = io::copy(&mut from, &mut to);
        }
    }
    println!("logs: {}", folder.display());
}

/// Prints the end of all that the last run has left.
pub fn show(work: &Path) -> TestResult<bool> {
    let mut folders: Vec<PathBuf> = entries(&work.join("logs"));
    folders.sort();
    if folders.is_empty() {
        println!(
            "{}: no test of the last run has failed",
            work.join("logs").display()
        );
    }
    for folder in folders {
        let mut files = entries(&folder);
        // The newest last, and the tests' own words after all others.
        files.sort_by_key(|file| {
            let changed = fs::metadata(file).and_then(|metadata| metadata.modified());
            (file.ends_with("output"), changed.ok())
        });
        for file in files {
            let bytes = fs::read(&file)?;
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().collect();
            println!("\n=== {} ({} lines)", file.display(), lines.len());
            for line in &lines[lines.len().saturating_sub(TAIL)..] {
                println!("{line}");
            }
        }
    }
    Ok(true)
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}
