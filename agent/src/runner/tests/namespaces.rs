//! Containers of `tests` with users and clocks of their own, or with those of another one.

use std::os::unix::fs::lchown;

use super::cases::status;
use super::*;

/// The first of the ids that a user namespace of a case maps.
const FIRST: u32 = 100_000;

fn in_user_namespace(case: &mut Case) {
    let mapping = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    case.spec["linux"]["uidMappings"] = mapping.clone();
    case.spec["linux"]["gidMappings"] = mapping;
    let namespaces = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    let root = case.rootfs();
    lchown(&root, Some(FIRST), Some(FIRST)).unwrap();
    for entry in std::fs::read_dir(&root).unwrap().flatten() {
        lchown(entry.path(), Some(FIRST), Some(FIRST)).unwrap();
    }
    // The folder of the root is the agent's alone, as it is in the guest: 0700.
}

pub(super) fn a_user_namespace_maps_the_containers_users(case: &mut Case) {
    in_user_namespace(case);
    case.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7]});
    case.spec["linux"]["sysctl"] =
        json!({"kernel.msgmax": "4242", "net.ipv4.ip_default_ttl": "77"});
    case.spec["root"]["readonly"] = json!(true);
    let (exit, printed) = case
        .shell(
            "cat /proc/self/uid_map; cat /proc/self/status; hostname; cat /proc/sys/kernel/msgmax
             stat -c '%n %u:%g' / /proc/self/ /dev/null /dev/mqueue; cat /proc/self/setgroups
             ls /sys/class/net; cat /sys/class/net/lo/flags; cat /proc/sys/net/ipv4/ip_default_ttl
             grep -o '[0-9a-f]* .* _ses.test' /proc/keys; stat -L -c 'stream %u:%g' /proc/self/fd/1",
        )
        .unwrap();
    assert_eq!(exit, 0, "{printed}");
    let map: Vec<_> = printed.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(map, ["0", "100000", "65536"]);
    assert_eq!(status(&printed, "Uid"), "1000\t1000\t1000\t1000");
    assert_eq!(status(&printed, "Groups"), "7");
    for expected in [
        "box",
        "4242",
        "/ 0:0",
        "/proc/self/ 1000:1000",
        "/dev/null 65534:65534",
        "/dev/mqueue 0:65534",
        "stream 1000:0",
        // The network is the container's, and only its loopback interface is there, and is up.
        "lo",
        "0x9",
        "77",
        "allow",
    ] {
        assert!(
            printed.lines().any(|line| line == expected),
            "no {expected:?} in {printed}"
        );
    }
    let ttl = std::fs::read_to_string("/proc/sys/net/ipv4/ip_default_ttl").unwrap();
    assert_ne!(ttl, "77\n");
    let keyring = printed.lines().find(|line| line.contains("_ses.test"));
    assert!(
        keyring.is_some_and(|line| line.contains("0008 ")),
        "{printed}"
    );
}

/// Copies of namespaces, for one more container.
fn share(held: &[(LinuxNamespaceType, OwnedFd)]) -> Vec<Joined> {
    let copy = |(kind, namespace): &(LinuxNamespaceType, OwnedFd)| Joined {
        kind: *kind,
        namespace: namespace.try_clone().unwrap(),
    };
    held.iter().map(copy).collect()
}

pub(super) fn a_placeholders_users_own_all_that_a_pod_shares(case: &mut Case) {
    use LinuxNamespaceType::{Ipc, Network, Pid, Time, User, Uts};
    in_user_namespace(case);
    let mut spec = case.spec.clone();
    spec["hostname"] = json!("pod");
    spec["linux"]["sysctl"] = json!({"kernel.shmmax": "12345", "net.ipv4.ip_default_ttl": "78"});
    spec["process"]["user"] = json!({"uid": 65535, "gid": 65535});
    let request = PlaceholderRequest {
        container: "pod".to_owned(),
        spec: serde_json::from_value(spec).unwrap(),
        guest_namespaces: Vec::new(),
        cgroup: case.cgroup.clone(),
    };
    let held = super::hold_in_users(request.clone(), Vec::new());
    let mut held = case.runtime.block_on(held).unwrap();
    let kinds: Vec<_> = held.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [Ipc, Uts, Network, User]);
    // Whoever has made them ends.
    let made = rustix::process::wait(rustix::process::WaitOptions::empty());
    assert!(made.is_ok(), "{made:?}");

    let first = super::first_process(request, share(&held));
    let first = case.runtime.block_on(first).unwrap();
    let namespace = File::open(format!("/proc/{}/ns/pid", first.pid)).unwrap();
    held.push((Pid, namespace.into()));
    // That of the clocks is the guest's, which a user namespace's root has no right to join.
    let namespace = File::open("/proc/self/ns/time").unwrap();
    held.push((Time, namespace.into()));
    let namespaces = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "time"}));
    // Without a cgroup namespace it is the guest's own, too.
    let namespaces = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    let mounts = case.spec["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| mount["type"] != "cgroup");
    case.spec["hostname"] = json!("");
    let script = "cat /proc/self/uid_map /proc/1/uid_map /proc/sys/kernel/shmmax /proc/sys/net/ipv4/ip_default_ttl
        hostname; id -u; stat -c '%u' / /dev/mqueue; cat /proc/1/comm; ls /sys/class/net; cat /sys/class/net/lo/flags
        exec sleep 1000 >/dev/null 2>&1";
    case.spec["process"]["args"] = json!(["sh", "-c", script]);
    let (stdio, output) = streams();
    let second = case.create(stdio, share(&held)).unwrap();
    case.start(second.start).unwrap();
    let printed = read(output);
    let words: Vec<_> = printed.split_whitespace().collect();
    let map = ["0", "100000", "65536"];
    assert_eq!(
        (&words[..3], &words[3..6]),
        (&map[..], &map[..]),
        "{printed}"
    );
    let rest = ["12345", "78", "pod", "0", "0", "0", "pause", "lo", "0x9"];
    assert_eq!(words[6..], rest, "{printed}");

    let process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", "id -u; hostname"],
        "env": ["PATH=/usr/bin:/bin"]});
    let (stdio, output) = streams();
    let executed = case.exec(&second.pidfd, &process, stdio).unwrap();
    assert_eq!(case.wait(executed.pid), 0);
    assert_eq!(read(output), "0\npod\n");
}

