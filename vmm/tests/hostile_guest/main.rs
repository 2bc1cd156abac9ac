//! A guest that keeps no rule (`tests/raw-guest`) attacks every device of its VM, and the host
//! stays as it is.
//!
//! In each case, all the while: the VMM does not panic, and ends only by the guest's own reset, or
//! because its fs server gave up the guest. Its anonymous memory and the fs server's stay below
//! what `world` says. After each attack the device answers a request by the book within a second.
//! The host's files stay the same. A neighbour in a VM of its own goes on, and adds up right.
//!
//! Needs what the tests in `devices` need, and the raw guest's image as `KATA_LIKE_RAW_GUEST`. With
//! `KATA_LIKE_LOOK_UPS` set to a number, `fs` looks up so many names in place of
//! [`LOOK_UPS`].

#![allow(
    clippy::unwrap_used,
    reason = "the helpers of tests fail as the tests do"
)]

#[path = "../parts/mod.rs"]
mod parts;
mod tree;
mod world;

use std::fs;
use std::io::Write;
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kata_like_boot::{EndReason, VmCommand, VmReport};
use parts::guest::{Guest, Setup};
use parts::host::{disk, enter_new_namespace, ip, tap};
use parts::server::FsServer;
use tree::Trees;
use world::{Over, World, guest};

/// How many names the guest looks up without a FORGET.
const LOOK_UPS: u64 = 50_000;

/// How many files there are to be looked up.
const FILES: u32 = 1000;

/// How many streams the host holds open.
const STREAMS: usize = 32;

fn plain() -> Setup {
    Setup::new(Vec::new(), 1)
}

/// A case that ends as it should: the guest has done all, and resets the machine.
fn through(world: &mut World, guest: &mut Guest, server: Option<&FsServer>) {
    let Over { end, done, .. } = world.follow(guest, server);
    assert!(done && end.reason == EndReason::Reset, "{end:?}");
}

#[test]
fn accesses_of_all_sizes_to_all_of_the_map() {
    let share = Share::new(0);
    let mut world = World::new();
    world.look_at_files(share.trees());
    let mut guest = guest("registers 0 100000", share.setup());
    let filled = guest.add_disk(&disk("a disk"), false);
    assert_eq!(filled, VmReport::SlotFilled { slot: 12 });
    through(&mut world, &mut guest, Some(&share.server));
    world.judge("registers");
}

#[test]
fn entropy() {
    let mut world = World::new();
    let mut guest = guest("entropy 0 1000", plain());
    // It is refused if the device is there because the CPU has no RDRAND.
    guest.ask(VmCommand::AddEntropy);
    through(&mut world, &mut guest, None);
    world.judge("entropy");
}

#[test]
fn vsock() {
    let mut world = World::new();
    let mut guest = guest("vsock 0 2000", plain());
    let (over, streams) = (AtomicBool::new(false), guest.streams());
    std::thread::scope(|scope| {
        scope.spawn(|| open_streams(&streams, &over));
        through(&mut world, &mut guest, None);
        over.store(true, Ordering::SeqCst);
    });
    world.judge("vsock");
}

/// Opens streams and writes into them for as long as the guest lives.
fn open_streams(path: &PathBuf, over: &AtomicBool) {
    let mut open = std::collections::VecDeque::new();
    while !over.load(Ordering::SeqCst) {
        let Ok(mut stream) = UnixStream::connect(path) else {
            return;
        };
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[7; 65_536]).is_ok() {}
        open.push_back(stream);
        if open.len() > STREAMS {
            open.pop_front();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn net() {
    enter_new_namespace();
    let mut world = World::new();
    let mut guest = guest("net 0 2000", plain());
    let interface = tap("tap0");
    let filled = guest.add_interface(&interface, [2, 0, 0, 0, 0, 2], 1500);
    assert_eq!(filled, VmReport::SlotFilled { slot: 4 });
    drop(interface);
    ip("address add 10.9.0.1/24 dev tap0");
    ip("link set tap0 up");
    ip("neighbour add 10.9.0.2 lladdr 02:00:00:00:00:02 dev tap0 nud permanent");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| send_frames(&over));
        through(&mut world, &mut guest, None);
        over.store(true, Ordering::SeqCst);
    });
    world.judge("net");
}

