//! Guests' locks on the wire, served inside the jail: two pods and the host exclude each other.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::mount::mount_bind;
use virtiofsd::fuse::{self, AttrOut, FileLock, LkIn, LkOut, OpenOut};

use crate::guest::{Guest, LOCKS, bytes, parse};
use crate::server::{Server, mount_tmpfs};
use crate::{create, lookup};

const GETLK: u32 = 31;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
const FLUSH: u32 = 25;
const RELEASE: u32 = 18;

/// A pod with an open file of a volume.
struct Pod {
    server: Server,
    guest: Guest,
    volume: PathBuf,
    node: u64,
    handle: u64,
}

impl Pod {
    /// A pod with a new volume, or with the volume of another pod.
    fn start(volume: Option<&Path>) -> Self {
        let server = Server::start();
        let place = server.share.join("volumes/v");
        fs::create_dir(&place).unwrap();
        match volume {
            None => {
                mount_tmpfs(&place);
                fs::write(place.join("file"), "").unwrap();
            }
            Some(volume) => mount_bind(volume, &place).unwrap(),
        }
        let mut guest = Guest::mount(server.connect(1));
        assert_eq!(guest.accepted & LOCKS, LOCKS);
        let top = lookup(&mut guest, 1, "v").unwrap().nodeid;
        let node = lookup(&mut guest, top, "file").unwrap().nodeid;
        let handle = open(&mut guest, node);
        Self {
            server,
            guest,
            volume: place,
            node,
            handle,
        }
    }

    fn try_lock(&mut self, request: &LkIn) -> Result<(), i32> {
        self.guest
            .call(SETLK, self.node, &bytes(*request))
            .map(drop)
    }

    fn request(&self, kind: i32, lk_flags: u32) -> LkIn {
        LkIn {
            fh: self.handle,
            owner: 1,
            lk: FileLock {
                start: 0,
                end: i64::MAX as u64,
                type_: kind as u32,
                pid: 1,
            },
            lk_flags,
            padding: 0,
        }
    }

    fn host_file(&self) -> File {
        let path = self.volume.join("file");
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }
}

fn open(guest: &mut Guest, node: u64) -> u64 {
    let request = fuse::OpenIn {
        flags: libc::O_RDWR as u32,
        ..Default::default()
    };
    let opened = guest.call(14, node, &bytes(request)).unwrap();
    parse::<OpenOut>(&opened).fh
}

/// Whether a process of the host can lock the whole file, by POSIX or by flock.
fn host_locks(file: &File, flock: bool) -> bool {
    match flock {
        true => rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok(),
        false => posix_lock(file, libc::F_WRLCK),
    }
}

fn host_unlocks(file: &File, flock: bool) {
    match flock {
        true => rustix::fs::flock(file, FlockOperation::Unlock).unwrap(),
        false => assert!(posix_lock(file, libc::F_UNLCK)),
    }
}

fn posix_lock(file: &File, kind: i32) -> bool {
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel only reads the struct, which lives.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &whole) == 0 }
}

/// Where others may lock, the guest's kernel asks for locks. Elsewhere it keeps its locks itself.
#[test]
fn two_pods_and_the_host_exclude_each_other() {
    let mut one = Pod::start(None);
    let private = Guest::mount(one.server.connect(0));
    assert_eq!(private.accepted & LOCKS, 0);
    let mut two = Pod::start(Some(&one.volume));
    for flags in [0, fuse::LK_FLOCK] {
        let flock = flags != 0;
        let (of_one, of_two) = (
            one.request(libc::F_WRLCK, flags),
            two.request(libc::F_WRLCK, flags),
        );
        let host = one.host_file();
        one.try_lock(&of_one).unwrap();
        assert_eq!(two.try_lock(&of_two), Err(libc::EAGAIN), "flock: {flock}");
        assert!(!host_locks(&host, flock), "flock: {flock}");
        one.try_lock(&one.request(libc::F_UNLCK, flags)).unwrap();
        assert!(host_locks(&host, flock), "flock: {flock}");
        assert_eq!(two.try_lock(&of_two), Err(libc::EAGAIN), "flock: {flock}");
        host_unlocks(&host, flock);
        two.try_lock(&of_two).unwrap();
        assert_eq!(one.try_lock(&of_one), Err(libc::EAGAIN), "flock: {flock}");
        two.try_lock(&two.request(libc::F_UNLCK, flags)).unwrap();
    }
    // What the guest hears of another pod's lock.
    two.try_lock(&two.request(libc::F_RDLCK, 0)).unwrap();
    let test = bytes(one.request(libc::F_WRLCK, 0));
    let found: LkOut = parse(&one.guest.call(GETLK, one.node, &test).unwrap());
    let found = (found.lk.type_, found.lk.start, found.lk.end, found.lk.pid);
    assert_eq!(found, (libc::F_RDLCK as u32, 0, i64::MAX as u64, 0));
    // A pod's locks end with it.
    drop(two);
    one.try_lock(&one.request(libc::F_WRLCK, 0)).unwrap();
    assert!(one.server.is_running());
}

