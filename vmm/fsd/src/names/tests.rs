//! The check in front of the real library, on a directory of the host that must not change.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use virtiofsd::passthrough::{Config, PassthroughFs};

use super::*;

const NAMES: [&[u8]; 9] = [
    b"",
    b".",
    b"..",
    b"a/b",
    b"/etc",
    b"../escaped",
    b"a/",
    b"/",
    b"inside/../../escaped",
];

fn serve(directory: &Path) -> Checked<PassthroughFs> {
    let config = Config {
        root_dir: directory.to_str().unwrap().into(),
        xattr: true,
        ..Config::default()
    };
    let server = Checked::new(
        Arc::new(PassthroughFs::new(config).unwrap()),
        Others::Nobody {
            missing_names: Duration::from_secs(9),
        },
    );
    server.init(FsOptions::empty()).unwrap();
    server
}

fn root() -> Context {
    Context {
        uid: 0.into(),
        gid: 0.into(),
        pid: 1,
    }
}

fn none() -> Extensions {
    Extensions::default()
}

fn c(name: &[u8]) -> CString {
    CString::new(name).unwrap()
}

/// Sends each request that takes a name, with `bad` in each place of a name.
fn send_everywhere(
    server: &Checked<PassthroughFs>,
    bad: &CStr,
) -> Vec<(&'static str, Option<i32>)> {
    let good = c(b"new");
    let old = c(b"file");
    let file = server.lookup(root(), ROOT_ID, &old).unwrap().inode;
    fn code<T>(result: io::Result<T>) -> Option<i32> {
        result.err().and_then(|error| error.raw_os_error())
    }
    vec![
        ("lookup", code(server.lookup(root(), ROOT_ID, bad))),
        (
            "symlink",
            code(server.symlink(root(), &good, ROOT_ID, bad, none())),
        ),
        (
            "mknod",
            code(server.mknod(root(), ROOT_ID, bad, libc::S_IFREG | 0o644, 0, 0, none())),
        ),
        (
            "mkdir",
            code(server.mkdir(root(), ROOT_ID, bad, 0o755, 0, none())),
        ),
        ("unlink", code(server.unlink(root(), ROOT_ID, bad))),
        ("rmdir", code(server.rmdir(root(), ROOT_ID, bad))),
        (
            "rename from",
            code(server.rename(root(), ROOT_ID, bad, ROOT_ID, &good, 0)),
        ),
        (
            "rename to",
            code(server.rename(root(), ROOT_ID, &old, ROOT_ID, bad, 0)),
        ),
        ("link", code(server.link(root(), file, ROOT_ID, bad))),
        (
            "create",
            code(server.create(root(), ROOT_ID, bad, 0o644, false, 2, 0, none())),
        ),
    ]
}

#[test]
fn no_hostile_name_reaches_the_host_in_any_request() {
    let outside = tempfile::tempdir().unwrap();
    let share = outside.path().join("share");
    fs::create_dir_all(share.join("inside")).unwrap();
    fs::create_dir(share.join("a")).unwrap();
    fs::write(share.join("file"), "content").unwrap();
    fs::write(outside.path().join("escaped"), "outside").unwrap();
    let server = serve(&share);
    for name in NAMES {
        for (request, answer) in send_everywhere(&server, &c(name)) {
            assert_eq!(answer, Some(libc::EINVAL), "{request} {name:?}");
        }
    }
    let long = c(&[b'x'; 256]);
    for (request, answer) in send_everywhere(&server, &long) {
        assert_eq!(answer, Some(libc::ENAMETOOLONG), "{request}");
    }
    let mut left: Vec<_> = fs::read_dir(&share)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["a", "file", "inside"]);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 2);
    assert_eq!(fs::read_to_string(share.join("file")).unwrap(), "content");
}

#[test]
fn odd_but_legal_names_work() {
    let share = tempfile::tempdir().unwrap();
    let server = serve(share.path());
    for name in [
        &b"..."[..],
        b".hidden",
        b"a\\b",
        b"\xff\xfe",
        b" ",
        b"a\nb",
        &[b'y'; 255],
    ] {
        let name = c(name);
        server
            .mkdir(root(), ROOT_ID, &name, 0o755, 0, none())
            .unwrap();
        assert_ne!(server.lookup(root(), ROOT_ID, &name).unwrap().inode, 0);
        server.rmdir(root(), ROOT_ID, &name).unwrap();
    }
}

