//! Whole containers, made and looked at from inside. They need root and a cgroup v2; without them
//! they say so.
//!
//! A runner is the running binary started again, which here is the test harness with its threads.
//! So each case is a process of its own, taken over before the harness begins, and so is each
//! runner. A container's root is empty except for links into the machine's /usr, which it gets as a
//! volume.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use oci_spec::runtime::LinuxNamespaceType;
use serde_json::{Value, json};

use super::client::{Created, Executed};
use super::*;

/// Takes over a runner or a case before the harness starts its threads.
#[used]
#[unsafe(link_section = ".init_array")]
static TAKE_OVER: extern "C" fn() = take_over;

extern "C" fn take_over() {
    let arguments: Vec<_> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        // "runner" may also be the filter that someone has given to the harness.
        Some("runner") if has_channel() => super::main(),
        None if arguments.first().is_some_and(|name| name == super::PAUSE) => super::pause(),
        Some("runner-case") => {
            let name = arguments.get(2).map(String::as_str).unwrap_or_default();
            let (_, case) = CASES.iter().find(|(known, _)| *known == name).unwrap();
            // Nobody is above us to catch a panic.
            let passed = std::panic::catch_unwind(|| case(&mut Case::new())).is_ok();
            if passed {
                println!("passed");
            }
            std::process::exit(i32::from(!passed));
        }
        _ => {}
    }
}

fn has_channel() -> bool {
    let kind = rustix::net::sockopt::socket_type(rustix::stdio::stdin());
    kind == Ok(rustix::net::SocketType::SEQPACKET)
}

macro_rules! cases {
    ($($name:ident)*) => {
        const CASES: &[(&str, fn(&mut Case))] = &[$((stringify!($name), all::$name)),*];
        $(#[test] fn $name() { run_case(stringify!($name)); })*
    };
}

cases! {
    the_spec_is_applied
    only_the_spec_is_left_in_the_process
    a_user_has_no_more_than_the_spec_gives
    an_exec_has_the_containers_confinement
    a_terminal_is_the_containers_own
    a_missing_command_leaves_nothing
    an_exit_is_exact
    a_start_not_made_ends_the_container
    planted_symlinks_lead_nowhere
    a_dev_that_is_a_link_is_made_inside
    a_device_that_is_none_masks_nothing
    devices_are_denied_by_default
    volumes_are_bound_with_their_options
    a_container_joins_anothers_namespaces
    a_start_hook_runs_in_the_container
    a_command_that_is_no_program_ends_the_container
    a_user_namespace_maps_the_containers_users
    an_exec_joins_the_containers_users
    a_placeholders_users_own_all_that_a_pod_shares
    a_container_joins_anothers_mounts_and_clocks
    clocks_are_the_containers_own
    a_create_hook_has_the_containers_rights_and_no_more
    scheduling_is_the_specs
    a_tmpfs_begins_with_what_it_covers
    a_placeholder_has_a_process_only_for_its_pids
    a_volume_in_memory_is_bound_like_any_other
    execs_leave_nothing_open
}

fn run_case(name: &str) {
    if !rustix::process::geteuid().is_root() || cgroups().is_none() {
        eprintln!("skipped: needs root and a cgroup v2 hierarchy");
        return;
    }
    let output = Command::new("/proc/self/exe")
        .args(["runner-case", name])
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(printed.ends_with("passed\n"), "{printed}{errors}");
}

/// Where cgroup v2 is mounted.
fn cgroups() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mut mounts = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    Some(mounts.find(|fields| fields[2] == "cgroup2")?[1].into())
}

/// A container to be, and all that belongs to it; gone when dropped.
struct Case {
    directory: tempfile::TempDir,
    cgroup: PathBuf,
    spec: Value,
    runtime: tokio::runtime::Runtime,
    exits: HashMap<i32, i32>,
}

