//! `linux`, names and hooks: namespaces, devices, resources, sysctls, seccomp, and hidden paths.

use std::path::Path;

use serde_json::json;

use super::super::Case;
use super::super::Kind::{Alone, InPod};
use super::{ALL_CAPABILITIES, case};

#[rustfmt::skip] // a case a paragraph
pub const CASES: &[Case] = &[
    case("host's name", InPod, |spec| spec.json["hostname"] = json!("a-name.of-its.own")),

    case("the pod's PID namespace", InPod, |spec| spec.of_pod("pid", "pid")),
    case("the pod's ipc", InPod, |spec| spec.of_pod("ipc", "ipc")),
    case("the pod's names", InPod, |spec| spec.of_pod("uts", "uts")),
    case("all that a pod shares", InPod, |spec| {
        spec.of_pod("pid", "pid");
        spec.of_pod("ipc", "ipc");
        spec.of_pod("uts", "uts");
    }),
    case("no cgroup namespace", InPod, |spec| spec.without_namespace("cgroup")),
    case("a namespace twice", InPod, |spec| {
        if let Some(list) = spec.json["linux"]["namespaces"].as_array_mut() {
            list.push(json!({"type": "uts"}));
        }
    }),
    case("a name without a namespace for it", InPod, |spec| {
        spec.without_namespace("uts");
        spec.json["hostname"] = json!("host");
    }),

    case("user namespace", Alone, |spec| spec.in_user_namespace()),
    case("user namespace, user and mounts", Alone, |spec| {
        spec.in_user_namespace();
        spec.user(1000);
        spec.tmpfs("/data", &["size=1m", "uid=1000", "gid=1000"]);
        spec.volume("", "/mnt", &["rbind", "ro"]);
    }),
    case("user namespace, all capabilities", Alone, |spec| {
        spec.in_user_namespace();
        spec.capabilities(&ALL_CAPABILITIES);
        spec.json["root"]["readonly"] = json!(true);
        spec.json["hostname"] = json!("of-its-own");
        // Writing is another matter: runc gives the cgroup away only where systemd has made it.
        spec.see_cgroup();
        spec.linux("sysctl", json!({"net.ipv4.ip_unprivileged_port_start": "0"}));
    }),
    case("mappings without a user namespace", InPod, |spec| {
        spec.linux("uidMappings", json!([{"containerID": 0, "hostID": 100000, "size": 65536}]));
    }),

    case("devices", InPod, |spec| {
        spec.linux("devices", json!([
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 1000, "gid": 900},
            {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o666},
            {"path": "/dev/full", "type": "c", "major": 1, "minor": 7, "fileMode": 0o600, "uid": 5, "gid": 6},
            {"path": "/dev/a/pipe", "type": "p", "fileMode": 0o622},
            {"path": "/dev/unbuffered", "type": "u", "major": 1, "minor": 5},
        ]));
        spec.resource("devices", json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
            {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rwm"},
        ]));
    }),
    case("a device outside of /dev", InPod, |spec| {
        spec.tmpfs("/data", &["mode=755"]);
        spec.linux("devices", json!([{"path": "/data/null", "type": "c", "major": 1, "minor": 3}]));
    }),
    case("rules for devices", InPod, |spec| {
        spec.capabilities(&["CAP_MKNOD", "CAP_CHOWN"]);
        spec.resource("devices", json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "access": "rwm"},
            {"allow": true, "type": "b", "major": 7, "access": "m"},
        ]));
    }),
    case("a rule that takes one device out of many", InPod, |spec| {
        spec.resource("devices", json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "access": "rw"},
            {"allow": false, "type": "c", "major": 10, "minor": 229, "access": "w"},
        ]));
    }),
    case("a device of no number", InPod, |spec| {
        spec.linux("devices", json!([{"path": "/dev/x", "type": "c", "major": -1, "minor": 0}]));
    }),

    case("limits of memory, pids and cpu", InPod, |spec| {
        spec.resource("memory", json!({"limit": 134217728, "reservation": 33554432, "swap": 201326592}));
        spec.resource("pids", json!({"limit": 77}));
        spec.resource("cpu", json!({"quota": 50000, "period": 100000}));
        spec.see_cgroup();
    }),
    case("limits that are none", InPod, |spec| {
        spec.resource("memory", json!({"limit": -1, "swap": -1}));
        spec.resource("pids", json!({"limit": -1}));
        spec.resource("cpu", json!({"quota": -1, "period": 50000}));
        spec.see_cgroup();
    }),
    case("processors and memory nodes", InPod, |spec| {
        spec.resource("cpu", json!({"cpus": "0", "mems": "0"}));
        spec.see_cgroup();
    }),
    case("limits by the files' names", InPod, |spec| {
        spec.resource("unified", json!({"memory.high": "100000000", "memory.oom.group": "1", "pids.max": "99",
            "cpu.weight": "250"}));
        spec.see_cgroup();
    }),
    case("a limit of nobody", InPod, |spec| {
        spec.resource("unified", json!({"memory.no-such-file": "1"}));
    }),
    case("no large pages", InPod, |spec| {
        spec.resource("hugepageLimits", json!([{"pageSize": "2MB", "limit": 0}]));
        spec.see_cgroup();
    }),

    case("sysctls of ipc", InPod, |spec| {
        spec.linux("sysctl", json!({"kernel.msgmax": "4242", "kernel.shm_rmid_forced": "1",
            "fs.mqueue.msg_max": "20", "kernel.sem": "100 200 30 40"}));
    }),
    case("sysctls of the network", Alone, |spec| {
        spec.linux("sysctl", json!({"net.ipv4.ip_unprivileged_port_start": "80",
            "net.ipv4.ping_group_range": "0 900", "net/ipv4/ip_forward": "1"}));
    }),
    case("a sysctl of the machine", InPod, |spec| spec.linux("sysctl", json!({"vm.swappiness": "10"}))),
    case("a sysctl of nobody", InPod, |spec| spec.linux("sysctl", json!({"net.no_such_key": "1"}))),
    case("a sysctl of ipc that is shared", InPod, |spec| {
        spec.without_namespace("ipc");
        spec.linux("sysctl", json!({"kernel.msgmax": "4242"}));
    }),

    case("a filter that allows", InPod, |spec| {
        spec.linux("seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                {"names": ["chroot", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
                {"names": ["personality"], "action": "SCMP_ACT_ERRNO",
                 "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
                {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 97,
                 "args": [{"index": 0, "value": 17, "op": "SCMP_CMP_EQ"}]},
                {"names": ["setpriority"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["mlockall"], "action": "SCMP_ACT_TRAP"},
                {"names": ["reboot"], "action": "SCMP_ACT_LOG"},
            ]}));
    }),
    case("a filter that denies", InPod, |spec| {
        spec.linux("seccomp", json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": [
                "access", "arch_prctl", "brk", "capget", "capset", "chdir", "clone", "clone3", "close",
                "close_range", "dup", "dup2", "dup3", "epoll_create1", "epoll_ctl", "epoll_pwait", "execve", "exit",
                "exit_group", "faccessat", "faccessat2", "fcntl", "fork", "fstat", "fstatfs", "futex", "getcwd",
                "getdents64", "getegid", "geteuid", "getgid", "getpgrp", "getpid", "getppid", "getrandom",
                "getrlimit", "getsid", "gettid", "getuid", "ioctl", "lseek", "madvise", "mmap", "mprotect", "munmap",
                "nanosleep", "newfstatat", "open", "openat", "openat2", "pipe2", "poll", "prctl", "pread64",
                "prlimit64", "read", "readlink", "readlinkat", "rseq", "rt_sigaction", "rt_sigprocmask",
                "rt_sigreturn", "sched_getaffinity", "sched_yield", "set_robust_list", "set_tid_address", "setgid",
                "setgroups", "setuid", "sigaltstack", "stat", "statfs", "statx", "tgkill", "uname", "unlink",
                "wait4", "write", "writev", "kill", "keyctl"]}]}));
    }),
    case("a filter that asks", InPod, |spec| {
        spec.linux("seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["chroot"], "action": "SCMP_ACT_NOTIFY"}]}));
    }),

    case("masked and read-only paths of its own", InPod, |spec| {
        spec.linux("maskedPaths", json!(["/etc/secret", "/proc/keys", "/opt", "/home", "/no/such/path"]));
        spec.linux("readonlyPaths", json!(["/proc/sys", "/etc", "/var", "/no/such/path"]));
    }),
    case("a path both masked and read-only", InPod, |spec| {
        spec.linux("maskedPaths", json!(["/etc", "/etc/secret"]));
        spec.linux("readonlyPaths", json!(["/etc", "/srv"]));
    }),
    case("nothing masked and nothing read-only", InPod, |spec| {
        spec.linux("maskedPaths", json!([]));
        spec.linux("readonlyPaths", json!([]));
    }),
    case("a volume that is masked in part", InPod, |spec| {
        spec.volume("", "/data", &["rbind"]);
        spec.linux("maskedPaths", json!(["/data/file", "/data/below"]));
        spec.linux("readonlyPaths", json!(["/data"]));
    }),

    case("privileged", InPod, |spec| {
        spec.capabilities(&ALL_CAPABILITIES);
        spec.linux("maskedPaths", json!([]));
        spec.linux("readonlyPaths", json!([]));
        spec.options("/sys", &["nosuid", "noexec", "nodev"]);
        spec.mount("cgroup", Path::new("cgroup"), "/sys/fs/cgroup", &["rw", "nosuid", "noexec", "nodev"]);
        spec.resource("devices", json!([{"allow": true, "access": "rwm"}]));
        spec.process("noNewPrivileges", json!(false));
    }),

    case("hook before the command", InPod, |spec| spec.hook("startContainer")),
    case("hook before the command, as a user", InPod, |spec| {
        spec.hook("startContainer");
        spec.user(1000);
    }),
    case("hook that is missing", InPod, |spec| {
        spec.json["hooks"]["startContainer"] = json!([{"path": "/no/such/program"}]);
    }),
    case("hook that fails", InPod, |spec| {
        spec.json["hooks"]["startContainer"] = json!([{"path": "/probe", "args": ["probe", "hook", "/no/such/file"]}]);
    }),
];
