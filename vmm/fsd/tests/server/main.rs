//! The real program, started as the shim starts it. The test plays the shim, the VMM and the guest.
//! It needs root, as the program does. Every mount is made in the mount namespace of the test's own
//! thread, which ends with it.

#![allow(
    clippy::unwrap_used,
    reason = "the helpers of tests fail as the tests do"
)]

mod guest;
mod locks;
mod requests;
mod server;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use guest::{Guest, MEMORY, bytes, parse};
use kata_like_boot::{BORN_IN, FsdReport};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use rustix::thread::UnshareFlags;
use server::{FILES, SECOND, Server, mount_tmpfs};
use virtiofsd::fuse::{self, EntryOut, OpenOut};

const ATTR_SUBMOUNT: u32 = 1;

fn lookup(guest: &mut Guest, parent: u64, name: &str) -> Result<EntryOut, i32> {
    let reply = guest.call(1, parent, format!("{name}\0").as_bytes())?;
    Ok(parse(&reply))
}

#[test]
fn it_sees_the_share_and_nothing_else() {
    let server = Server::start();
    let mut top: Vec<_> = fs::read_dir(server.proc("root"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    top.sort();
    assert_eq!(top, ["file", "rootfs", "volumes"]);
    let mounts = fs::read_to_string(server.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,nosuid,nodev,"), "{mounts}");
    assert!(mounts.contains(" master:"), "{mounts}");
    assert!(!mounts.contains(" shared:"), "{mounts}");
    for space in ["cgroup", "ipc", "mnt", "net", "pid", "uts"] {
        let of = |path: PathBuf| fs::read_link(path).unwrap();
        let theirs = of(server.proc(&format!("ns/{space}")));
        assert_ne!(theirs, of(format!("/proc/thread-self/ns/{space}").into()));
    }
}

/// As process 1 of its namespace it can name no other process.
#[test]
fn it_refuses_to_run_beside_others() {
    let mut server = Server::spawn_as(UnshareFlags::NEWIPC, FILES, &["rootfs"]);
    let FsdReport::Failed { why } = server.report() else {
        panic!("it serves");
    };
    assert!(why.contains("as process 1 of its own"), "{why}");
    assert_eq!(server.ended_within(SECOND).exit_status(), Some(1));
}

/// Although signals mean nothing to a process 1 that does not handle them.
#[test]
fn it_ends_by_a_kill_from_outside() {
    let mut server = Server::start();
    server.signal(Signal::TERM);
    server.signal(Signal::KILL);
    let ended = server.ended_within(SECOND);
    assert_eq!(ended.terminating_signal(), Some(libc::SIGKILL));
}

/// A call that the kernel begins anew must not be one that a filter forbids (restart_syscall(2)).
#[test]
fn it_goes_on_after_a_stop() {
    let mut server = Server::start();
    let mut guests = [0, 1].map(|share| Guest::mount(server.connect(share)));
    for _ in 0..3 {
        server.signal(Signal::STOP);
        std::thread::sleep(SECOND / 50);
        server.signal(Signal::CONT);
        for guest in &mut guests {
            assert_eq!(
                lookup(guest, 1, "missing")
                    .map(|entry| entry.nodeid)
                    .unwrap_or(0),
                0
            );
        }
    }
    assert!(server.is_running());
    drop(guests);
    assert_eq!(server.ended_within(SECOND).exit_status(), Some(0));
}

#[test]
fn it_has_given_up_what_it_does_not_need() {
    let server = Server::start();
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(server.status(set), "00000000800000db", "{set}");
    }
    assert_eq!(server.status("NoNewPrivs:"), "1");
    let limits = fs::read_to_string(server.proc("limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let words = line.unwrap().split_whitespace();
        words.take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max core file size"), ["0"; 2]);
    let addresses = (2 * MEMORY as u64 + (3 << 30)).to_string();
    assert_eq!(limit("Max address space"), [&addresses[..]; 2]);
    let files: u64 = limit("Max open files")[1].parse().unwrap();
    assert!(files < FILES + 2048, "{files}");
    // No file of the host: only descriptors of /proc/self/fd, and those that are no files.
    for entry in fs::read_dir(server.proc("fd")).unwrap() {
        let path = entry.unwrap().path();
        let target = fs::read_link(&path).unwrap();
        if target.starts_with("/") && !target.starts_with("/dev") && path.is_dir() {
            let kind = rustix::fs::statfs(&path).unwrap().f_type;
            assert_eq!(kind, libc::PROC_SUPER_MAGIC, "{path:?} is {target:?}");
        }
    }
    // Each thread has its filter when the VMM has introduced itself.
    let guests = [0, 1].map(|share| Guest::mount(server.connect(share)));
    let threads = fs::read_dir(server.proc("task")).unwrap();
    let filtered: Vec<String> = threads
        .map(|thread| fs::read_to_string(thread.unwrap().path().join("status")).unwrap())
        .map(|status| {
            status
                .lines()
                .find(|line| line.starts_with("Seccomp:"))
                .unwrap()
                .into()
        })
        .collect();
    // The first, the one for the control socket, and three for each share.
    assert_eq!(filtered, ["Seccomp:\t2"; 8]);
    drop(guests);
}

#[test]
fn a_later_mount_of_the_shim_reaches_the_guest() {
    let mut server = Server::start();
    let mut guest = Guest::mount(server.connect(0));
    assert_eq!(lookup(&mut guest, 1, "later").err(), Some(libc::ENOENT));
    let later = server.share.join("rootfs/later");
    fs::create_dir(&later).unwrap();
    mount_tmpfs(&later);
    fs::write(later.join("hello"), "from the host").unwrap();
    let mounted = lookup(&mut guest, 1, "later").unwrap();
    assert_eq!(mounted.attr.flags & ATTR_SUBMOUNT, ATTR_SUBMOUNT);
    let file = lookup(&mut guest, mounted.nodeid, "hello").unwrap();
    assert_eq!(read(&mut guest, file.nodeid), b"from the host");
    // The top is the shim's; the mounts below it are the guest's.
    assert_eq!(create(&mut guest, 1, "mine").err(), Some(libc::EROFS));
    create(&mut guest, mounted.nodeid, "mine").unwrap();
    assert!(later.join("mine").exists());
    // Unmounted on the host, it goes here, too, and another mount can take its name.
    unmount(&later, UnmountFlags::DETACH).unwrap();
    let empty = lookup(&mut guest, 1, "later").unwrap();
    assert_ne!(empty.nodeid, mounted.nodeid);
    assert_eq!(empty.attr.flags & ATTR_SUBMOUNT, 0);
    assert!(server.is_running());
}

#[test]
fn a_write_by_another_user_takes_the_set_user_id_bit_away() {
    let server = Server::start();
    let later = server.share.join("rootfs/c");
    fs::create_dir(&later).unwrap();
    mount_tmpfs(&later);
    let mut guest = Guest::mount(server.connect(0));
    let top = lookup(&mut guest, 1, "c").unwrap().nodeid;
    let (node, handle) = create(&mut guest, top, "program").unwrap();
    let mode = fuse::SetattrIn {
        valid: 1,
        mode: 0o6777,
        ..Default::default()
    };
    guest.call(4, node, &bytes(mode)).unwrap();
    let mut write = |flags: u32| {
        let write = fuse::WriteIn {
            fh: handle,
            size: 1,
            write_flags: flags,
            ..Default::default()
        };
        guest
            .call(16, node, &[bytes(write), vec![b'x']].concat())
            .unwrap();
        fs::metadata(later.join("program")).unwrap().mode() & 0o7777
    };
    assert_eq!(write(0), 0o6777); // root's own
    assert_eq!(write(4), 0o777); // FUSE_WRITE_KILL_SUIDGID
    assert_eq!(write(0), 0o777);
}

#[test]
fn hostile_names_are_refused_on_the_wire() {
    let mut server = Server::start();
    fs::write(server.share.join("volumes/secret"), "other share").unwrap();
    let mut guest = Guest::mount(server.connect(0));
    for name in ["..", ".", "", "../volumes", "/file", "a/b"] {
        assert_eq!(
            lookup(&mut guest, 1, name).err(),
            Some(libc::EINVAL),
            "{name:?}"
        );
        let symlink = format!("{name}\0target\0");
        assert_eq!(
            guest.call(6, 1, symlink.as_bytes()).err(),
            Some(libc::EINVAL),
            "{name:?}"
        );
    }
    assert!(server.is_running());
}

/// A request that can't be answered ends the server, and the shim hears why.
#[test]
fn the_shim_hears_why_the_library_gave_up() {
    let mut server = Server::start();
    let mut guest = Guest::mount(server.connect(0));
    guest.send(&[1, 2, 3]);
    let FsdReport::Failed { why } = server.report() else {
        panic!("it goes on");
    };
    assert!(why.contains("decode"), "{why}");
    assert_eq!(server.ended_within(SECOND).exit_status(), Some(1));
}

#[test]
fn both_shares_are_served_each_with_its_policy() {
    let mut server = Server::start();
    fs::create_dir(server.share.join("rootfs/d")).unwrap();
    fs::create_dir(server.share.join("volumes/d")).unwrap();
    let mut private = Guest::mount(server.connect(0));
    let mut shared = Guest::mount(server.connect(1));
    let top = lookup(&mut private, 1, "d").unwrap().nodeid;
    let missing = lookup(&mut private, top, "missing").unwrap();
    assert_eq!((missing.nodeid, missing.entry_valid), (0, 60));
    let top = lookup(&mut shared, 1, "d").unwrap();
    assert_eq!((top.attr_valid, top.attr_valid_nsec), (0, 500_000_000));
    assert_eq!((top.entry_valid, top.entry_valid_nsec), (0, 0));
    let missing = lookup(&mut shared, top.nodeid, "missing");
    assert_eq!(missing.err(), Some(libc::ENOENT));
    drop((private, shared));
    assert!(server.ended_within(SECOND).exit_status() == Some(0));
}

/// The guest looks up each time the link by which the host switches a whole volume.
#[test]
fn a_switched_link_is_seen_at_once() {
    let server = Server::start();
    let volume = server.share.join("volumes/v");
    fs::create_dir(&volume).unwrap();
    let switch = |to: &str| {
        std::os::unix::fs::symlink(to, volume.join("next")).unwrap();
        fs::rename(volume.join("next"), volume.join("..data")).unwrap();
    };
    switch("old");
    let mut guest = Guest::mount(server.connect(1));
    let top = lookup(&mut guest, 1, "v").unwrap().nodeid;
    let link = lookup(&mut guest, top, "..data").unwrap();
    assert_eq!((link.entry_valid, link.entry_valid_nsec), (0, 0));
    assert_eq!(guest.call(5, link.nodeid, &[]).unwrap(), b"old");
    switch("new");
    let link = lookup(&mut guest, top, "..data").unwrap();
    assert_eq!(guest.call(5, link.nodeid, &[]).unwrap(), b"new");
}

/// The guest's overlays write `trusted.*`; the name that keeps it on the host is out of reach.
#[test]
fn trusted_attributes_are_kept_under_a_name_of_ours() {
    let server = Server::start();
    let later = server.share.join("rootfs/c");
    fs::create_dir(&later).unwrap();
    mount_tmpfs(&later);
    let mut guest = Guest::mount(server.connect(0));
    let top = lookup(&mut guest, 1, "c").unwrap().nodeid;
    let set = |guest: &mut Guest, name: &str| {
        let header = bytes(fuse::SetxattrInCompat { size: 1, flags: 0 });
        guest.call(
            21,
            top,
            &[header, format!("{name}\0y").into_bytes()].concat(),
        )
    };
    let size = bytes(fuse::GetxattrIn {
        size: 64,
        padding: 0,
    });
    set(&mut guest, "trusted.overlay.opaque").unwrap();
    let get = [size.clone(), b"trusted.overlay.opaque\0".to_vec()].concat();
    assert_eq!(guest.call(22, top, &get).unwrap(), b"y");
    assert_eq!(
        guest.call(23, top, &size).unwrap(),
        b"trusted.overlay.opaque\0"
    );
    let forged = set(&mut guest, "user.kata-like.trusted.overlay.opaque");
    assert_eq!(forged.err(), Some(libc::EPERM));
    let mut value = [0; 8];
    let name = "user.kata-like.trusted.overlay.opaque";
    assert_eq!(rustix::fs::getxattr(&later, name, &mut value).unwrap(), 1);
}

#[test]
fn it_ends_with_the_shim() {
    let mut server = Server::start();
    let _guest = Guest::mount(server.connect(0));
    drop(server.control.take());
    assert!(server.ended_within(SECOND).exit_status() == Some(0));
}

#[test]
fn one_connection_for_each_share_and_no_second() {
    let server = Server::start();
    let _guest = Guest::mount(server.connect(0));
    let second = UnixStream::connect(&server.sockets[0]);
    assert!(second.is_err(), "{second:?}");
}

#[test]
fn a_directory_that_is_none_is_refused_with_its_name() {
    for (directory, cause) in [
        ("missing", "No such file"),
        ("file", "Not a directory"),
        ("..", "Invalid argument"),
        ("rootfs/../volumes", "Invalid argument"),
    ] {
        let mut server = Server::spawn(&[directory]);
        let FsdReport::Failed { why } = server.report() else {
            panic!("{directory} is served");
        };
        assert!(why.contains(cause) && why.contains(directory), "{why}");
        assert!(!why.contains('\n'), "{why}");
        assert_eq!(server.ended_within(SECOND).exit_status(), Some(1));
    }
}

#[test]
fn without_a_control_socket_it_says_who_starts_it() {
    let output = Command::new(env!("CARGO_BIN_EXE_kata-like-fsd"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("started by the shim"));
}

/// A guest that never forgets a file is told that there is no room, and it alone.
#[test]
fn the_files_that_a_guest_keeps_are_bounded() {
    const EACH: usize = 400;
    let mut server = Server::spawn_as(BORN_IN, 2 * EACH as u64, &["rootfs", "volumes"]);
    assert_eq!(server.report(), FsdReport::Serving);
    for share in ["rootfs", "volumes"] {
        for number in 0..2 * EACH {
            fs::write(server.share.join(format!("{share}/{number}")), "").unwrap();
        }
    }
    let mut guest = Guest::mount(server.connect(0));
    let mut kept = Vec::new();
    let refused = loop {
        match lookup(&mut guest, 1, &kept.len().to_string()) {
            Ok(entry) => kept.push(entry.nodeid),
            Err(errno) => break errno,
        }
    };
    assert_eq!(refused, libc::ENFILE);
    // The share's root holds one as well, and so does an open file.
    assert!((EACH - 10..=EACH).contains(&kept.len()), "{}", kept.len());
    let open = fs::read_dir(server.proc("fd")).unwrap().count();
    assert!(open < EACH + 100, "{open}");
    for _ in 0..2000 {
        let again = lookup(&mut guest, 1, &kept.len().to_string());
        assert_eq!(again.err(), Some(libc::ENFILE));
    }
    // The other share has room, and so has this one when the guest forgets a file.
    let mut other = Guest::mount(server.connect(1));
    lookup(&mut other, 1, "0").unwrap();
    guest.forget(kept.pop().unwrap());
    lookup(&mut guest, 1, "0").unwrap();
    lookup(&mut guest, 1, &kept.len().to_string()).unwrap();
    assert!(server.is_running());
}

/// What the shim has unmounted is out of the share, so Landlock lets nothing of it be opened any
/// more, although the guest still remembers it. Where files are in the share it is in no way: after
/// they have been moved, below a directory that is gone, and in a mount that came later.
#[test]
fn only_files_of_the_share_can_be_opened() {
    if kata_like_linux::landlock::version() < 2 {
        return;
    }
    let mut server = Server::start();
    let later = server.share.join("rootfs/c");
    fs::create_dir(&later).unwrap();
    mount_tmpfs(&later);
    let mut guest = Guest::mount(server.connect(0));
    let top = lookup(&mut guest, 1, "c").unwrap().nodeid;
    let directory = bytes(fuse::MkdirIn {
        mode: 0o755,
        umask: 0,
    });
    for name in ["from", "to"] {
        let body = [&directory[..], name.as_bytes(), b"\0"].concat();
        guest.call(9, top, &body).unwrap();
    }
    let from = lookup(&mut guest, top, "from").unwrap().nodeid;
    let to = lookup(&mut guest, top, "to").unwrap().nodeid;
    let (file, handle) = create(&mut guest, from, "file").unwrap();
    let write = bytes(fuse::WriteIn {
        fh: handle,
        size: 5,
        ..Default::default()
    });
    guest
        .call(16, file, &[write, b"moved".to_vec()].concat())
        .unwrap();
    let rename = bytes(fuse::Rename2In {
        newdir: to,
        flags: 0,
        padding: 0,
    });
    let moved = [rename, b"file\0moved\0".to_vec()].concat();
    guest.call(45, from, &moved).unwrap();
    let link = bytes(fuse::LinkIn { oldnodeid: file });
    guest
        .call(13, from, &[link, b"link\0".to_vec()].concat())
        .unwrap();
    assert_eq!(read(&mut guest, file), b"moved");
    fs::remove_file(later.join("from/link")).unwrap();
    fs::remove_dir(later.join("from")).unwrap();
    fs::remove_file(later.join("to/moved")).unwrap();
    fs::remove_dir(later.join("to")).unwrap();
    // An open finds that the file has changed, unless the guest has seen it.
    guest.call(3, file, &[0; 16]).unwrap();
    assert_eq!(read(&mut guest, file), b"moved");
    unmount(&later, UnmountFlags::DETACH).unwrap();
    assert_eq!(guest.call(14, file, &[0; 8]).err(), Some(libc::EACCES));
    assert!(server.is_running());
}

fn create(guest: &mut Guest, parent: u64, name: &str) -> Result<(u64, u64), i32> {
    let request = fuse::CreateIn {
        flags: libc::O_RDWR as u32,
        mode: libc::S_IFREG | 0o644,
        ..Default::default()
    };
    let body = [bytes(request), format!("{name}\0").into_bytes()].concat();
    let reply = guest.call(35, parent, &body)?;
    let entry: EntryOut = parse(&reply);
    let open: OpenOut = parse(&reply[size_of::<EntryOut>()..]);
    Ok((entry.nodeid, open.fh))
}

fn read(guest: &mut Guest, node: u64) -> Vec<u8> {
    let opened = guest.call(14, node, &[0; 8]).unwrap();
    let request = fuse::ReadIn {
        fh: parse::<OpenOut>(&opened).fh,
        size: 4096,
        ..Default::default()
    };
    guest.call(15, node, &bytes(request)).unwrap()
}