#[test]
fn a_symlink_may_point_anywhere_but_is_never_followed_here() {
    let share = tempfile::tempdir().unwrap();
    let server = serve(share.path());
    server
        .symlink(root(), c"/etc/passwd", ROOT_ID, c"link", none())
        .unwrap();
    let entry = server.lookup(root(), ROOT_ID, c"link").unwrap();
    assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    let opened = server.open(root(), entry.inode, false, 0);
    assert_eq!(opened.err().unwrap().raw_os_error(), Some(libc::EBADF));
    let below = server.lookup(root(), entry.inode, c"passwd");
    assert!(below.is_err());
}

#[test]
fn device_nodes_are_refused_and_a_whiteout_is_not() {
    let share = tempfile::tempdir().unwrap();
    let server = serve(share.path());
    let make = |kind: u32, device: u32| {
        server.mknod(root(), ROOT_ID, c"node", kind | 0o600, device, 0, none())
    };
    for (kind, device) in [
        (libc::S_IFCHR, 0x103),
        (libc::S_IFBLK, 0x800),
        (libc::S_IFBLK, 0),
    ] {
        let refused = make(kind, device).err().unwrap();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    }
    let odd = make(libc::S_IFDIR, 0).err().unwrap();
    assert_eq!(odd.raw_os_error(), Some(libc::EINVAL));
    make(libc::S_IFCHR, 0).unwrap();
    let node = fs::symlink_metadata(share.path().join("node")).unwrap();
    assert!(node.file_type().is_char_device());
}

/// An open FIFO without a writer would block the share's only worker for good.
#[test]
fn a_fifo_is_never_opened() {
    let share = tempfile::tempdir().unwrap();
    let server = serve(share.path());
    let fifo = server
        .mknod(
            root(),
            ROOT_ID,
            c"fifo",
            libc::S_IFIFO | 0o600,
            0,
            0,
            none(),
        )
        .unwrap();
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
        assert!(
            server
                .open(root(), fifo.inode, false, flags as u32)
                .is_err()
        );
    }
    let again = server.create(root(), ROOT_ID, c"fifo", 0o600, false, 0, 0, none());
    assert!(again.is_err());
}

#[test]
fn path_descriptors_and_unnamed_files_are_refused() {
    let share = tempfile::tempdir().unwrap();
    let server = serve(share.path());
    for flags in [libc::O_PATH, libc::O_TMPFILE | libc::O_RDWR] {
        assert!(server.open(root(), ROOT_ID, false, flags as u32).is_err());
        assert!(server.opendir(root(), ROOT_ID, flags as u32).is_err());
    }
    server
        .opendir(root(), ROOT_ID, libc::O_DIRECTORY as u32)
        .unwrap();
}

#[test]
fn missing_names_are_remembered_below_the_top_only() {
    let share = tempfile::tempdir().unwrap();
    fs::create_dir(share.path().join("container")).unwrap();
    let server = serve(share.path());
    let top = server.lookup(root(), ROOT_ID, c"missing").err().unwrap();
    assert_eq!(top.raw_os_error(), Some(libc::ENOENT));
    let container = server.lookup(root(), ROOT_ID, c"container").unwrap();
    assert_eq!(container.entry_timeout, Duration::ZERO);
    let missing = server.lookup(root(), container.inode, c"missing").unwrap();
    assert_eq!(
        (missing.inode, missing.entry_timeout),
        (0, Duration::from_secs(9))
    );
}

