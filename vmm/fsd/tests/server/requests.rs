//! Each kind of request at least once, under the system call filter: a call that the list forgets
//! would end the server.

use std::fs;

use virtiofsd::fuse::{self, OpenOut};

use crate::guest::{Guest, bytes, parse};
use crate::server::{Server, mount_tmpfs};
use crate::{create, lookup, read};

/// A container's root, and an open file in it.
struct Root {
    server: Server,
    guest: Guest,
    /// The root's node.
    top: u64,
    /// The file's node, and its handle.
    node: u64,
    handle: u64,
}

impl Root {
    fn new() -> Self {
        let server = Server::start();
        let root = server.share.join("rootfs/c");
        fs::create_dir(&root).unwrap();
        mount_tmpfs(&root);
        let mut guest = Guest::mount(server.connect(0));
        let top = lookup(&mut guest, 1, "c").unwrap().nodeid;
        let (node, handle) = create(&mut guest, top, "file").unwrap();
        Self {
            server,
            guest,
            top,
            node,
            handle,
        }
    }

    /// A request about the file, which must succeed.
    fn of_file(&mut self, opcode: u32, body: &[u8]) -> Vec<u8> {
        self.guest.call(opcode, self.node, body).unwrap()
    }

    /// A request about the root, which must succeed.
    fn of_top(&mut self, opcode: u32, body: &[u8]) -> Vec<u8> {
        self.guest.call(opcode, self.top, body).unwrap()
    }
}

/// A request's fixed part, and the name or names behind it.
fn named(first: Vec<u8>, name: &[u8]) -> Vec<u8> {
    [first, name.to_vec()].concat()
}

#[test]
fn a_file_is_written_and_read() {
    let mut root = Root::new();
    let fh = root.handle;
    let write = bytes(fuse::WriteIn {
        fh,
        size: 4,
        ..Default::default()
    });
    root.of_file(16, &named(write, b"data"));
    assert_eq!(read(&mut root.guest, root.node), b"data");
    let sync = fuse::FsyncIn {
        fh,
        ..Default::default()
    };
    root.of_file(20, &bytes(sync));
    let flush = fuse::FlushIn {
        fh,
        ..Default::default()
    };
    root.of_file(25, &bytes(flush));
    let more = fuse::FallocateIn {
        fh,
        length: 4096,
        ..Default::default()
    };
    root.of_file(43, &bytes(more));
    let seek = fuse::LseekIn {
        fh,
        whence: 3,
        ..Default::default()
    };
    root.of_file(46, &bytes(seek));
    root.of_file(3, &[0; 16]);
    root.of_file(17, &[]);
    root.of_file(34, &[0; 8]);
    let copy = fuse::CopyfilerangeIn {
        fh_in: fh,
        nodeid_out: root.node,
        fh_out: fh,
        off_out: 4096,
        len: 2,
        ..Default::default()
    };
    root.of_file(47, &bytes(copy));
    let release = fuse::ReleaseIn {
        fh,
        ..Default::default()
    };
    root.of_file(18, &bytes(release));
    assert!(root.server.is_running());
}

#[test]
fn attributes_are_set() {
    let mut root = Root::new();
    for attributes in [
        fuse::SetattrIn {
            valid: 1,
            mode: 0o6755,
            ..Default::default()
        },
        fuse::SetattrIn {
            valid: 6,
            uid: 5.into(),
            gid: 6.into(),
            ..Default::default()
        },
        fuse::SetattrIn {
            valid: 8,
            size: 2,
            ..Default::default()
        },
        fuse::SetattrIn {
            valid: 0x30,
            atime: 1,
            mtime: 2,
            ..Default::default()
        },
    ] {
        root.of_file(4, &bytes(attributes));
    }
    let set = bytes(fuse::SetxattrInCompat { size: 3, flags: 0 });
    root.of_file(21, &named(set, b"user.a\0one"));
    let get = bytes(fuse::GetxattrIn {
        size: 64,
        padding: 0,
    });
    assert_eq!(root.of_file(22, &named(get.clone(), b"user.a\0")), b"one");
    root.of_file(23, &get);
    root.of_file(24, b"user.a\0");
    assert!(root.server.is_running());
}