pub(super) fn a_container_joins_anothers_mounts_and_clocks(case: &mut Case) {
    use LinuxNamespaceType::{Cgroup, Mount, Pid, Time};
    let mut other = case.spec.clone();
    other["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "time"}));
    let other = std::mem::replace(&mut case.spec, other);
    case.spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000_i64}});
    case.spec["process"]["args"] =
        json!(["sh", "-c", "echo first >/run/file; echo; exec sleep 1000"]);
    let (stdio, output) = streams();
    let first = case.create(stdio, Vec::new()).unwrap();
    case.start(first.start).unwrap();
    let mut said = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut said).unwrap();
    let open = |(kind, name)| {
        let file = File::open(format!("/proc/{}/ns/{name}", first.pid)).unwrap();
        (kind, file.into())
    };
    let held = [(Mount, "mnt"), (Time, "time"), (Pid, "pid")].map(open);

    case.spec = other;
    let namespaces = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "time"}));
    case.spec["hostname"] = json!("");
    // What is said of files is the other container's to say.
    case.spec["root"]["readonly"] = json!(true);
    let script = "cat /run/file; cut -d. -f1 /proc/uptime; cat /proc/1/comm; echo second >/run/file
        readlink /proc/1/ns/cgroup; readlink /proc/self/ns/cgroup; ls /dev";
    case.spec["process"]["args"] = json!(["sh", "-c", script]);
    let (stdio, output) = streams();
    let mut joined = share(&held);
    joined.extend(share(&[open((Cgroup, "cgroup"))]));
    let second = case.create(stdio, joined).unwrap();
    case.start(second.start).unwrap();
    assert_eq!(case.wait(second.pid), 0);
    let printed = read(output);
    let words: Vec<_> = printed.split_whitespace().collect();
    assert_eq!((words[0], words[2]), ("first", "sleep"), "{printed}");
    assert!(
        words[3].starts_with("cgroup:[") && words[3] == words[4],
        "{printed}"
    );
    assert!(
        words[1].parse::<u64>().unwrap() >= 1_000_000_000,
        "{printed}"
    );
    let left = std::fs::read_to_string(format!("/proc/{}/root/run/file", first.pid));
    assert_eq!(left.unwrap(), "second\n");

    // A user namespace of its own in mounts that belong to the guest.
    in_user_namespace(case);
    case.spec["process"]["args"] = json!(["sh", "-c", "cat /proc/self/uid_map /run/file"]);
    let (stdio, output) = streams();
    let third = case.create(stdio, share(&held)).unwrap();
    case.start(third.start).unwrap();
    assert_eq!(case.wait(third.pid), 0);
    let printed = read(output);
    let words: Vec<_> = printed.split_whitespace().collect();
    assert_eq!(words, ["0", "100000", "65536", "second"], "{printed}");
}

pub(super) fn an_exec_joins_the_containers_users(case: &mut Case) {
    in_user_namespace(case);
    let mounts = case.spec["mounts"].as_array_mut().unwrap();
    for mount in mounts.iter_mut().filter(|mount| mount["type"] == "cgroup") {
        mount["options"] = json!(["nosuid", "noexec", "nodev"]);
    }
    case.spec["process"]["args"] = json!(["sleep", "1000"]);
    let (stdio, _output) = streams();
    let created = case.create(stdio, Vec::new()).unwrap();
    let (stdio, output) = streams();
    let script = "cat /proc/self/uid_map; id -u; mkdir /sys/fs/cgroup/own && echo made; rmdir /sys/fs/cgroup/own
        stat -L -c %u /proc/self/fd/1; readlink /proc/self/ns/net";
    let process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", script],
        "env": ["PATH=/usr/bin:/bin"]});
    let executed = case.exec(&created.pidfd, &process, stdio).unwrap();
    assert_eq!(case.wait(executed.pid), 0);
    let printed = read(output);
    let words: Vec<_> = printed.split_whitespace().collect();
    let network = std::fs::read_link(format!("/proc/{}/ns/net", created.pid)).unwrap();
    let expected = ["0", "100000", "65536", "0", "made", "0"];
    assert_eq!(words[..6], expected, "{printed}");
    assert_eq!(words[6], network.to_str().unwrap());
}

pub(super) fn clocks_are_the_containers_own(case: &mut Case) {
    let namespaces = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "time"}));
    case.spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000_i64}});
    let (_, printed) = case.shell("cut -d. -f1 /proc/uptime").unwrap();
    assert!(
        printed.trim().parse::<u64>().unwrap() >= 1_000_000_000,
        "{printed}"
    );
    case.spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .pop();
    let error = case.shell("true").unwrap_err().one_line();
    assert!(
        error.starts_with("linux.timeOffsets.boottime: needs"),
        "{error}"
    );
}
