//! What the containers of `tests` are to be like, one function each.

use std::os::unix::fs::PermissionsExt;

use super::*;

/// The five capabilities of the default spec, as the kernel prints them.
const CAPABILITIES: &str = "0000000008002121";

/// What /proc/self/status says of one thing.
pub(super) fn status<'a>(printed: &'a str, name: &str) -> &'a str {
    let line = printed
        .lines()
        .find(|line| line.starts_with(&format!("{name}:")));
    line.unwrap_or_else(|| panic!("no {name} in {printed}"))
        .split_once(':')
        .unwrap()
        .1
        .trim()
}

pub(super) fn the_spec_is_applied(case: &mut Case) {
    case.spec["process"]["cwd"] = json!("/tmp/made/on/demand");
    case.spec["root"]["readonly"] = json!(true);
    case.spec["linux"]["sysctl"] = json!({"kernel.msgmax": "4242"});
    let (exit, printed) = case
        .shell(
            "hostname; pwd; cat /proc/sys/kernel/msgmax; id; ulimit -n; ulimit -Hn; echo $$
             cut -d' ' -f5,6 /proc/self/mountinfo; cat /proc/self/cgroup | grep ^0; umask
             stat -c '%n %F %t:%T %a' /dev/null /dev/tty /dev/urandom; readlink /dev/ptmx /dev/stdout
             stat -c '%n %a' /dev/shm /run /tmp/made; cat /proc/timer_list; ls /sys/firmware
             echo x >/proc/sys/kernel/msgmax || echo read-only; touch /x || echo read-only",
        )
        .unwrap();
    assert_eq!(exit, 0, "{printed}");
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(
        lines[..4],
        [
            "box",
            "/tmp/made/on/demand",
            "4242",
            "uid=0(root) gid=0 groups=0,10"
        ]
    );
    assert_eq!(lines[4..7], ["1000", "1024", "1"]);
    for expected in [
        "/ ro,relatime",
        "/proc rw,nosuid,nodev,noexec,relatime",
        "/dev rw,nosuid",
        "/dev/pts rw,nosuid,noexec,relatime",
        "/dev/shm rw,nosuid,nodev,noexec,relatime",
        "/dev/mqueue rw,nosuid,nodev,noexec,relatime",
        "/sys ro,nosuid,nodev,noexec,relatime",
        "/run rw,nosuid",
        "/sys/fs/cgroup ro,nosuid,nodev,noexec,relatime",
        "/proc/sys ro,nosuid,nodev,noexec,relatime",
        "/sys/firmware ro,relatime",
        "0::/",
        "0022",
        "/dev/null character special file 1:3 666",
        "/dev/tty character special file 5:0 666",
        "/dev/urandom character special file 1:9 666",
        "pts/ptmx",
        "/proc/self/fd/1",
        "/dev/shm 1777",
        "/run 755",
        "/tmp/made 755",
    ] {
        assert!(lines.contains(&expected), "no {expected:?} in {printed}");
    }
    assert_eq!(
        lines.iter().filter(|line| **line == "read-only").count(),
        2,
        "{printed}"
    );
}

pub(super) fn only_the_spec_is_left_in_the_process(case: &mut Case) {
    case.spec["process"]["oomScoreAdj"] = json!(321);
    let (_, printed) = case
        .shell("cat /proc/self/status; ls /proc/$$/fd; cat /proc/self/oom_score_adj; env; cat /proc/keys")
        .unwrap();
    for (name, expected) in [
        ("CapInh", "0000000000000000"),
        ("CapPrm", CAPABILITIES),
        ("CapEff", CAPABILITIES),
        ("CapBnd", CAPABILITIES),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("SigIgn", "0000000000000000"),
        ("SigBlk", "0000000000000000"),
        ("Groups", "0 10"),
    ] {
        assert_eq!(status(&printed, name), expected, "{name}");
    }
    let lines: Vec<_> = printed.lines().collect();
    assert!(
        lines
            .windows(4)
            .any(|lines| lines == ["0", "1", "2", "321"]),
        "{printed}"
    );
    assert!(lines.contains(&"HOME=/root"), "{printed}");
}

