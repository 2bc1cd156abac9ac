//! A real guest's vsock, file systems and network, end to end: driver, VMM, fs server, host.
//!
//! Needs what the tests in `boot` need, also the fs server as `KATA_LIKE_FSD`. Every mount is made
//! in the mount namespace of the test's own thread, which ends with it.

#![allow(
    clippy::unwrap_used,
    reason = "the helpers of tests fail as the tests do"
)]

mod network;
#[path = "../parts/mod.rs"]
mod parts;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kata_like_boot::{EndReason, QueueState, VmReport};
use kata_like_limits::{Patience, in_time};
use parts::guest::{Guest, Setup};
use parts::server::FsServer;
use parts::{SECOND, compiled, cpio};
use rustix::fs::FlockOperation;
use rustix::process::Signal;

/// A guest with two vCPUs whose PID 1 is init.c, compiled once.
fn start(shares: Vec<(&'static str, UnixStream)>) -> Guest {
    static INIT: OnceLock<Vec<u8>> = OnceLock::new();
    let init = INIT.get_or_init(|| compiled("tests/devices/init.c"));
    let mut guest = Guest::start(&Setup {
        shares,
        ..Setup::new(cpio(&[("init", 0o100755, init)]), 2)
    });
    guest.wait_until_running();
    guest
}

/// A guest that has dialled, with both shares.
fn start_with_shares() -> (FsServer, Guest) {
    let server = FsServer::start(&["rootfs", "volumes"]);
    let mut guest = start(server.connections());
    guest.wait_for_dial();
    (server, guest)
}

/// Bytes that show a lost, doubled or swapped piece.
fn pattern(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Sends `bytes` and reads them back, up to the end of file.
fn echo(mut stream: UnixStream, bytes: &[u8]) {
    let mut writer = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(b"e").unwrap();
            writer.write_all(bytes).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert_eq!(back.len(), bytes.len());
        assert!(back == bytes, "other bytes came back");
    });
}

/// The agent's dial is joined and reported. The guest finds nothing else to call.
#[test]
fn the_guest_dials_once() {
    let mut guest = start(Vec::new());
    let mut hello = String::new();
    BufReader::new(&guest.agent).read_line(&mut hello).unwrap();
    let refused = libc::ECONNRESET;
    assert_eq!(hello, format!("hello {refused} {refused}\n"));
    let VmReport::AgentConnected(figures) = guest.report() else {
        panic!("no report of the agent's dial");
    };
    println!("boot to dial: {figures:?}");
    assert!(figures.exits > 0);
}

/// How far a queue has come is reported: packets from the guest are taken and given back; requests
/// to a stopped server are not.
#[test]
fn how_far_each_queue_has_come_is_told() {
    let (server, mut guest) = start_with_shares();
    let mut files = Files::of(&guest);
    files.done("mount /r rootfs");
    let idle = |queue: &QueueState| queue.available > 0 && queue.used == queue.available;
    let sent = wait_for_queue(&mut guest, (2, 1), idle);
    assert_eq!(sent.device, "Vsock");
    let asked = wait_for_queue(&mut guest, (0, 1), idle);
    assert_eq!(asked.device, "Fs");
    assert!(asked.events.is_some(), "{asked:?}");
    server.signal(Signal::STOP);
    files.0.get_mut().write_all(b"device /r/nothing\n").unwrap();
    let one_more = |queue: &QueueState| queue.available == asked.available.wrapping_add(1);
    let stuck = wait_for_queue(&mut guest, (0, 1), one_more);
    assert_eq!(stuck.used, asked.used);
    server.signal(Signal::CONT);
}

/// Waits until a queue, by its slot and number, is as wanted.
fn wait_for_queue(
    guest: &mut Guest,
    which: (u32, u32),
    wanted: impl Fn(&QueueState) -> bool,
) -> QueueState {
    let patience = Patience::new(20 * SECOND);
    loop {
        let queues = guest.state().queues;
        let mut found = queues
            .iter()
            .filter(|queue| (queue.slot, queue.queue) == which);
        match found.next() {
            Some(queue) if wanted(queue) => return queue.clone(),
            _ => assert!(!patience.is_over(), "{queues:?}"),
        }
    }
}

