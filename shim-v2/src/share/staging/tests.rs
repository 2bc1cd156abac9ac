//! What is taken out of a tree, in a mount namespace of the test's own: needs root.

use std::fs;

use rustix::mount::{MountFlags, mount};

use super::super::tests::{apart, state, volume};
use super::super::*;
use super::*;
use crate::selinux::Labels;

fn make(kind: &str, place: &Path) {
    fs::create_dir_all(place).unwrap();
    mount(kind, place, kind, MountFlags::empty(), None).unwrap();
}

/// What the share shows of a directory of the host, and what is mounted there.
fn seen(share: &Share, name: &str) -> Vec<String> {
    let top = share.path.join("volumes").join(name);
    let all = mount_table::read().unwrap();
    let below = all.iter().filter_map(|mount| {
        let way = mount.path.strip_prefix(&top).ok()?;
        Some(format!("{} {}", way.display(), mount.kind))
    });
    let mut below: Vec<_> = below.filter(|line| !line.starts_with(' ')).collect();
    below.sort();
    below
}

/// As the host's `/` would be, with a name that the table of mounts can't have as it is.
fn plant(host: &Path) {
    make("tmpfs", &host.join("a tmpfs"));
    make("proc", &host.join("a tmpfs/proc"));
    fs::write(host.join("a tmpfs/file"), "kept").unwrap();
    make("sysfs", &host.join("sys"));
    make("tmpfs", &host.join("sys/kernel/mm"));
    // Hidden by what is mounted on it, and by what is mounted on the directory above.
    make("proc", &host.join("covered"));
    make("tmpfs", &host.join("covered"));
    make("proc", &host.join("above/proc"));
    make("tmpfs", &host.join("above"));
}

#[test]
fn what_is_of_the_host_s_kernel_is_taken_out_of_a_tree() {
    apart(|place| {
        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let host = place.join("host");
        fs::create_dir(&host).unwrap();
        plant(&host);
        let before = mount_table::read().unwrap().len();

        let whole = share
            .add_volume(&volume("whole", &host, ReadOnly::No))
            .unwrap();
        let wanted = [
            "a tmpfs tmpfs",
            "above tmpfs",
            "above/proc proc",
            "covered proc",
            "covered tmpfs",
        ];
        assert_eq!(seen(&share, "whole"), wanted);
        let top = share.path.join("volumes/whole");
        for empty in ["a tmpfs/proc", "sys", "above", "covered"] {
            assert_eq!(fs::read_dir(top.join(empty)).unwrap().count(), 0, "{empty}");
        }
        assert_eq!(fs::read(top.join("a tmpfs/file")).unwrap(), b"kept");
        // The host keeps all of its own.
        assert!(host.join("a tmpfs/proc/self").exists() && host.join("sys/kernel").exists());
        assert_eq!(
            fs::read_dir(state.path().join(name::STAGING))
                .unwrap()
                .count(),
            0
        );
        drop(whole);
        assert_eq!(mount_table::read().unwrap().len(), before);
    });
}

#[test]
fn a_root_has_none_either() {
    apart(|place| {
        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let bundle = place.join("bundle");
        make("proc", &bundle.join("rootfs/proc"));
        let root = share.add_rootfs("a", &bundle, &[]).unwrap();
        let seen = share.path.join("rootfs/a/proc");
        assert_eq!(fs::read_dir(seen).unwrap().count(), 0);
        drop(root);
        // Nor is one the whole root.
        make("proc", &bundle.join("rootfs"));
        let line = share.add_rootfs("b", &bundle, &[]).unwrap_err().one_line();
        assert!(
            line.contains("rootfs of type proc is not supported"),
            "{line}"
        );
    });
}

#[test]
fn what_the_path_leads_to_counts_and_nothing_stays() {
    apart(|place| {
        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let before = mount_table::read().unwrap().len();
        for source in ["/proc", "/proc/self/status", "/sys/kernel"] {
            let refused = share.add_volume(&volume("v", Path::new(source), ReadOnly::No));
            let refused = refused.unwrap_err();
            assert_eq!(refused.kind(), Kind::Unsupported);
            let wanted = format!("mounts[0] (/x) with source {source} of type ");
            assert!(
                refused.one_line().starts_with(&wanted),
                "{}",
                refused.one_line()
            );
        }
        assert_eq!(mount_table::read().unwrap().len(), before);
    });
}
