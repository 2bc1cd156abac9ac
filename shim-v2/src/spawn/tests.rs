//! Children of the test's own, their descriptors and their ends.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use super::*;

fn shell<'a>(arguments: &'a [&'a str], descriptors: &'a [Option<BorrowedFd<'a>>]) -> Birth<'a> {
    Birth {
        program: Path::new("/bin/sh"),
        arguments,
        environment: &[],
        directory: Path::new("/"),
        cgroup: None,
        network: Network::Inherited,
        namespaces: rustix::thread::UnshareFlags::empty(),
        mounts: None,
        label: None,
        oom_score: None,
        descriptors,
    }
}

fn pipe() -> (std::fs::File, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (reader.into(), writer)
}

#[tokio::test]
async fn a_child_finds_its_descriptors_and_no_other() {
    let (mut reader, writer) = pipe();
    // One that is not close-on-exec and would be inherited by a careless exec.
    let leaky = rustix::fs::open("/", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
    let leaky = leaky.unwrap();
    let output = [None, Some(writer.as_fd()), None, Some(writer.as_fd())];
    // The list's own directory is its last descriptor.
    let mut how = shell(&["ls", "/proc/self/fd"], &output);
    how.program = Path::new("/bin/ls");
    let child = Child::watch(birth(&how).unwrap()).unwrap();
    assert_eq!(child.exited().await, Exit::Status(0));
    drop((writer, leaky));
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let listed: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(listed, ["0", "1", "2", "3", "4"]);
}

#[tokio::test]
async fn the_status_is_the_child_s() {
    let child = Child::watch(birth(&shell(&["sh", "-c", "exit 7"], &[])).unwrap()).unwrap();
    assert_eq!(child.exited().await, Exit::Status(7));
}

/// With SELinux in the kernel or without: no policy has such a label.
#[tokio::test]
async fn a_label_that_is_none_is_told() {
    let mut how = shell(&["sh", "-c", "exit 0"], &[]);
    how.label = Some("no label");
    let line = kata_like_failure::one_line(&birth(&how).unwrap_err());
    assert!(
        line.starts_with("set the SELinux label of /bin/sh: "),
        "{line}"
    );
}

#[tokio::test]
async fn the_cause_of_a_failed_start_is_told() {
    let mut how = shell(&["x"], &[]);
    how.program = Path::new("/nowhere/x");
    let line = kata_like_failure::one_line(&birth(&how).unwrap_err());
    assert_eq!(
        line,
        "run /nowhere/x: No such file or directory (os error 2)"
    );
    let mut how = shell(&["sh"], &[]);
    how.directory = Path::new("/nowhere");
    let line = kata_like_failure::one_line(&birth(&how).unwrap_err());
    assert!(
        line.starts_with("enter the directory of /bin/sh: "),
        "{line}"
    );
}

#[tokio::test]
async fn a_killed_child_is_reaped() {
    let child = Child::watch(birth(&shell(&["sh", "-c", "sleep 60"], &[])).unwrap()).unwrap();
    assert_eq!(child.exit(), None);
    assert!(child.end(Duration::from_secs(5)).await);
    assert_eq!(child.exit(), Some(Exit::Signal(9)));
    assert!(!Path::new(&format!("/proc/{}", child.pid)).exists());
}

/// From a mount namespace of one's own into the one that was left. Needs root.
#[test]
fn a_child_enters_the_mount_namespace_that_it_is_given() {
    let (mut reader, writer) = pipe();
    let own = std::fs::read_link("/proc/self/ns/mnt").unwrap();
    let work = std::thread::spawn(move || {
        let host = crate::share::own_namespace().unwrap();
        let apart = std::fs::read_link("/proc/thread-self/ns/mnt").unwrap();
        let output = [None, Some(writer.as_fd())];
        let mut how = shell(&["readlink", "/proc/self/ns/mnt"], &output);
        how.program = Path::new("/bin/readlink");
        how.mounts = Some(host.as_fd());
        let newborn = birth(&how).unwrap();
        let gone = WaitId::PidFd(newborn.pidfd.as_fd());
        waitid(gone, WaitIdOptions::EXITED).unwrap();
        apart
    });
    let apart = work.join().unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(Path::new(text.trim()), own);
    assert_ne!(apart, own);
}
