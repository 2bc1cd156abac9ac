//! What the rules allow: crates, floors, places for `unsafe`, and the exceptions of today.
//!
//! `cargo run -p kata-like-tests --bin house-figures -- --floors FOLDER` prints a folder's floors
//! as its arrows have them, to begin with when rooms are moved.

/// A crate's folder, and those of ours that it may name in its `[dependencies]`.
pub const CRATES: [(&str, &[&str]); 25] = [
    ("failure", &[]),
    (
        "fuzz",
        &[
            "containerd-shim-kata-like-v2",
            "kata-like-boot",
            "kata-like-config",
            "kata-like-proxy",
            "kata-like-vmm",
        ],
    ),
    ("linux", &[]),
    ("spec", &["kata-like-failure"]),
    (
        "shim-v2",
        &[
            "kata-like-config",
            "kata-like-boot",
            "kata-like-agent-protocol",
            "kata-like-failure",
            "kata-like-linux",
            "kata-like-netlink",
            "kata-like-proxy",
            "kata-like-relay",
            "kata-like-spec",
        ],
    ),
    ("shim-v2/config", &[]),
    (
        "shim-v2/proxy",
        &[
            "kata-like-agent-protocol",
            "kata-like-boot",
            "kata-like-failure",
            "kata-like-jail",
            "kata-like-linux",
        ],
    ),
    (
        "vmm",
        &[
            "kata-like-boot",
            "kata-like-failure",
            "kata-like-jail",
            "kata-like-linux",
        ],
    ),
    ("vmm/boot", &["kata-like-failure"]),
    ("vmm/jail", &["kata-like-linux"]),
    (
        "vmm/fsd",
        &[
            "kata-like-boot",
            "kata-like-failure",
            "kata-like-jail",
            "kata-like-linux",
        ],
    ),
    (
        "agent",
        &[
            "kata-like-agent-protocol",
            "kata-like-failure",
            "kata-like-linux",
            "kata-like-netlink",
            "kata-like-relay",
            "kata-like-spec",
        ],
    ),
    ("agent/netlink", &["kata-like-linux"]),
    ("agent/protocol", &["kata-like-failure"]),
    ("agent/relay", &["kata-like-linux"]),
    ("guest-image", &[]),
    (
        "tools/cli",
        &[
            "kata-like-config",
            "kata-like-boot",
            "kata-like-agent-protocol",
            "kata-like-failure",
            "kata-like-jail",
            "kata-like-linux",
        ],
    ),
    ("tools/sbom", &[]),
    ("tools/test-host", &["kata-like-limits"]),
    (
        "tests",
        &["kata-like-cri-client", "kata-like-jail", "kata-like-limits"],
    ),
    (
        "tests/attacks",
        &["kata-like-boot", "kata-like-jail", "kata-like-linux"],
    ),
    ("tests/cri", &[]),
    ("tests/limits", &[]),
    ("tests/probe", &[]),
    ("tests/raw-guest", &[]),
];

/// A folder's rooms by their floors, from the top. Each room of the folder stands here once; those
/// on one floor do not know each other.
pub const FLOORS: [(&str, &[&str]); 5] = [
    (
        "shim-v2/src",
        &[
            "main",
            "fuzz lib",
            "containerd",
            "pod",
            "network",
            "hooks vm",
            "bundle cgroup share stdio",
            "logger spec stand_in",
            "file_systems log selinux spawn steps uri",
        ],
    ),
    (
        "vmm/src",
        &[
            "main",
            "fuzz machine",
            "slots",
            "kvm vcpu",
            "bus log memory reactor",
            "kernel legacy mptable virtio",
            "cpuid figures initrd jail lib watchdog",
            "layout",
        ],
    ),
    // No device knows the transport, and the transport knows no device.
    (
        "vmm/src/virtio",
        &[
            "life",
            "block fs mmio net rng vsock",
            "worker",
            "mod",
            "queue",
            "chain",
            "vectors",
            "guest number",
        ],
    ),
    (
        "agent/src",
        &[
            "main",
            "service",
            "convert",
            "pod",
            "resolver",
            "container",
            "events forward process spec",
            "init stdio",
            "cgroup dial network runner write_back",
            "deadline device disks kmsg readiness reaper storage",
        ],
    ),
    (
        "agent/src/runner",
        &[
            "client mod",
            "exec init placeholder",
            "program",
            "birth devices hide hooks mounts terminal users",
            "channel identity rootfs supported sysctl",
            "command device_filter namespaces options request scheduling seccomp",
            "copy_up error syscall",
        ],
    ),
];

/// Arrows from a file to another that still make a circle, or point up.
pub const KNOTS: [(&str, &str); 0] = [];

/// Functions that are still too long: file and name.
pub const LONG: [(&str, &str); 0] = [];

/// Files and folders whose comments are still too wide.
pub const WIDE: [&str; 0] = [];

/// Files and folders of the product that have `unsafe` code.
pub const UNSAFE: [&str; 28] = [
    "agent/src/process.rs",
    "agent/src/runner/hooks.rs",
    "agent/src/runner/syscall.rs",
    "fuzz/src/allocation.rs",
    "linux/src/birth.rs",
    "linux/src/bpf.rs",
    "linux/src/clone.rs",
    "linux/src/command.rs",
    "linux/src/fd.rs",
    "linux/src/landlock.rs",
    "linux/src/mount.rs",
    "linux/src/numbers.rs",
    "linux/src/signal.rs",
    "linux/src/socket.rs",
    "linux/src/tun.rs",
    "linux/src/watch.rs",
    "tools/test-host/src/counter.rs",
    "tools/test-host/src/direct.rs",
    "tools/test-host/src/machine.rs",
    "vmm/fsd/src/last_words.rs",
    "vmm/fsd/src/locks.rs",
    "vmm/src/figures.rs",
    "vmm/src/kvm.rs",
    "vmm/src/main.rs",
    "vmm/src/memory.rs",
    "vmm/src/vcpu.rs",
    "vmm/src/virtio/mod.rs",
    "vmm/src/virtio/vectors.rs",
];