#[test]
fn names_are_made_and_removed() {
    let mut root = Root::new();
    let directory = bytes(fuse::MkdirIn {
        mode: 0o755,
        umask: 0,
    });
    root.of_top(9, &named(directory, b"dir\0"));
    root.of_top(6, b"link\0target\0");
    let link = lookup(&mut root.guest, root.top, "link").unwrap().nodeid;
    assert_eq!(root.guest.call(5, link, &[]).unwrap(), b"target");
    // Attributes of a file that can't be opened go through /proc/self/fd.
    let get = bytes(fuse::GetxattrIn {
        size: 64,
        padding: 0,
    });
    let attribute = root.guest.call(22, link, &named(get, b"user.a\0"));
    assert!(attribute.is_err());
    let fifo = bytes(fuse::MknodIn {
        mode: libc::S_IFIFO | 0o600,
        ..Default::default()
    });
    root.of_top(8, &named(fifo, b"fifo\0"));
    let device = bytes(fuse::MknodIn {
        mode: libc::S_IFCHR | 0o600,
        rdev: 0x103,
        ..Default::default()
    });
    let refused = root.guest.call(8, root.top, &named(device, b"null\0"));
    assert_eq!(refused.err(), Some(libc::EPERM));
    let hard = bytes(fuse::LinkIn {
        oldnodeid: root.node,
    });
    root.of_top(13, &named(hard, b"hard\0"));
    let rename = bytes(fuse::Rename2In {
        newdir: root.top,
        flags: 0,
        padding: 0,
    });
    root.of_top(45, &named(rename, b"hard\0soft\0"));
    root.of_top(10, b"soft\0");
    root.of_top(11, b"dir\0");
    assert!(root.server.is_running());
}

/// The rarer ways, which take calls of their own: as another user, by a descriptor, by a path of
/// /proc/self/fd for what can't be opened.
#[test]
fn requests_go_the_rarer_ways_too() {
    let mut root = Root::new();
    let open_to_all = fuse::SetattrIn {
        valid: 1,
        mode: 0o777,
        ..Default::default()
    };
    root.of_top(4, &bytes(open_to_all));
    root.guest.user = 1000;
    let (_, handle) = create(&mut root.guest, root.top, "mine").unwrap();
    let directory = bytes(fuse::MkdirIn {
        mode: 0o755,
        umask: 0o22,
    });
    root.of_top(9, &named(directory, b"mine.d\0"));
    root.of_top(6, b"mine.link\0target\0");
    root.guest.user = 0;
    let mine = lookup(&mut root.guest, root.top, "mine").unwrap();
    assert_eq!((mine.attr.uid, mine.attr.gid), (1000.into(), 1000.into()));
    // FATTR_MODE, FATTR_SIZE, FATTR_ATIME_NOW, FATTR_MTIME_NOW; each with FATTR_FH.
    for valid in [1 << 0, 1 << 3, 1 << 7 | 1 << 8] {
        let attributes = fuse::SetattrIn {
            valid: valid | 1 << 6,
            fh: handle,
            mode: 0o600,
            ..Default::default()
        };
        root.guest.call(4, mine.nodeid, &bytes(attributes)).unwrap();
    }
    let only_data = fuse::FsyncIn {
        fh: handle,
        fsync_flags: 1,
        ..Default::default()
    };
    root.guest.call(20, mine.nodeid, &bytes(only_data)).unwrap();
    let link = lookup(&mut root.guest, root.top, "mine.link")
        .unwrap()
        .nodeid;
    let set = bytes(fuse::SetxattrInCompat { size: 3, flags: 0 });
    let size = bytes(fuse::GetxattrIn {
        size: 64,
        padding: 0,
    });
    assert!(
        root.guest
            .call(21, link, &named(set, b"user.a\0one"))
            .is_err()
    );
    assert!(root.guest.call(23, link, &size).unwrap().is_empty());
    assert!(root.guest.call(24, link, b"user.a\0").is_err());
    let unnamed = root
        .guest
        .call(18, mine.nodeid, &bytes(fuse::ReleaseIn::default()));
    assert!(unnamed.is_err());
    assert!(root.server.is_running());
}

#[test]
fn a_directory_is_listed() {
    let mut root = Root::new();
    let opened = root.of_top(27, &[0; 8]);
    let list = fuse::ReadIn {
        fh: parse::<OpenOut>(&opened).fh,
        size: 4096,
        ..Default::default()
    };
    assert!(!root.of_top(28, &bytes(list)).is_empty());
    let list = fuse::ReadIn { offset: 0, ..list };
    root.of_top(44, &bytes(list));
    let release = fuse::ReleaseIn {
        fh: list.fh,
        ..Default::default()
    };
    root.of_top(29, &bytes(release));
    root.of_top(50, &[0; 8]);
    assert!(root.server.is_running());
}

#[test]
fn what_is_not_supported_is_refused() {
    let mut root = Root::new();
    for unsupported in [31, 39, 40, 48, 51, 4096] {
        let answer = root.guest.call(unsupported, root.top, &[0; 64]);
        assert!(answer.is_err(), "{unsupported}");
    }
    assert!(root.server.is_running());
}