pub(super) fn a_user_has_no_more_than_the_spec_gives(case: &mut Case) {
    case.spec["process"]["user"] =
        json!({"uid": 1000, "gid": 1001, "additionalGids": [7], "umask": 0o027});
    case.spec["process"]["noNewPrivileges"] = json!(false);
    case.spec["process"]["capabilities"]["inheritable"] = json!(["CAP_NET_RAW"]);
    case.spec["process"]["capabilities"]["ambient"] = json!(["CAP_NET_RAW"]);
    case.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
        [{"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}]});
    let (exit, printed) = case
        .shell("cat /proc/self/status; umask; echo $HOME; echo yes >/dev/stdout; cat /etc/shadow")
        .unwrap();
    assert_eq!(exit, 1, "{printed}");
    for (name, expected) in [
        ("Uid", "1000\t1000\t1000\t1000"),
        ("Gid", "1001\t1001\t1001\t1001"),
        ("Groups", "7"),
        ("CapEff", "0000000000002000"),
        ("CapAmb", "0000000000002000"),
        ("NoNewPrivs", "0"),
        ("Seccomp", "2"),
    ] {
        assert_eq!(status(&printed, name), expected, "{name}");
    }
    assert!(printed.contains("0027\n/home/user\nyes\n"), "{printed}");
}

pub(super) fn an_exec_has_the_containers_confinement(case: &mut Case) {
    case.spec["process"]["args"] = json!(["sleep", "60"]);
    case.spec["process"]["oomScoreAdj"] = json!(55);
    case.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
        [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]});
    let (stdio, _) = streams();
    let created = case.create(stdio, Vec::new()).unwrap();
    let pid = created.pid;
    let mut init = created;
    let start = std::mem::replace(&mut init.start, {
        // Only the right to start is used up; the rest of `init` is kept for its pidfd.
        let (stdio, _) = streams();
        let spare = case.create(stdio, Vec::new()).unwrap();
        spare.start
    });
    case.start(start).unwrap();

    let script = "cat /proc/self/status; mkdir /tmp/x; cat /proc/self/oom_score_adj
        for kind in pid ipc uts mnt cgroup; do
            test $(readlink /proc/self/ns/$kind) = $(readlink /proc/1/ns/$kind) && echo same
        done; grep ^0 /proc/self/cgroup; pwd; ls /proc/$$/fd | tr '\\n' ' '; exit 7";
    let mut process = case.spec["process"].clone();
    process["args"] = json!(["sh", "-c", script]);
    process["cwd"] = json!("/tmp");
    let whole = process.clone();
    process.as_object_mut().unwrap().remove("capabilities");
    for process in [whole, process] {
        let (stdio, output) = streams();
        let executed = case.exec(&init.pidfd, &process, stdio).unwrap();
        let printed = read(output);
        assert_eq!(case.wait(executed.pid), 7, "{printed}");
        assert_eq!(status(&printed, "Seccomp"), "2");
        assert_eq!(status(&printed, "NoNewPrivs"), "1");
        assert_eq!(status(&printed, "CapEff"), CAPABILITIES);
        assert_eq!(status(&printed, "CapInh"), "0000000000000000");
        assert!(printed.contains("No space left on device"), "{printed}");
        assert!(
            printed.contains("\n55\nsame\nsame\nsame\nsame\nsame\n0::/\n/tmp\n0 1 2 "),
            "{printed}"
        );
    }

    let (stdio, output) = streams();
    let mut missing = case.spec["process"].clone();
    missing["args"] = json!(["no-such"]);
    let error = case.exec(&init.pidfd, &missing, stdio).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"exec: "no-such": executable file not found in $PATH"#
    );
    assert_eq!(read(output), "");
    rustix::process::pidfd_send_signal(&init.pidfd, rustix::process::Signal::KILL).unwrap();
    assert_eq!(case.wait(pid), 137);
}