#[test]
fn streams_carry_every_byte_both_ways_beside_a_stuck_one() {
    let mut guest = start(Vec::new());
    guest.wait_for_dial();
    let mut stuck = guest.stream();
    stuck.write_all(b"x").unwrap();
    stuck.set_nonblocking(true).unwrap();
    while stuck.write(&[0; 65_536]).is_ok() {}
    let started = Instant::now();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let stream = guest.stream();
            scope.spawn(move || echo(stream, &pattern(seed, 4 << 20)));
        }
    });
    println!("16 MiB there and back: {:?}", started.elapsed());
    for seed in 0..50 {
        echo(guest.stream(), &pattern(seed, 10));
    }
}

#[test]
fn what_one_side_closes_the_other_sees() {
    let mut guest = start(Vec::new());
    guest.wait_for_dial();
    // The guest floods and the host hangs up: the guest's writer hears of it, and the stream is
    // over.
    let mut stream = guest.stream();
    stream.write_all(b"d").unwrap();
    stream.read_exact(&mut [0; 1 << 20]).unwrap();
    drop(stream);
    // A guest that reads nothing and dials everywhere gets a refusal each time.
    let mut stream = guest.stream();
    stream.write_all(b"r").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.is_empty());
    // A guest that closes gives an end of file.
    let mut stream = guest.stream();
    stream.write_all(b"?").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    echo(guest.stream(), &pattern(1, 100_000));
}

/// A conversation about files with the guest.
struct Files(BufReader<UnixStream>);

impl Files {
    fn of(guest: &Guest) -> Self {
        let mut stream = guest.stream();
        stream.write_all(b"f").unwrap();
        Self(BufReader::new(stream))
    }

    fn ask(&mut self, request: &str) -> String {
        let line = format!("{request}\n");
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        answer.trim_end().trim_end_matches('\0').to_owned()
    }

    fn done(&mut self, request: &str) {
        assert_eq!(self.ask(request), "ok", "{request}");
    }
}

#[test]
fn files_of_the_share_are_the_guest_s_files() {
    let (server, guest) = start_with_shares();
    let mut files = Files::of(&guest);
    files.done("mount /r rootfs");
    files.done("mount /v volumes");

    // A root file system that the shim mounts long after the guest has started.
    let container = server.mount("rootfs/c1");
    fs::write(container.join("from-host"), "hello").unwrap();
    assert_eq!(files.ask("read /r/c1/from-host"), "ok hello");
    assert_ne!(
        files.ask("device /r/c1"),
        files.ask("device /r"),
        "no submount"
    );
    files.done("mkdir /r/c1/dir");
    files.done("write /r/c1/dir/file written by the guest");
    files.done("setxattr /r/c1/dir/file value");
    assert_eq!(files.ask("getxattr /r/c1/dir/file"), "ok value");
    files.done("chown /r/c1/dir/file 1234");
    files.done("rename /r/c1/dir/file /r/c1/dir/other");
    files.done("mkfifo /r/c1/fifo");
    assert_eq!(
        files.ask("mknod /r/c1/null"),
        format!("error {}", libc::EPERM)
    );
    assert_eq!(
        files.ask("mkdir /r/outside"),
        format!("error {}", libc::EROFS)
    );
    files.done("large /r/c1/large");
    assert_eq!(files.ask("list /r/c1/dir"), "ok other");
    let other = container.join("dir/other");
    assert_eq!(fs::metadata(&other).unwrap().uid(), 1234);
    assert_eq!(
        fs::metadata(container.join("large")).unwrap().len(),
        16 << 20
    );
    // Missing names are remembered; what the guest makes itself is seen all the same.
    let missing = format!("error {}", libc::ENOENT);
    assert_eq!(files.ask("read /r/c1/soon"), missing);
    files.done("write /r/c1/soon now");
    assert_eq!(files.ask("read /r/c1/soon"), "ok now");

    // A volume changes under the guest, as a ConfigMap does.
    let volume = server.mount("volumes/v1");
    fs::write(volume.join("key"), "old").unwrap();
    assert_eq!(files.ask("read /v/v1/key"), "ok old");
    assert_eq!(files.ask("read /v/v1/later"), missing);
    fs::write(volume.join("new"), "new").unwrap();
    fs::rename(volume.join("new"), volume.join("key")).unwrap();
    fs::write(volume.join("later"), "there").unwrap();
    std::thread::sleep(Duration::from_millis(1_100));
    assert_eq!(files.ask("read /v/v1/key"), "ok new");
    assert_eq!(files.ask("read /v/v1/later"), "ok there");

    // When the guest unmounts, the server lets go: the host can unmount it and use the name again.
    files.done("umount /r/c1");
    server.unmount_soon("rootfs/c1");
    assert_eq!(files.ask("list /r/c1"), "ok");
    let second = server.mount("rootfs/c1");
    fs::write(second.join("fresh"), "").unwrap();
    assert_eq!(files.ask("list /r/c1"), "ok fresh");
}

