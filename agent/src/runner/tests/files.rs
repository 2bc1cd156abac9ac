//! What the containers of `tests` find in their file systems: links, devices and volumes.

use std::os::unix::fs::{PermissionsExt, lchown};

use super::*;

pub(super) fn planted_symlinks_lead_nowhere(case: &mut Case) {
    let outside = case.directory.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), "outside").unwrap();
    let rootfs = case.rootfs();
    symlink(&outside, rootfs.join("absolute")).unwrap();
    symlink("../../../../../../../../../..", rootfs.join("up")).unwrap();
    symlink("../run/made/resolv.conf", rootfs.join("etc/resolv.conf")).unwrap();
    symlink(outside.join("file"), rootfs.join("secret")).unwrap();
    let mounts = case.spec["mounts"].as_array_mut().unwrap();
    for (destination, source) in [
        ("/absolute/a", "volume:etc"),
        ("/up/b", "volume:etc"),
        ("/etc/resolv.conf", "volume:etc"),
    ] {
        mounts.push(json!({"destination": destination, "source": source, "options": ["bind"]}));
    }
    case.spec["linux"]["maskedPaths"] = json!(["/secret", "/up/etc/passwd"]);
    case.spec["linux"]["readonlyPaths"] = json!(["/up/tmp"]);
    let (exit, printed) = case
        .shell("ls -d /b/hostname /run/made/resolv.conf/hostname; touch /tmp/x || cat /etc/passwd; cat /secret")
        .unwrap();
    assert_eq!(exit, 1, "{printed}");
    assert!(
        printed.starts_with("/b/hostname\n/run/made/resolv.conf/hostname\n"),
        "{printed}"
    );
    assert!(
        printed.contains("Read-only file system") && !printed.contains("root:"),
        "{printed}"
    );
    // What the link points to from the root's view was made in there, and nothing outside.
    let inside = rootfs.join(outside.strip_prefix("/").unwrap()).join("a");
    assert!(inside.is_dir());
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(
        std::fs::read_to_string(outside.join("file")).unwrap(),
        "outside"
    );

    // Where procfs is expected there must be no way around it.
    std::fs::remove_dir(rootfs.join("proc")).unwrap();
    symlink("tmp", rootfs.join("proc")).unwrap();
    let error = case.shell("true").unwrap_err().one_line();
    assert_eq!(
        error,
        r#"filesystem "proc" must be mounted on ordinary directory"#
    );
}

pub(super) fn a_device_that_is_none_masks_nothing(case: &mut Case) {
    let rootfs = case.rootfs();
    std::fs::write(rootfs.join("dev/null"), "planted").unwrap();
    let mounts = case.spec["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    let error = case.shell("true").unwrap_err().one_line();
    assert_eq!(error, "make device /dev/null: another file is in its place");
}

pub(super) fn devices_are_denied_by_default(case: &mut Case) {
    case.spec["linux"]["devices"] = json!([
        {"path": "/dev/mem", "type": "c", "major": 1, "minor": 1},
        {"path": "/dev/full", "type": "c", "major": 1, "minor": 7, "fileMode": 0o640, "uid": 3, "gid": 4},
    ]);
    let script = "mknod /tmp/fuse c 10 229 && echo made; cat /tmp/fuse || echo denied
        cat /dev/mem || echo denied; echo x >/dev/null && echo allowed
        stat -c '%a %u %g' /dev/full";
    let (_, printed) = case.shell(script).unwrap();
    let lines: Vec<_> = printed
        .lines()
        .filter(|line| !line.contains("cat:"))
        .collect();
    assert_eq!(
        lines,
        ["made", "denied", "denied", "allowed", "640 3 4"],
        "{printed}"
    );
    assert_eq!(
        printed.matches("Operation not permitted").count(),
        2,
        "{printed}"
    );
    std::fs::remove_file(case.rootfs().join("tmp/fuse")).unwrap();
    case.spec["linux"]["resources"]["devices"]
        .as_array_mut()
        .unwrap()
        .push(json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"}));
    // Filters add up on a cgroup: another container has another one.
    std::fs::remove_dir(&case.cgroup).unwrap();
    std::fs::create_dir(&case.cgroup).unwrap();
    let (_, printed) = case
        .shell("mknod /tmp/fuse c 10 229; head -c 0 /tmp/fuse && echo opened")
        .unwrap();
    // Whether this machine has the device is another matter.
    assert!(!printed.contains("Operation not permitted"), "{printed}");
    assert!(
        printed == "opened\n" || printed.contains("No such device"),
        "{printed}"
    );
}

pub(super) fn volumes_are_bound_with_their_options(case: &mut Case) {
    let mounts = case.spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/a", "type": "bind", "source": "volume:etc",
        "options": ["rbind", "ro", "nosuid", "noexec", "rslave"]}),
    );
    let at = mounts.len();
    let (exit, printed) = case
        .shell("grep ' /a ' /proc/self/mountinfo; touch /a/x")
        .unwrap();
    assert_eq!(exit, 1);
    assert!(
        printed.contains(" /a ro,nosuid,noexec,relatime"),
        "{printed}"
    );
    for (mount, message) in [
        (
            json!({"destination": "/b", "source": "/etc", "options": ["bind"]}),
            ".source: a source is given for each bind mount, and for no other",
        ),
        (
            json!({"destination": "/b", "type": "tmpfs", "source": "volume:etc"}),
            ".source: a source is given for each bind mount, and for no other",
        ),
        (
            json!({"destination": "/b", "type": "nfs", "source": "x"}),
            ".type \"nfs\" is not supported: only bind mounts and the kernel's own file systems are mounted",
        ),
        (
            json!({"destination": "/", "type": "tmpfs", "source": "x"}),
            r#".destination: "/" names nothing below the root"#,
        ),
        (
            json!({"destination": "/b", "type": "bind", "source": "volume:etc", "options": ["ridmap"]}),
            ".options: \"ridmap\" is not supported: mounts with mapped ids are not made yet",
        ),
    ] {
        let mut spec = case.spec.clone();
        spec["mounts"].as_array_mut().unwrap().push(mount);
        let kept = std::mem::replace(&mut case.spec, spec);
        let error = case.shell("true").unwrap_err().one_line();
        assert_eq!(error, format!("mounts[{at}]{message}"));
        case.spec = kept;
    }
    let mounts = case.spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/c", "type": "tmpfs", "source": "x", "options": ["size=many"]}),
    );
    let error = case.shell("true").unwrap_err().one_line();
    assert!(
        error.starts_with("mount tmpfs on /c") && error.contains("size"),
        "{error}"
    );
}