pub(super) fn a_terminal_is_the_containers_own(case: &mut Case) {
    case.spec["process"]["terminal"] = json!(true);
    case.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    case.spec["process"]["args"] = json!([
        "sh",
        "-c",
        "stty size; tty; stat -c '%F %t:%T %u' /dev/console $(tty); : >/dev/tty"
    ]);
    let created = case
        .create(
            Stdio::Terminal {
                width: 91,
                height: 33,
            },
            Vec::new(),
        )
        .unwrap();
    case.start(created.start).unwrap();
    assert_eq!(case.wait(created.pid), 0);
    let device = "character special file 88:0 1000";
    assert_eq!(
        read(created.terminal.unwrap().into()).replace('\r', ""),
        format!("33 91\n/dev/pts/0\n{device}\n{device}\n")
    );
}

pub(super) fn a_missing_command_leaves_nothing(case: &mut Case) {
    std::fs::write(case.rootfs().join("tmp/text"), "text").unwrap();
    for (command, message) in [
        (
            "no-such",
            r#"exec: "no-such": executable file not found in $PATH"#,
        ),
        (
            "/no/such",
            r#"exec: "/no/such": stat /no/such: no such file or directory"#,
        ),
        ("/tmp/text", r#"exec: "/tmp/text": permission denied"#),
    ] {
        case.spec["process"]["args"] = json!([command]);
        let (stdio, output) = streams();
        assert_eq!(
            case.create(stdio, Vec::new()).unwrap_err().one_line(),
            message
        );
        assert_eq!(read(output), "");
    }
    while rustix::process::wait(rustix::process::WaitOptions::empty()).is_ok() {}
    assert_eq!(
        std::fs::read_to_string(case.cgroup.join("cgroup.procs")).unwrap(),
        ""
    );
}

pub(super) fn an_exit_is_exact(case: &mut Case) {
    for (script, exit) in [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$; exit 9", 9)] {
        assert_eq!(case.shell(script).unwrap().0, exit, "{script}");
    }
}

pub(super) fn a_start_not_made_ends_the_container(case: &mut Case) {
    case.spec["process"]["args"] = json!(["sleep", "60"]);
    let (stdio, _) = streams();
    let created = case.create(stdio, Vec::new()).unwrap();
    drop(created.start);
    assert_eq!(case.wait(created.pid), 137);
}

pub(super) fn a_container_joins_anothers_namespaces(case: &mut Case) {
    case.spec["process"]["args"] = json!(["sleep", "60"]);
    let (stdio, _) = streams();
    let first = case.create(stdio, Vec::new()).unwrap();
    let namespace = |kind: &str| File::open(format!("/proc/{}/ns/{kind}", first.pid)).unwrap();
    let joined = [
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
    ]
    .map(|(kind, name)| Joined {
        kind,
        namespace: namespace(name).into(),
    });
    let links = ["pid", "ipc", "uts"]
        .map(|kind| std::fs::read_link(format!("/proc/{}/ns/{kind}", first.pid)).unwrap());

    let mut spec = case.spec.clone();
    spec["hostname"] = json!("");
    spec["process"]["args"] = json!([
        "sh",
        "-c",
        "echo $$; hostname; readlink /proc/self/ns/pid /proc/self/ns/ipc /proc/self/ns/uts"
    ]);
    case.spec = spec;
    let (stdio, output) = streams();
    let second = case.create(stdio, joined.into()).unwrap();
    case.start(second.start).unwrap();
    let printed = read(output);
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(lines[..2], ["2", "box"], "{printed}");
    assert_eq!(
        lines[2..],
        links.each_ref().map(|link| link.to_str().unwrap())
    );
    assert_eq!(case.wait(second.pid), 0);
    drop(first.start);
    assert_eq!(case.wait(first.pid), 137);
}

pub(super) fn a_start_hook_runs_in_the_container(case: &mut Case) {
    let hook = |script: &str| json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=1"]}]});
    case.spec["hooks"] = hook("cat >/tmp/state; echo $A >>/tmp/state");
    let (_, printed) = case.shell("cat /tmp/state").unwrap();
    let (state, rest) = printed.split_at(printed.rfind('}').unwrap() + 1);
    let state: Value = serde_json::from_str(state).unwrap();
    assert_eq!(
        (&state["id"], &state["status"]),
        (&json!("test"), &json!("created"))
    );
    assert_eq!(rest, "1\n");
    case.spec["hooks"] = hook("echo oh no; exit 3");
    let failed = "hooks.startContainer[0]: run /bin/sh: exit status 3, output: \"oh no\"\n";
    assert_eq!(case.shell("true").unwrap(), (1, failed.to_owned()));
}

pub(super) fn a_placeholder_has_a_process_only_for_its_pids(case: &mut Case) {
    let mut spec = case.spec.clone();
    spec["hostname"] = json!("pod");
    spec["linux"]["sysctl"] = json!({"kernel.shmmax": "12345"});
    spec["process"]["user"] = json!({"uid": 65535, "gid": 65535});
    spec["process"]["oomScoreAdj"] = json!(7);
    let spec: oci_spec::runtime::Spec = serde_json::from_value(spec).unwrap();
    let ours = std::fs::read_link("/proc/self/ns/uts").unwrap();
    let request = PlaceholderRequest {
        container: "pod".to_owned(),
        spec,
        guest_namespaces: Vec::new(),
        cgroup: case.cgroup.clone(),
    };
    let mut held = super::hold(&request, Vec::new()).unwrap();
    assert_eq!(std::fs::read_link("/proc/self/ns/uts").unwrap(), ours);
    let kinds: Vec<_> = held.iter().map(|(kind, _)| *kind).collect();
    use LinuxNamespaceType::{Ipc, Network, Uts};
    assert_eq!(kinds, [Ipc, Uts, Network]);
    let pids = || std::fs::read_to_string(case.cgroup.join("cgroup.procs")).unwrap();
    assert_eq!(pids(), "");
    let share = |held: &[(LinuxNamespaceType, OwnedFd)]| {
        let copy = |(kind, namespace): &(LinuxNamespaceType, OwnedFd)| Joined {
            kind: *kind,
            namespace: namespace.try_clone().unwrap(),
        };
        held.iter().map(copy).collect::<Vec<_>>()
    };

    let first = super::first_process(request, share(&held));
    let first = case.runtime.block_on(first).unwrap();
    assert_eq!(pids(), format!("{}\n", first.pid));
    let namespace = File::open(format!("/proc/{}/ns/pid", first.pid)).unwrap();
    held.push((LinuxNamespaceType::Pid, namespace.into()));

    case.spec["hostname"] = json!("");
    // An orphan that ends is reaped by the first process.
    let script = "hostname; cat /proc/sys/kernel/shmmax /proc/1/oom_score_adj /proc/1/comm
        (true & echo $! >/tmp/orphan); for i in 1 2 3 4 5 6 7 8 9; do
            sleep 0.1; test -e /proc/$(cat /tmp/orphan) || break; done
        test -e /proc/$(cat /tmp/orphan) || echo reaped
        grep -E '^(Uid|CapPrm|NoNewPrivs|SigIgn)' /proc/1/status
        ls /proc/1/root/ && echo looked into
        exec sleep 60";
    case.spec["process"]["args"] = json!(["sh", "-c", script]);
    let (stdio, output) = streams();
    let second = case.create(stdio, share(&held)).unwrap();
    case.start(second.start).unwrap();
    // All but the sleep is printed by then.
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(output));
    let mut line = || lines.next().unwrap().unwrap();
    let said = [line(), line(), line(), line()];
    assert_eq!(said, ["pod", "12345", "7", "pause"]);
    assert_eq!(line(), "reaped");
    assert_eq!(line(), "Uid:\t65535\t65535\t65535\t65535");
    assert_eq!(line(), "SigIgn:\t0000000000000000");
    assert_eq!(line(), "CapPrm:\t0000000000000000");
    assert_eq!(line(), "NoNewPrivs:\t1");
    let refused = line();
    assert!(refused.ends_with("Permission denied"), "{refused}");

    let send = |signal| rustix::process::pidfd_send_signal(&first.pidfd, signal).unwrap();
    send(rustix::process::Signal::HUP);
    send(rustix::process::Signal::TERM);
    assert_eq!(case.wait(first.pid), 0);
    assert_eq!(case.wait(second.pid), 137);
}

