//! The table, on what every machine has mounted.

use super::*;

#[test]
fn each_is_in_the_table_once() {
    for (index, system) in TABLE.iter().enumerate() {
        let rest = &TABLE[index + 1..];
        assert!(
            !rest.iter().any(|other| other.name == system.name),
            "{}",
            system.name
        );
        let same = |other: &&KernelSystem| other.magic != 0 && other.magic == system.magic;
        assert_eq!(rest.iter().find(same), None, "{}", system.name);
        assert_ne!(system.magic, TMPFS_MAGIC, "{}", system.name);
    }
}

#[test]
fn what_is_the_kernel_s_is_found_and_refused_by_its_name() {
    for (path, name) in [
        ("/proc", "proc"),
        ("/proc/self/status", "proc"),
        ("/proc/self/ns/net", "nsfs"),
        ("/sys/kernel", "sysfs"),
    ] {
        let found = of_path(Path::new(path)).unwrap().unwrap();
        assert_eq!(found.system.name, name, "{path}");
        assert_eq!(found.own_kind(), None, "{path}");
    }
    let line = of_path(Path::new("/proc"))
        .unwrap()
        .unwrap()
        .refusal("mounts[3] (/host/proc)", Path::new("/proc"))
        .one_line();
    assert_eq!(
        line,
        "mounts[3] (/host/proc) with source /proc of type proc is not supported: its files act on the host's \
         kernel, not on the guest's; mount one of type proc"
    );
}

/// A container may have cgroup v2 whole: then its own kind is meant. A part of the host's is none.
#[test]
fn only_the_whole_becomes_the_guest_s_own() {
    let all = mount_table::read().unwrap();
    let whole = all.iter().find(|mount| mount.kind == "cgroup2");
    let Some(mount) = whole else {
        return; // a machine without it
    };
    let found = of_path(&mount.path).unwrap().unwrap();
    assert_eq!(found.own_kind(), Some("cgroup"));
    let part = of_path(&mount.path.join("cgroup.procs")).unwrap().unwrap();
    assert_eq!((part.system.name, part.own_kind()), ("cgroup2", None));
}

#[test]
fn files_are_carried_and_devices_are_left_to_others() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(of_path(directory.path()).unwrap(), None);
    assert_eq!(of_path(Path::new("/dev/null")).unwrap(), None);
    assert!(of_path(&directory.path().join("none")).is_err());
    // Its magic number is that of tmpfs.
    let all = mount_table::read().unwrap();
    if let Some(mount) = all.iter().find(|mount| mount.kind == "devtmpfs") {
        let found = of_path(&mount.path).unwrap().unwrap();
        assert_eq!(found.system.name, "devtmpfs");
    }
}

/// Users find each of the table on the page, with what helps.
#[test]
fn the_page_has_the_table() {
    let page = include_str!("../../../docs/file-systems.md");
    for system in &TABLE {
        let start = format!("| `{}` | ", system.name);
        let line = page.lines().find(|line| line.starts_with(&start));
        let what = system.own.map_or("refused", |_| "the guest's own");
        let wanted = format!("{start}{what} | {} | ", system.helps);
        assert!(
            line.is_some_and(|line| line.starts_with(&wanted)),
            "{wanted}: {line:?}"
        );
    }
}