pub(super) fn a_volume_in_memory_is_bound_like_any_other(case: &mut Case) {
    // The case's directory stands for that of the volumes in memory.
    std::fs::create_dir(case.directory.path().join("shm")).unwrap();
    let mounts = case.spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/dev/shm", "type": "bind", "source": "memory:shm",
        "options": ["rbind", "nosuid", "nodev", "noexec"]}),
    );
    let (exit, printed) = case
        .shell("echo x >/dev/shm/left; grep ' /dev/shm ' /proc/self/mountinfo")
        .unwrap();
    assert_eq!(exit, 0, "{printed}");
    assert!(
        printed.contains("/dev/shm rw,nosuid,nodev,noexec"),
        "{printed}"
    );
    assert!(case.directory.path().join("shm/left").exists());
}

pub(super) fn a_tmpfs_begins_with_what_it_covers(case: &mut Case) {
    let secret = case.rootfs().join("etc/secret");
    std::fs::write(&secret, "of the image\n").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o604)).unwrap();
    lchown(&secret, Some(7), Some(8)).unwrap();
    let mounts = case.spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs",
        "options": ["tmpcopyup", "ro", "size=1m"]}),
    );
    let (_, printed) = case
        .shell("cat /etc/secret; stat -c '%a %u:%g' /etc/secret; stat -f -c %T /etc; touch /etc/x || echo refused")
        .unwrap();
    assert!(
        printed.starts_with("of the image\n604 7:8\ntmpfs\n"),
        "{printed}"
    );
    assert!(printed.ends_with("refused\n"), "{printed}");
}

/// The oracle has only relative links: where an absolute one leads to on the host, runc 1.1 makes
/// the links of /dev.
pub(super) fn a_dev_that_is_a_link_is_made_inside(case: &mut Case) {
    let dev = case.rootfs().join("dev");
    std::fs::remove_dir(&dev).unwrap();
    symlink("/tmp", &dev).unwrap();
    let (_, printed) = case
        .shell("readlink /tmp/ptmx /tmp/fd /tmp/stderr; stat -c %t:%T /tmp/null")
        .unwrap();
    assert_eq!(
        printed, "pts/ptmx\n/proc/self/fd\n/proc/self/fd/2\n1:3\n",
        "{printed}"
    );
    assert!(std::fs::symlink_metadata("/tmp/ptmx").is_err());

    std::fs::remove_file(&dev).unwrap();
    symlink("/proc", &dev).unwrap();
    let error = case.shell("true").unwrap_err().one_line();
    assert_eq!(
        error,
        r#""/dev/pts" cannot be mounted because it is inside /proc"#
    );
}