impl Case {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["usr", "etc", "proc", "sys", "dev", "tmp", "run"] {
            std::fs::create_dir_all(directory.path().join("rootfs").join(name)).unwrap();
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            let link = directory.path().join("rootfs").join(name);
            symlink(format!("usr/{name}"), link).unwrap();
        }
        std::fs::write(
            directory.path().join("rootfs/etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        let name = format!("runner-test-{}", std::process::id());
        let cgroup = cgroups().unwrap().join(name);
        std::fs::create_dir(&cgroup).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        Self {
            directory,
            cgroup,
            spec: default_spec(),
            runtime,
            exits: HashMap::new(),
        }
    }

    fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    fn create(&self, stdio: Stdio, joined: Vec<Joined>) -> Result<Created> {
        let request = InitRequest {
            container: "test".to_owned(),
            spec: serde_json::from_value(self.spec.clone()).unwrap(),
            binds: self.binds(),
            guest_namespaces: Vec::new(),
            rootfs: self.rootfs(),
            volumes: "/".into(),
            memory: self.directory.path().into(),
            cgroup: self.cgroup.clone(),
        };
        self.runtime.block_on(super::create(request, stdio, joined))
    }

    /// In these tests the source of a bind mount says what the host would say beside the spec.
    fn binds(&self) -> BTreeMap<usize, Bind> {
        let mounts = self.spec["mounts"].as_array().unwrap().iter().enumerate();
        let bind = |(index, mount): (usize, &Value)| {
            let (place, name) = mount["source"].as_str()?.split_once(':')?;
            let bind = match place {
                "volume" => Bind::Volume(name.into()),
                _ => Bind::Memory(name.into()),
            };
            Some((index, bind))
        };
        mounts.filter_map(bind).collect()
    }

    fn start(&self, start: Start) -> Result<()> {
        self.runtime.block_on(start.start())
    }

    /// Runs a shell script as the container's init: its exit and what it has printed.
    fn shell(&mut self, script: &str) -> Result<(i32, String)> {
        self.spec["process"]["args"] = json!(["sh", "-c", script]);
        let (stdio, output) = streams();
        let created = self.create(stdio, Vec::new())?;
        self.start(created.start)?;
        Ok((self.wait(created.pid), read(output)))
    }

    fn exec(&self, init: &OwnedFd, process: &Value, stdio: Stdio) -> Result<Executed> {
        let request = ExecRequest {
            container: "test".to_owned(),
            spec: serde_json::from_value(self.spec.clone()).unwrap(),
            process: serde_json::from_value(process.clone()).unwrap(),
            cgroup: self.cgroup.clone(),
            cgroup_of_init: self.cgroup.clone(),
        };
        self.runtime
            .block_on(super::exec(request, init.as_fd(), stdio))
    }

    /// The exit of a process; reaps all others meanwhile, as the agent does.
    fn wait(&mut self, pid: u32) -> i32 {
        let pid = i32::try_from(pid).unwrap();
        loop {
            if let Some(exit) = self.exits.remove(&pid) {
                return exit;
            }
            let (exited, status) = rustix::process::wait(rustix::process::WaitOptions::empty())
                .unwrap()
                .unwrap();
            let exit = status
                .exit_status()
                .or(status.terminating_signal().map(|s| 128 + s));
            self.exits
                .insert(exited.as_raw_nonzero().get(), exit.unwrap());
        }
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let _ = std::fs::write(self.cgroup.join("cgroup.kill"), "1");
        while rustix::process::wait(rustix::process::WaitOptions::empty()).is_ok() {}
        std::fs::remove_dir(&self.cgroup).unwrap();
    }
}

fn streams() -> (Stdio, File) {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let stdin: OwnedFd = File::open("/dev/null").unwrap().into();
    let stderr = writer.try_clone().unwrap();
    (
        Stdio::Streams {
            stdin,
            stdout: writer,
            stderr,
        },
        reader.into(),
    )
}

fn read(mut from: File) -> String {
    let mut bytes = Vec::new();
    // The end of a terminal is an error.
    let _ = from.read_to_end(&mut bytes);
    String::from_utf8(bytes).unwrap()
}

/// What containerd makes by default, with the machine's /usr.
fn default_spec() -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETPCAP",
    ];
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["sh"], "cwd": "/", "noNewPrivileges": true,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "capabilities":
                {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1000, "hard": 1024}],
        },
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["ro", "nosuid", "noexec", "nodev"]},
            {"destination": "/usr", "source": "volume:usr", "options": ["rbind", "ro", "rprivate"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                           {"type": "network"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore", "/proc/timer_list", "/proc/acpi", "/sys/firmware", "/not/there"],
            "readonlyPaths": ["/proc/sys", "/proc/bus", "/not/there"],
        },
    })
}

/// The functions of these files; the tests that are made of them have the same names.
mod all {
    pub(super) use super::cases::*;
    pub(super) use super::files::*;
    pub(super) use super::namespaces::*;
}
mod cases;
mod files;
mod namespaces;
