//! `process`: users, capabilities, limits, terminals, and further processes.
//!
//! Scheduler, ioPriority, personality, domainname and time offsets are not here: runc 1.1, the
//! oracle, is older and leaves them out. The runner's unit tests have a container for each.

use serde_json::json;

use super::super::Case;
use super::super::Kind::{Alone, Exec, InPod};
use super::{ALL_CAPABILITIES, case};

#[rustfmt::skip] // a case a paragraph
pub const CASES: &[Case] = &[
    case("containerd's default", InPod, |_| {}),
    case("containerd's default, alone", Alone, |_| {}),

    case("what a spec may leave out", InPod, |spec| {
        spec.json["hostname"] = json!(null);
        spec.process("rlimits", json!([]));
        spec.process("oomScoreAdj", json!(null));
        spec.without_namespace("cgroup");
    }),

    case("terminal", InPod, |spec| {
        spec.process("terminal", json!(true));
    }),
    case("terminal with a size", InPod, |spec| {
        spec.process("terminal", json!(true));
        spec.process("consoleSize", json!({"width": 91, "height": 33}));
    }),
    case("terminal of a user", InPod, |spec| {
        spec.process("terminal", json!(true));
        spec.user(1000);
    }),
    case("terminal on a read-only root", InPod, |spec| {
        spec.process("terminal", json!(true));
        spec.json["root"]["readonly"] = json!(true);
    }),

    case("arguments", InPod, |spec| {
        spec.process("args", json!(["/probe", "report", "", "two words", "$HOME", "ü"]));
    }),
    case("command in the path", InPod, |spec| {
        spec.process("args", json!(["probe", "report"]));
        spec.process("env", json!(["PATH=/nowhere:/"]));
    }),
    case("command not found", InPod, |spec| {
        spec.process("args", json!(["no-such-command"]));
    }),
    case("environment", InPod, |spec| {
        spec.process("env", json!(["A=1", "B=", "A=2=3", "PATH=/bin", "TERM=dumb", "C=a b"]));
    }),
    case("environment with a home", InPod, |spec| {
        spec.process("env", json!(["HOME=/elsewhere", "PATH=/bin"]));
    }),
    case("home of a user", InPod, |spec| {
        spec.process("user", json!({"uid": 1000, "gid": 1000}));
        spec.process("env", json!(["HOME=", "PATH=/bin"]));
    }),
    case("working directory", InPod, |spec| spec.process("cwd", json!("/tmp"))),
    case("working directory that is made", InPod, |spec| {
        spec.process("cwd", json!("/made/by/the/runtime"));
    }),
    case("working directory of root's for a user", InPod, |spec| {
        spec.process("cwd", json!("/made/by/the"));
        spec.user(1000);
    }),

    case("user", InPod, |spec| {
        spec.process("user", json!({"uid": 1000, "gid": 1001}));
    }),
    case("user of no name", InPod, |spec| {
        spec.process("user", json!({"uid": 54321, "gid": 65432}));
    }),
    case("additional groups", InPod, |spec| {
        spec.process("user", json!({"uid": 0, "gid": 0, "additionalGids": [1, 5, 900, 70000]}));
    }),
    case("umask", InPod, |spec| {
        spec.process("user", json!({"uid": 0, "gid": 0, "umask": 0o077}));
    }),
    case("user that is too high", InPod, |spec| {
        spec.process("user", json!({"uid": 2_147_483_648_u32, "gid": 0}));
    }),

    case("no capabilities", InPod, |spec| spec.capabilities(&[])),
    case("no capabilities object", InPod, |spec| {
        if let Some(process) = spec.json["process"].as_object_mut() {
            process.remove("capabilities");
        }
    }),
    case("all capabilities", InPod, |spec| spec.capabilities(&ALL_CAPABILITIES)),
    case("all capabilities for a user", InPod, |spec| {
        spec.capabilities(&ALL_CAPABILITIES);
        spec.user(1000);
    }),
    case("ambient capabilities for a user", InPod, |spec| {
        let list = ["CAP_NET_RAW", "CAP_NET_BIND_SERVICE", "CAP_CHOWN"];
        spec.process("capabilities", json!({"bounding": list, "effective": list, "permitted": list,
            "inheritable": list, "ambient": list}));
        spec.user(1000);
    }),
    case("inheritable capabilities", InPod, |spec| {
        let list = ["CAP_NET_RAW", "CAP_CHOWN"];
        spec.process("capabilities", json!({"bounding": list, "effective": ["CAP_CHOWN"],
            "permitted": list, "inheritable": ["CAP_NET_RAW"]}));
    }),
    case("new privileges", InPod, |spec| spec.process("noNewPrivileges", json!(false))),
    case("user, capabilities, no_new_privs and a filter", InPod, |spec| {
        spec.user(1000);
        spec.capabilities(&["CAP_CHOWN", "CAP_NET_RAW", "CAP_SETUID"]);
        spec.process("noNewPrivileges", json!(true));
        spec.linux("seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["chroot", "unshare", "keyctl"], "action": "SCMP_ACT_ERRNO"}]}));
    }),
    case("user and a filter with new privileges", InPod, |spec| {
        spec.user(1000);
        spec.process("noNewPrivileges", json!(false));
        spec.linux("seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}));
    }),

    case("limits", InPod, |spec| {
        spec.process("rlimits", json!([
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NPROC", "soft": 500, "hard": 600},
            {"type": "RLIMIT_MEMLOCK", "soft": 65536, "hard": 131072},
            {"type": "RLIMIT_STACK", "soft": 4194304, "hard": 18446744073709551615_u64},
            {"type": "RLIMIT_RTPRIO", "soft": 3, "hard": 4},
            {"type": "RLIMIT_NICE", "soft": 20, "hard": 25},
            {"type": "RLIMIT_MSGQUEUE", "soft": 1000, "hard": 2000},
            {"type": "RLIMIT_SIGPENDING", "soft": 50, "hard": 60},
        ]));
    }),
    case("limit above its maximum", InPod, |spec| {
        spec.process("rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 300, "hard": 200}]));
    }),
    case("OOM score", InPod, |spec| spec.process("oomScoreAdj", json!(321))),
    case("OOM score below zero", InPod, |spec| spec.process("oomScoreAdj", json!(-321))),

    // Limits of execs are equal: of two that differ runc 1.1 gives an exec the higher one twice.
    case("exec", Exec, |_| {}),
    case("exec as a user", Exec, |spec| spec.exec = json!({"user": {"uid": 1000, "gid": 1000}})),
    case("exec in a directory", Exec, |spec| spec.exec = json!({"cwd": "/tmp"})),
    case("exec in a confined container", Exec, |spec| {
        spec.user(1000);
        spec.capabilities(&["CAP_NET_RAW"]);
        spec.process("rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 200, "hard": 200}]));
        spec.process("oomScoreAdj", json!(123));
        spec.json["root"]["readonly"] = json!(true);
        spec.linux("seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["chroot", "unshare"], "action": "SCMP_ACT_ERRNO"}]}));
    }),
    case("exec with rights of its own", Exec, |spec| {
        spec.exec = json!({"capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"],
            "permitted": ["CAP_CHOWN"]}, "env": ["A=1"], "noNewPrivileges": false,
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 60, "hard": 60}]});
    }),
    case("exec on a terminal", Exec, |spec| {
        spec.exec = json!({"terminal": true, "consoleSize": {"width": 91, "height": 33}});
    }),
    case("exec in the pod's PID namespace", Exec, |spec| spec.of_pod("pid", "pid")),
];