pub(super) fn execs_leave_nothing_open(case: &mut Case) {
    case.spec["process"]["args"] = json!(["sleep", "60"]);
    let (stdio, _) = streams();
    let init = case.create(stdio, Vec::new()).unwrap();
    let missing = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["/not/there"]});
    let good = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["/bin/true"]});
    let count = |of: &str| {
        std::fs::read_dir(format!("/proc/self/{of}"))
            .unwrap()
            .count()
    };
    let mut before = None;
    for _ in 0..30 {
        assert!(case.exec(&init.pidfd, &missing, streams().0).is_err());
        let done = case.exec(&init.pidfd, &good, streams().0).unwrap();
        assert_eq!(case.wait(done.pid), 0);
        drop(done);
        // What is made once and kept is there after the first round.
        let now = (count("fd"), count("task"));
        assert_eq!(*before.get_or_insert(now), now);
    }
    case.start(init.start).unwrap();
}

pub(super) fn a_create_hook_has_the_containers_rights_and_no_more(case: &mut Case) {
    let hook = |script: &str| json!({"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=1"]}]});
    case.spec["hooks"] = hook(
        "cat >/tmp/state; echo; echo $A; umask; ls /; cat /proc/self/status >/tmp/status; mount -t tmpfs x /tmp && echo mounted",
    );
    case.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    case.spec["root"]["readonly"] = json!(true);
    let error = case.shell("true").unwrap_err().one_line();
    // Without CAP_SYS_ADMIN nothing is mounted, and the last command's status is the hook's.
    assert!(
        error.starts_with("hooks.createContainer[0]: run /bin/sh: exit status"),
        "{error}"
    );
    assert!(error.contains("\"1\\n0022\\nbin\\n"), "{error}");
    assert!(!error.contains("mounted\""), "{error}");
    let kept = |name: &str| std::fs::read_to_string(case.rootfs().join("tmp").join(name)).unwrap();
    let state: Value = serde_json::from_str(&kept("state")).unwrap();
    assert_eq!(state["status"], "creating");
    assert_eq!(status(&kept("status"), "CapBnd"), "0000000008002121");
    assert_eq!(status(&kept("status"), "Uid"), "0\t0\t0\t0");
    case.spec["hooks"] = hook("echo made >/tmp/made");
    let (_, printed) = case.shell("cat /tmp/made; id -u").unwrap();
    assert_eq!(printed, "made\n1000\n");
}

pub(super) fn scheduling_is_the_specs(case: &mut Case) {
    case.spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 7});
    case.spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 3});
    case.spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    let (_, printed) = case
        .shell("cut -d' ' -f19,41 /proc/self/stat; uname -m; ionice")
        .unwrap();
    assert_eq!(printed, "7 3\ni686\nidle\n");
}

pub(super) fn a_command_that_is_no_program_ends_the_container(case: &mut Case) {
    let path = case.rootfs().join("tmp/text");
    std::fs::write(&path, "text").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    case.spec["process"]["args"] = json!(["/tmp/text"]);
    let (stdio, output) = streams();
    let created = case.create(stdio, Vec::new()).unwrap();
    case.start(created.start).unwrap();
    assert_eq!(case.wait(created.pid), 1);
    assert_eq!(read(output), "exec /tmp/text: exec format error\n");
}