/// Databases, builders and groups of users get what they need of a file system, or are refused.
#[test]
fn locks_overlays_and_groups_are_what_they_can_be() {
    let (server, guest) = start_with_shares();
    let mut files = Files::of(&guest);
    files.done("mount /r rootfs");
    files.done("mount /v volumes");
    let container = server.mount("rootfs/c1");
    let volume = server.mount("volumes/v1");

    // The root file system is this pod's alone; on a volume others can hold the lock.
    for kind in ["lock", "flock"] {
        files.done(&format!("{kind} /r/c1/locked"));
        files.done(&format!("{kind} /v/v1/locked"));
    }
    let held = fs::File::open(volume.join("locked")).unwrap();
    rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
    let refused = format!("error {}", libc::EAGAIN);
    assert_eq!(files.ask("flock /v/v1/locked"), refused);
    drop(held);
    files.done("flock /v/v1/locked");

    files.done("mkdir /r/c1/o");
    files.done("overlay /r/c1/o");
    let whiteout = fs::metadata(container.join("o/upper/gone")).unwrap();
    assert_eq!(
        (whiteout.mode() & libc::S_IFMT, whiteout.rdev()),
        (libc::S_IFCHR, 0)
    );

    for folder in [&container, &volume] {
        let shared = folder.join("group");
        fs::create_dir(&shared).unwrap();
        std::os::unix::fs::chown(&shared, Some(0), Some(2000)).unwrap();
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o770)).unwrap();
    }
    files.done("member /r/c1/group/file");
    files.done("member /v/v1/group/file");
    let made = fs::metadata(volume.join("group/file")).unwrap();
    assert_eq!(
        (made.uid(), made.gid(), made.mode() & 0o777),
        (1000, 1000, 0o640)
    );
    files.done("mkdir /r/c1/closed");
    files.done("chown /r/c1/closed 3000");
    let denied = format!("error {}", libc::EACCES);
    assert_eq!(files.ask("member /r/c1/closed/file"), denied);

    let unsupported = format!("error {}", libc::EOPNOTSUPP);
    assert_eq!(files.ask("tmpfile /r/c1"), unsupported);

    // The guest sees at once the link by which the host switches a volume, and the files behind it.
    for version in ["one", "two"] {
        fs::create_dir(volume.join(version)).unwrap();
        fs::write(volume.join(version).join("key"), version).unwrap();
        symlink(version, volume.join("next")).unwrap();
        fs::rename(volume.join("next"), volume.join("..data")).unwrap();
        assert_eq!(files.ask("read /v/v1/..data/key"), format!("ok {version}"));
    }
}

/// A dead fs server ends the VM at once, with its reason.
#[test]
fn a_lost_fs_server_ends_the_vm() {
    let (server, guest) = start_with_shares();
    let mut files = Files::of(&guest);
    files.done("mount /r rootfs");
    let killed = Instant::now();
    server.signal(Signal::KILL);
    let end = guest.end();
    assert_eq!(end.reason, EndReason::Failed, "{end:?}");
    assert!(
        end.detail.contains("rootfs") || end.detail.contains("volumes"),
        "{end:?}"
    );
    assert!(in_time(killed.elapsed(), SECOND), "{:?}", killed.elapsed());
}

/// The fs server ends with its connections, whether or not it is killed together with the VMM.
#[test]
fn the_fs_server_ends_with_the_vm() {
    let (server, mut guest) = start_with_shares();
    let mut files = Files::of(&guest);
    files.done("mount /r rootfs");
    files.done("mount /v volumes");
    guest.vmm.kill().unwrap();
    assert_eq!(server.status().exit_status(), Some(0));
}