#[test]
fn closing_a_file_gives_its_locks_up() {
    let mut pod = Pod::start(None);
    let host = pod.host_file();
    let lock = pod.request(libc::F_WRLCK, 0);
    pod.try_lock(&lock).unwrap();
    let flush = |owner| {
        bytes(fuse::FlushIn {
            fh: pod.handle,
            lock_owner: owner,
            ..Default::default()
        })
    };
    pod.guest.call(FLUSH, pod.node, &flush(2)).unwrap();
    assert!(!host_locks(&host, false), "another owner's close");
    pod.guest.call(FLUSH, pod.node, &flush(1)).unwrap();
    assert!(host_locks(&host, false));
    host_unlocks(&host, false);

    pod.try_lock(&lock).unwrap();
    pod.try_lock(&pod.request(libc::F_WRLCK, fuse::LK_FLOCK))
        .unwrap();
    assert!(!host_locks(&host, true) && !host_locks(&host, false));
    let release = fuse::ReleaseIn {
        fh: pod.handle,
        release_flags: fuse::RELEASE_FLOCK_UNLOCK,
        lock_owner: 1,
        ..Default::default()
    };
    pod.guest.call(RELEASE, pod.node, &bytes(release)).unwrap();
    assert!(host_locks(&host, true) && host_locks(&host, false));
}

/// A waiting request holds nothing up. It gets the lock when the holder gives it up, in this pod or
/// another.
#[test]
fn a_lock_that_is_waited_for_is_granted_later() {
    let mut pod = Pod::start(None);
    let host = pod.host_file();
    for flags in [0, fuse::LK_FLOCK] {
        let flock = flags != 0;
        let wanted = pod.request(libc::F_WRLCK, flags);
        assert!(host_locks(&host, flock));
        pod.guest.start(SETLKW, pod.node, &bytes(wanted));
        let other = lookup(&mut pod.guest, 1, "v").unwrap().nodeid;
        create(&mut pod.guest, other, &format!("other-{flags}")).unwrap();
        assert!(pod.guest.waits());
        host_unlocks(&host, flock);
        pod.guest.finish().unwrap();
        assert!(!host_locks(&host, flock));

        // Another owner, with another handle.
        let second = LkIn {
            fh: open(&mut pod.guest, pod.node),
            owner: 2,
            ..wanted
        };
        assert_eq!(pod.try_lock(&second), Err(libc::EAGAIN));
        pod.guest.start(SETLKW, pod.node, &bytes(second));
        assert_eq!(pod.try_lock(&wanted), Ok(()));
        assert!(pod.guest.waits());
        pod.try_lock(&pod.request(libc::F_UNLCK, flags)).unwrap();
        pod.guest.finish().unwrap();
        assert_eq!(pod.try_lock(&wanted), Err(libc::EAGAIN));
        let unlock = LkIn {
            lk: FileLock {
                type_: libc::F_UNLCK as u32,
                ..second.lk
            },
            ..second
        };
        pod.try_lock(&unlock).unwrap();
    }
    assert!(pod.server.is_running());
}

/// The guest judges its cached pages by attributes. A process that gets a lock must not see old
/// ones, so where there are locks the guest asks for attributes and names each time.
#[test]
fn where_there_are_locks_nothing_is_remembered() {
    let mut pod = Pod::start(None);
    let node = pod.node;
    let kept = |pod: &mut Pod| -> u32 {
        let reply = pod.guest.call(3, node, &[0; 16]).unwrap();
        let looked = lookup(&mut pod.guest, 1, "v").unwrap().nodeid;
        let looked = lookup(&mut pod.guest, looked, "file").unwrap();
        let attributes: AttrOut = parse(&reply);
        assert_eq!(looked.attr_valid_nsec, attributes.attr_valid_nsec);
        assert_eq!(looked.entry_valid_nsec, attributes.attr_valid_nsec);
        attributes.attr_valid_nsec
    };
    assert_eq!(kept(&mut pod), 500_000_000);
    pod.try_lock(&pod.request(libc::F_RDLCK, 0)).unwrap();
    assert_eq!(kept(&mut pod), 0);
    let release = fuse::ReleaseIn {
        fh: pod.handle,
        ..Default::default()
    };
    pod.guest.call(RELEASE, node, &bytes(release)).unwrap();
    assert_eq!(kept(&mut pod), 500_000_000);
}

/// A request that no honest kernel sends gets an answer, and the server goes on.
#[test]
fn hostile_lock_requests_are_refused() {
    let mut pod = Pod::start(None);
    let good = pod.request(libc::F_WRLCK, 0);
    let lock = |type_: u32, start: u64, end: u64| LkIn {
        lk: FileLock {
            type_,
            start,
            end,
            pid: 1,
        },
        ..good
    };
    for (bad, errno) in [
        (lock(7, 0, 1), libc::EINVAL),
        (lock(u32::MAX, 0, 1), libc::EINVAL),
        (lock(1, 1, 0), libc::EINVAL),
        (lock(1, 0, u64::MAX), libc::EINVAL),
        (LkIn { fh: 999, ..good }, libc::EBADF),
    ] {
        for opcode in [GETLK, SETLK, SETLKW] {
            let answer = pod.guest.call(opcode, pod.node, &bytes(bad));
            assert_eq!(answer.err(), Some(errno), "{opcode} {bad:?}");
        }
    }
    assert_eq!(
        pod.guest.call(SETLK, 1, &bytes(good)).err(),
        Some(libc::EBADF)
    );
    assert_eq!(
        pod.guest.call(SETLK, 1 << 40, &bytes(good)).err(),
        Some(libc::EBADF)
    );
    pod.try_lock(&good).unwrap();
    assert!(pod.server.is_running());
}