/// Sends frames of all lengths for as long as the guest lives.
fn send_frames(over: &AtomicBool) {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    while !over.load(Ordering::SeqCst) {
        for length in [1, 100, 1400, 9000, 60_000] {
            // A full queue of the tap's loses it.
            let _ = socket.send_to(&vec![7; length], "10.9.0.2:9");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn block() {
    let mut world = World::new();
    let (written, read) = (disk("a disk"), disk("only read"));
    let mut guest = guest("block 0 200", plain());
    for (disk, read_only, slot) in [(&written, false, 12), (&read, true, 13)] {
        let filled = guest.add_disk(disk, read_only);
        assert_eq!(filled, VmReport::SlotFilled { slot });
    }
    through(&mut world, &mut guest, None);
    let mut begin = [0; 512];
    read.read_exact_at(&mut begin, 0).unwrap();
    assert!(begin.starts_with(b"only read") && begin[9..] == [0; 503]);
    world.judge("block");
}

#[test]
fn log() {
    let mut world = World::new();
    let mut guest = guest("log 0 4", plain());
    through(&mut world, &mut guest, None);
    world.judge("log");
}

/// An fs server with a container's root and a volume, and files of the host's beside its share.
struct Share {
    server: FsServer,
}

impl Share {
    /// With so many files in the container's root.
    fn new(files: u32) -> Self {
        let server = FsServer::start(&["rootfs", "volumes"]);
        let canary = server.path("../canary");
        fs::create_dir(&canary).unwrap();
        fs::write(canary.join("secret"), "not for guests").unwrap();
        let root = server.mount("rootfs/c1");
        for file in 0..files {
            fs::write(root.join(format!("f{file}")), "").unwrap();
        }
        let volume = server.mount("volumes/v1");
        fs::write(volume.join("locked"), "by whom?").unwrap();
        Self { server }
    }

    /// The guest may change its container's root, and nothing else.
    fn trees(&self) -> Trees {
        let roots = ["", "../canary"].map(|path| self.server.path(path));
        Trees::new(roots.into(), vec![self.server.path("rootfs/c1")])
    }

    fn setup(&self) -> Setup {
        Setup {
            shares: self.server.connections(),
            ..plain()
        }
    }
}

#[test]
fn fs_by_requests_that_are_understood() {
    let count = std::env::var("KATA_LIKE_LOOK_UPS");
    let count = count.map_or(LOOK_UPS, |count| count.parse().unwrap());
    let share = Share::new(FILES);
    let mut world = World::new();
    world.look_at_files(share.trees());
    let mut guest = guest(&format!("fs 0 {count}"), share.setup());
    through(&mut world, &mut guest, Some(&share.server));
    world.judge("fs");
}

/// What the fs server can't decode is its end, and the VM's: each attack after it has a VM of its
/// own.
fn fs_until_all_is_done(case: &str) {
    let mut share = Share::new(0);
    let mut world = World::new();
    world.look_at_files(share.trees());
    let mut next = 0;
    loop {
        let mut guest = guest(&format!("{case} {next} 0"), share.setup());
        let Over { end, done, last } = world.follow(&mut guest, Some(&share.server));
        if done {
            assert_eq!(end.reason, EndReason::Reset, "{end:?}");
            break;
        }
        assert_eq!(end.reason, EndReason::Failed, "attack {last}: {end:?}");
        assert!(end.detail.contains("fs server"), "attack {last}: {end:?}");
        let status = share.server.status().exit_status();
        assert!(matches!(status, Some(0 | 1)), "attack {last}: {status:?}");
        assert!(last >= next, "{end:?}");
        next = last + 1;
        let fresh = Share::new(0);
        world.look_at_files(fresh.trees());
        share = fresh;
    }
    world.judge(case);
}

#[test]
fn fs_by_malformed_rings() {
    fs_until_all_is_done("fs-rings");
}

#[test]
fn fs_by_requests_that_can_t_be_decoded() {
    fs_until_all_is_done("fs-requests");
}
