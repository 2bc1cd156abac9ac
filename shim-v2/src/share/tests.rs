//! Shares in a mount namespace of the test's own: needs root.

use std::fs;
use std::path::Path;

use rustix::mount::MountFlags;

use super::*;

mod swaps;

/// Runs `work` in a thread with a mount namespace of its own; the rest of the tests see nothing.
pub(super) fn apart(work: impl FnOnce(&Path) + Send) {
    let place = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let path = place.path();
        let thread = scope.spawn(move || {
            own_namespace().unwrap();
            work(path);
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

pub(super) fn state(place: &Path) -> StateFolder {
    let root = place.join("state");
    StateFolder::create_under(&root, "ns", "pod").unwrap()
}

fn mounts_below(path: &Path) -> usize {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let path = path.to_str().unwrap();
    table.lines().filter(|line| line.contains(path)).count()
}

fn bind_of(source: &Path) -> RootfsMount {
    RootfsMount {
        kind: "bind".into(),
        source: source.display().to_string(),
        options: vec!["rbind".into(), "rw".into()],
        ..RootfsMount::default()
    }
}

pub(super) fn volume(name: &str, source: &Path, read_only: ReadOnly) -> Volume {
    Volume {
        name: name.into(),
        field: "mounts[0] (/x)".into(),
        source: source.into(),
        read_only,
        recursive: true,
        follows: false,
    }
}

#[test]
fn a_root_and_volumes_come_and_go() {
    apart(|place| {
        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let (bundle, image) = (place.join("bundle"), place.join("image"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::create_dir_all(image.join("etc")).unwrap();
        fs::write(place.join("file"), "text").unwrap();

        let rootfs = share.add_rootfs("a", &bundle, &[bind_of(&image)]).unwrap();
        let file = share
            .add_volume(&volume("volume-1", &place.join("file"), ReadOnly::Top))
            .unwrap();
        let seen = state.path().join(name::SHARE);
        assert!(seen.join("rootfs/a/etc").is_dir());
        assert_eq!(
            fs::read_to_string(seen.join("volumes/volume-1")).unwrap(),
            "text"
        );
        fs::write(seen.join("rootfs/a/new"), "").unwrap();
        let refused = fs::write(seen.join("volumes/volume-1"), "").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
        // The share itself takes nothing from the guest.
        for name in ["x", "rootfs/x", "volumes/x"] {
            let refused = fs::write(seen.join(name), "").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem, "{name}");
        }

        drop(file);
        for one in rootfs.into_iter().rev() {
            drop(one);
        }
        assert!(!seen.join("rootfs/a").exists() && !seen.join("volumes/volume-1").exists());
        drop(share);
        assert_eq!(mounts_below(place), 0);
        state.remove().unwrap();
    });
}

#[test]
fn the_file_server_s_clone_follows() {
    apart(|place| {
        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let tree = share.tree().unwrap();
        let (bundle, image) = (place.join("bundle"), place.join("image"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::create_dir_all(image.join("etc")).unwrap();
        let view = place.join("view");
        fs::create_dir(&view).unwrap();
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tree, "", CWD, &view, flags).unwrap();
        let rootfs = share.add_rootfs("a", &bundle, &[bind_of(&image)]).unwrap();
        assert!(view.join("rootfs/a/etc").is_dir());
        for one in rootfs.into_iter().rev() {
            drop(one);
        }
        assert!(!view.join("rootfs/a").exists());
        unmount(&view, UnmountFlags::DETACH).unwrap();
    });
}

#[test]
fn an_overlay_of_many_layers_is_mounted() {
    apart(|place| {
        // As long as containerd's: the page holds 40 of these.
        let snapshots = place.join("io.containerd.snapshotter.v1.overlayfs/a-long-name/snapshots");
        let layers: Vec<String> = (0..120)
            .map(|layer| {
                let path = snapshots.join(format!("{layer}/fs"));
                fs::create_dir_all(&path).unwrap();
                fs::write(path.join(format!("file-{layer}")), "").unwrap();
                path.display().to_string()
            })
            .collect();
        // Every second test machine has an overlay as its root, on which no upper layer can lie.
        let memory = place.join("memory");
        fs::create_dir(&memory).unwrap();
        let request = RootfsMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec!["ro".into(), format!("lowerdir={}", layers.join(":"))],
            ..RootfsMount::default()
        };
        let mounted = mount_one(&memory, &request).unwrap();
        assert_eq!(fs::read_dir(&memory).unwrap().count(), 120);
        drop(mounted);
        assert_eq!(mounts_below(place), 0);
    });
}

/// `ro` is the top's, as under runc, and `rro` that of all mounts, of each for itself.
#[test]
fn what_is_read_only_is_so_for_the_host() {
    apart(|place| {
        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let source = place.join("source");
        fs::create_dir_all(source.join("below")).unwrap();
        let below = source.join("below");
        rustix::mount::mount("none", &below, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::create_dir(below.join("deep")).unwrap();
        let deep = below.join("deep");
        rustix::mount::mount("none", &deep, "tmpfs", MountFlags::empty(), None).unwrap();
        let names = [ReadOnly::No, ReadOnly::Top, ReadOnly::All]
            .map(|read_only| volumes::name(&volume("", &source, read_only)).unwrap());
        assert!(names[0] != names[1] && names[1] != names[2] && names[0] != names[2]);
        let top = share.add_volume(&volume("top", &source, ReadOnly::Top));
        let all = share.add_volume(&volume("all", &source, ReadOnly::All));
        let seen = state.path().join(name::SHARE).join("volumes");
        for (path, writable) in [
            ("top/x", false),
            ("top/below/x", true),
            ("top/below/deep/x", true),
            ("all/x", false),
            ("all/below/y", false),
            ("all/below/deep/y", false),
        ] {
            match fs::write(seen.join(path), "") {
                Ok(()) => assert!(writable, "{path}"),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
                    assert!(!writable, "{path}");
                }
            }
        }
        fs::write(deep.join("host's"), "").unwrap(); // the host's own mounts are as they were
        drop((top, all));
        drop(share);
    });
}

/// It is seen as what it is; that nobody answers there is the guest kernel's to say.
#[test]
fn a_socket_is_shared_as_one() {
    use std::os::unix::fs::FileTypeExt;
    apart(|place| {
        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let socket = place.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let mounted = share
            .add_volume(&volume("v", &socket, ReadOnly::No))
            .unwrap();
        let seen = share.path.join("volumes/v");
        assert!(fs::metadata(&seen).unwrap().file_type().is_socket());
        drop(mounted);
        assert!(!seen.exists());
    });
}

#[test]
fn what_can_t_be_shared_is_refused_and_nothing_stays() {
    apart(|place| {
        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let before = mounts_below(place);
        let device = Path::new("/dev/null");
        let line = share
            .add_volume(&volume("v", device, ReadOnly::No))
            .unwrap_err()
            .one_line();
        assert!(line.contains("a device of the host can't"), "{line}");
        let line = share
            .add_volume(&volume("v", &place.join("x"), ReadOnly::No))
            .unwrap_err()
            .one_line();
        assert!(
            line.ends_with("x: No such file or directory (os error 2)"),
            "{line}"
        );
        let line = share
            .add_volume(&volume("../v", place, ReadOnly::No))
            .unwrap_err()
            .one_line();
        assert!(line.contains("is not a name"), "{line}");

        let bundle = place.join("bundle");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let ext4 = RootfsMount {
            kind: "ext4".into(),
            ..RootfsMount::default()
        };
        let line = share
            .add_rootfs("a", &bundle, &[bind_of(place), ext4])
            .unwrap_err();
        assert_eq!(line.kind(), Kind::Unsupported);
        assert!(
            line.one_line().starts_with("mount rootfs[1] (ext4)"),
            "{}",
            line.one_line()
        );
        assert_eq!(mounts_below(place), before);
        assert_eq!(
            fs::read_dir(state.path().join("share/rootfs"))
                .unwrap()
                .count(),
            0
        );
    });
}

#[test]
fn a_link_in_the_image_leads_nowhere() {
    let place = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/etc", place.path().join("link")).unwrap();
    fs::create_dir(place.path().join("real")).unwrap();
    assert!(target_in(place.path(), "link").is_err());
    assert!(target_in(place.path(), "../x").is_err());
    assert_eq!(
        target_in(place.path(), "/real").unwrap(),
        place.path().join("real")
    );
}