/// An open of a file that the host has changed is refused once, so that the guest's kernel looks
/// again. A change by the guest itself is not.
#[test]
fn an_open_finds_what_the_host_has_changed() {
    let share = tempfile::tempdir().unwrap();
    let path = share.path().join("file");
    fs::write(&path, "first").unwrap();
    let server = serve(share.path());
    let node = server.lookup(root(), ROOT_ID, c"file").unwrap().inode;
    let open = |flags: i32| {
        let opened = server.open(root(), node, false, flags as u32);
        opened
            .map(|(handle, _)| handle.unwrap())
            .map_err(|error| error.raw_os_error())
    };
    assert!(open(libc::O_RDONLY).is_ok(), "it is as it was told");
    fs::write(&path, "longer").unwrap();
    assert_eq!(open(libc::O_RDONLY), Err(Some(libc::ESTALE)));
    assert!(open(libc::O_RDONLY).is_ok(), "once is enough");

    let handle = open(libc::O_RDWR).unwrap();
    server.fallocate(root(), node, handle, 0, 0, 100).unwrap();
    assert!(open(libc::O_RDONLY).is_ok(), "the guest has done it");
    fs::write(&path, "again").unwrap();
    server.lookup(root(), ROOT_ID, c"file").unwrap();
    assert!(open(libc::O_RDONLY).is_ok(), "the guest has looked");
    fs::write(&path, "and again").unwrap();
    assert!(open(libc::O_RDWR | libc::O_TRUNC).is_ok(), "it is cut off");
    assert!(open(libc::O_RDONLY).is_ok());
    // The host has put a file in its place.
    let new = share.path().join("new");
    fs::write(&new, "new").unwrap();
    let kept = server.lookup(root(), ROOT_ID, c"file").unwrap().inode;
    assert_eq!(kept, node);
    fs::rename(&new, &path).unwrap();
    assert_eq!(open(libc::O_RDONLY), Err(Some(libc::ESTALE)));
    let node = server.lookup(root(), ROOT_ID, c"file").unwrap().inode;
    assert_ne!(node, kept);
    let open = |flags: i32| server.open(root(), node, false, flags as u32);
    // A new name or mode does not concern the content.
    let moved = share.path().join("moved");
    fs::rename(&path, &moved).unwrap();
    fs::set_permissions(&moved, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(open(libc::O_RDONLY).is_ok());
}

#[test]
fn attributes_with_absurd_names_and_sizes_are_refused_or_cut() {
    let share = tempfile::tempdir().unwrap();
    let server = serve(share.path());
    for name in [c(b""), c(&[b'n'; 256])] {
        let flags = SetxattrFlags::empty();
        let set = server.setxattr(root(), ROOT_ID, &name, b"v", 0, flags);
        assert_eq!(set.err().unwrap().raw_os_error(), Some(libc::ERANGE));
        let get = server.getxattr(root(), ROOT_ID, &name, 10);
        assert_eq!(get.err().unwrap().raw_os_error(), Some(libc::ERANGE));
        let remove = server.removexattr(root(), ROOT_ID, &name);
        assert_eq!(remove.err().unwrap().raw_os_error(), Some(libc::ERANGE));
    }
    assert!(server.listxattr(root(), ROOT_ID, u32::MAX).is_ok());
}

/// A file of a guest's user belongs to that user on the host, in a directory that only a group of
/// theirs may write.
#[test]
fn files_are_made_as_the_guest_s_user_with_their_groups() {
    let share = tempfile::tempdir().unwrap();
    let shared = share.path().join("shared");
    fs::create_dir(&shared).unwrap();
    std::os::unix::fs::chown(&shared, Some(0), Some(7777)).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o770)).unwrap();
    fs::set_permissions(share.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let server = serve(share.path());
    server.destroy();
    server.init(FsOptions::CREATE_SUPP_GROUP).unwrap();
    let directory = server.lookup(root(), ROOT_ID, c"shared").unwrap().inode;
    let user = Context {
        uid: 1234.into(),
        gid: 1234.into(),
        pid: 1,
    };
    let in_group = Extensions {
        sup_gids: vec![7777.into()],
        ..none()
    };
    let refused = server
        .mkdir(user, directory, c"no", 0o755, 0, none())
        .err()
        .unwrap();
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    let made = server
        .mkdir(user, directory, c"yes", 0o755, 0, in_group.clone())
        .unwrap();
    assert_eq!(made.attr.uid, 1234.into());
    // Root's groups do not stay behind for the next user.
    server
        .mkdir(root(), directory, c"root", 0o755, 0, in_group)
        .unwrap();
    assert!(
        server
            .mkdir(user, directory, c"no", 0o755, 0, none())
            .is_err()
    );
}
