//! `mounts` and `root`: what is mounted where, how, and how it propagates.

use std::path::Path;

use serde_json::json;

use super::super::Case;
use super::super::Kind::InPod;
use super::case;

const PROC: [&str; 3] = ["nosuid", "noexec", "nodev"];

#[rustfmt::skip] // a case a paragraph
pub const CASES: &[Case] = &[
    case("read-only root", InPod, |spec| spec.json["root"]["readonly"] = json!(true)),
    case("read-only root, tmpfs and volumes", InPod, |spec| {
        spec.json["root"]["readonly"] = json!(true);
        spec.tmpfs("/tmp", &["nosuid", "nodev", "mode=1777", "size=1m"]);
        spec.volume("", "/data", &["rbind", "rw"]);
        spec.volume("file", "/mnt/file", &["bind", "ro"]);
    }),
    case("read-only root for a user", InPod, |spec| {
        spec.json["root"]["readonly"] = json!(true);
        spec.user(1000);
        spec.tmpfs("/home", &["mode=755", "uid=1000", "gid=1000"]);
    }),

    case("a volume", InPod, |spec| spec.volume("", "/data", &["rbind", "rw"])),
    case("a volume, read-only", InPod, |spec| spec.volume("", "/data", &["rbind", "ro"])),
    case("a volume, read-only with all below", InPod, |spec| {
        spec.volume("", "/data", &["rbind", "rro"]);
    }),
    case("a volume without what is below", InPod, |spec| spec.volume("", "/data", &["bind", "rw"])),
    case("a volume with few rights", InPod, |spec| {
        spec.volume("", "/data", &["rbind", "nosuid", "nodev", "noexec", "noatime", "nosymfollow"]);
    }),
    case("a volume with few rights below", InPod, |spec| {
        spec.volume("", "/data", &["rbind", "rnosuid", "rnodev", "rnoexec", "rnoatime"]);
    }),
    case("a volume with the last option", InPod, |spec| {
        spec.volume("", "/data", &["rbind", "ro", "rw", "noexec", "exec", "nodiratime"]);
    }),
    case("a file as a volume", InPod, |spec| spec.volume("file", "/mnt/file", &["bind"])),
    case("a file over a file of the image", InPod, |spec| {
        spec.volume("file", "/etc/secret", &["bind", "ro"]);
    }),
    case("a volume over a volume", InPod, |spec| {
        spec.volume("", "/data", &["bind"]);
        spec.volume("below", "/data/below", &["rbind", "ro"]);
        spec.volume("file", "/data/file", &["bind", "ro"]);
    }),
    case("a volume where nothing is", InPod, |spec| spec.volume("", "/made/by/the/mount", &["rbind"])),
    case("a volume that is private", InPod, |spec| spec.volume("", "/data", &["rbind", "rprivate"])),
    case("a volume that is unbindable", InPod, |spec| {
        spec.volume("", "/data", &["bind", "unbindable"]);
    }),
    case("a volume for a user", InPod, |spec| {
        spec.user(1000);
        spec.volume("", "/data", &["rbind"]);
    }),
    case("a volume of nothing", InPod, |spec| spec.volume("no such file", "/data", &["rbind"])),

    case("tmpfs", InPod, |spec| spec.tmpfs("/data", &[])),
    case("tmpfs with options", InPod, |spec| {
        spec.tmpfs("/data", &["noexec", "nosuid", "size=64k", "mode=700", "nr_inodes=100", "uid=7", "gid=8"]);
    }),
    case("tmpfs, read-only", InPod, |spec| spec.tmpfs("/data", &["ro", "nodev"])),
    case("tmpfs over a directory of the image", InPod, |spec| spec.tmpfs("/tmp", &["noatime"])),
    case("tmpfs that copies up", InPod, |spec| {
        spec.tmpfs("/etc", &["tmpcopyup", "mode=755", "size=1m"]);
    }),
    case("tmpfs that copies up, read-only", InPod, |spec| spec.tmpfs("/etc", &["tmpcopyup", "ro"])),
    case("tmpfs over a volume", InPod, |spec| {
        spec.volume("", "/data", &["bind"]);
        spec.tmpfs("/data/below", &["size=32k"]);
    }),
    case("ramfs", InPod, |spec| spec.mount("ramfs", Path::new("ramfs"), "/data", &["nosuid"])),
    case("tmpfs with an option of nobody", InPod, |spec| spec.tmpfs("/data", &["no-such-option=1"])),

    case("shared memory of another size", InPod, |spec| {
        spec.options("/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=1m"]);
    }),
    case("no shared memory, no queues", InPod, |spec| {
        spec.without_mount("/dev/shm");
        spec.without_mount("/dev/mqueue");
    }),
    case("terminals with other modes", InPod, |spec| {
        spec.options("/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0600", "mode=0600", "gid=900"]);
    }),
    case("/dev, read-only", InPod, |spec| {
        spec.options("/dev", &["nosuid", "strictatime", "mode=755", "size=65536k", "ro"]);
    }),
    case("/proc with hidden processes", InPod, |spec| {
        spec.user(1000);
        spec.of_pod("pid", "pid");
        spec.options("/proc", &["nosuid", "noexec", "nodev", "hidepid=2"]);
    }),
    case("/proc, read-only", InPod, |spec| spec.options("/proc", &["nosuid", "noexec", "nodev", "ro"])),
    case("/sys to write", InPod, |spec| spec.options("/sys", &PROC)),
    case("no /sys", InPod, |spec| spec.without_mount("/sys")),
    case("the cgroup", InPod, |spec| {
        spec.mount("cgroup", Path::new("cgroup"), "/sys/fs/cgroup",
            &["ro", "nosuid", "noexec", "nodev", "relatime"]);
    }),
    case("the cgroup to write", InPod, |spec| {
        spec.mount("cgroup", Path::new("cgroup"), "/sys/fs/cgroup", &["rw", "nosuid", "noexec", "nodev"]);
    }),
    case("a mount on a mount", InPod, |spec| {
        spec.tmpfs("/data", &["mode=700"]);
        spec.tmpfs("/data", &["mode=700", "size=32k"]);
    }),
    case("a mount inside /proc", InPod, |spec| spec.tmpfs("/proc/sys", &[])),
    case("a file inside /proc", InPod, |spec| spec.volume("file", "/proc/uptime", &["bind"])),
    // Separate from the others: while it is made under runc, the host's cgroups have no options.
    case("the cgroup of the machine", InPod, |spec| {
        spec.without_namespace("cgroup");
        spec.mount("cgroup", Path::new("cgroup"), "/sys/fs/cgroup", &["ro", "nosuid", "noexec", "nodev"]);
    }),
    case("a file system of nobody", InPod, |spec| {
        spec.mount("no-such-type", Path::new("none"), "/data", &[]);
    }),

    // The runner's unit tests have shared and unbindable roots: runc 1.1 sets them only on the
    // host's side.
    case("a root that is a slave", InPod, |spec| spec.linux("rootfsPropagation", json!("rslave"))),
    case("a root that is private", InPod, |spec| {
        spec.linux("rootfsPropagation", json!("private"));
        spec.volume("", "/data", &["rbind", "rslave"]);
    }),
    case("a root of no known propagation", InPod, |spec| spec.linux("rootfsPropagation", json!("sideways"))),
];
