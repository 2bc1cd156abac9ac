//! What users run under runc without a thought: systemd as the first process, a small init,
//! programs that need much of the kernel, many processors; and a pod that takes all its memory.
//!
//! Everything except what concerns the VM also runs against runc.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use kata_like_tests::annotations::SANDBOX_MEMORY;
use kata_like_tests::kernel_options::{FILES, OPTIONS};
use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::process::until;
use kata_like_tests::pty::OnTerminal;
use kata_like_tests::rootfs::Rootfs;
use kata_like_tests::volume::memory_of_roots;
use kata_like_tests::{
    CtrContainer, CtrPod, Host, IMAGE, TestResult, failure, figures, kata_like_only, runtime,
    userland,
};
use serde_json::json;

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

/// Masks the units that a container image masks: there is no bus, and nobody logs in. `limited` has
/// limits.
const PREPARE: &str = "
    mkdir -p /etc/systemd/system
    for unit in systemd-logind.service getty.target; do ln -s /dev/null /etc/systemd/system/$unit; done
    echo 0123456789abcdef0123456789abcdef >/etc/machine-id
    printf '[Service]\\nExecStart=/bin/sleep 1000\\nTasksMax=9\\nMemoryMax=64M\\n' >/etc/systemd/system/limited.service
    exec /usr/lib/systemd/systemd";

/// systemd boots to its default target, has cgroups of its own with limits in them, starts and ends
/// services while further processes come into the container, and ends in order when it is asked to.
#[test]
fn systemd_is_the_first_process() -> TestResult {
    let host = Host::shared()?;
    let id = host.name("systemd");
    let mut command = host.ctr_command();
    command
        .args(["run", "--rm", "--tty", "--runtime", &runtime()])
        .args(userland::options()?)
        .args(["--env", "container=oci"])
        .arg("--mount=type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw:nosuid:noexec:nodev")
        .arg("--mount=type=tmpfs,src=tmpfs,dst=/run/lock,options=nosuid:nodev:mode=755")
        .arg("--mount=type=tmpfs,src=tmpfs,dst=/tmp,options=mode=1777")
        .args([IMAGE, &id, "sh", "-c", PREPARE]);
    let pod = CtrContainer::new(&host, id);
    // If it fails, its output during the boot is the reason.
    let console = OnTerminal::start(command, 200, 50)?;
    console.expect("multi-user.target", 150 * SECOND)?;
    let says = |command: &str| -> TestResult<String> {
        let output = pod.exec(&["sh", "-c", command])?;
        match output.status {
            0 => Ok(output.text()),
            _ => Err(failure(format!(
                "{command}: {}; {}",
                output.both(),
                console.screen()
            ))),
        }
    };
    let failed = "systemctl --failed --no-legend --plain";
    let state = says(&format!("systemctl is-system-running --wait || {failed}"))?;
    assert_eq!(state, "running", "{}", console.screen());
    assert_eq!(says("cat /proc/1/comm")?, "systemd");

    says("systemctl start limited")?;
    // Without a cgroup namespace, as ctr makes it, systemd is below the container's cgroup.
    let own = says("cat /proc/1/cgroup")?;
    let own = own
        .strip_prefix("0::")
        .and_then(|own| own.strip_suffix("/init.scope"))
        .ok_or_else(|| failure(own.clone()))?;
    let cgroup = format!("/sys/fs/cgroup{own}/system.slice/limited.service");
    let limits = says(&format!("cat {cgroup}/pids.max {cgroup}/memory.max"))?;
    assert_eq!(limits, "9\n67108864");
    let pid = says("systemctl show --property MainPID --value limited")?;
    assert_eq!(
        says(&format!("cat /proc/{pid}/cgroup"))?,
        format!("0::{own}/system.slice/limited.service")
    );
    says("systemctl stop limited")?;
    says(&format!("! ls {cgroup}"))?;
    // systemd's changes to the cgroups do not keep another process out.
    assert_eq!(
        says("cat /proc/self/cgroup")?,
        format!("0::{own}/init.scope")
    );

    assert_eq!(pod.kill("SIGRTMIN+3")?.status, 0);
    assert_eq!(console.finish(60 * SECOND)?, 0, "not ended in order");
    Ok(())
}

/// A process that ends before its parent, which never reaps it: the first process must.
const ORPHAN: &str = "true & exec sleep 0.3";

fn keeps_zombies(pod: &CtrContainer) -> TestResult<bool> {
    let list = pod.exec(&["ps", "-o", "stat,comm"])?.text();
    Ok(list.lines().any(|line| line.starts_with('Z')))
}

/// `docker run --init`: a static init of the host is mounted as a file and is the first process. It
/// reaps orphans, hands signals on, and ends as its child does. A command that is itself the first
/// process does neither: the kernel ignores SIGTERM for it.
///
/// AppArmor's profiles are the host's: the named one has no effect, and the container starts.
#[test]
fn a_small_init_reaps_and_hands_signals_on() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let sandbox = CtrPod::start(&host, &[])?;
    let mount = format!(
        "type=bind,src={},dst=/sbin/docker-init,options=bind:ro",
        userland::path("bin/catatonit")?.display()
    );
    let mut options = vec!["--mount", &mount];
    if !kata_like_tests::is_oracle() {
        options.extend(["--apparmor-profile", "a-profile-of-the-host"]);
    }
    let script = "trap 'exit 21' TERM; while :; do sleep 0.1; done";
    let command = ["/sbin/docker-init", "--", "sh", "-c", script];
    let with = sandbox.container("init", &options, &command)?;
    let without = sandbox.container("no-init", &[], &["sleep", "1000"])?;
    for pod in [&without, &with] {
        pod.exec_call(&[], &["sh", "-c", ORPHAN]).ok()?;
    }
    until("no zombie is left", 20 * SECOND, || {
        keeps_zombies(&with).is_ok_and(|keeps| !keeps)
    })?;
    assert!(keeps_zombies(&without)?, "who has reaped it?");
    assert_eq!(with.exec(&["cat", "/proc/1/comm"])?.text(), "docker-init");

    for pod in [&without, &with] {
        assert_eq!(pod.kill("TERM")?.status, 0);
    }
    assert_eq!(events.exit(with.id(), with.id(), 30 * SECOND)?.status(), 21);
    assert_eq!(without.status()?.0, "RUNNING");
    assert_eq!(with.delete()?, 21);
    without.remove()?;
    sandbox.remove()
}

/// Runs pairs of a name and a script; a line for each.
const RUN_EACH: &str = "export ip=/usr/bin/ip # busybox has one of its own, and its shell prefers that
while [ $# -gt 0 ]; do
    if sh -ec \"$2\" >/tmp/said 2>&1; then echo \"$1: works\"; else echo \"$1: $(tail -n 3 /tmp/said | tr '\\n' ' ')\"; fi
    shift 2
done";

/// TUN, FUSE, overlayfs, bridges, both back ends of iptables and whatever else programs ask of a
/// kernel.
#[test]
fn the_kernel_has_what_programs_ask_for() -> TestResult {
    let host = Host::shared()?;
    let mut options = userland::options()?;
    for option in [
        "--mount=type=tmpfs,src=tmpfs,dst=/scratch,options=mode=755",
        "--cap-add=CAP_SYS_ADMIN",
        "--cap-add=CAP_NET_ADMIN",
        "--device=/dev/net/tun",
        "--device=/dev/fuse",
    ] {
        options.push(option.to_owned());
    }
    let (files, volume) = (tempfile::tempdir()?, tempfile::tempdir()?);
    options.push(format!(
        "--mount=type=bind,src={},dst=/volume,options=rbind:rw",
        volume.path().display()
    ));
    for (name, text) in FILES {
        let path = files.path().join(name);
        fs::write(&path, text)?;
        options.push(format!(
            "--mount=type=bind,src={},dst=/{name},options=bind:ro",
            path.display()
        ));
    }
    let mut command = vec!["sh", "-c", RUN_EACH, "sh"];
    command.extend(OPTIONS.iter().flat_map(|(name, script)| [*name, *script]));
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let output = host.run(&host.name("kernel"), &options, &command).ok()?;
    let wanted: Vec<_> = OPTIONS
        .iter()
        .map(|(name, _)| format!("{name}: works"))
        .collect();
    assert_eq!(output.text().lines().collect::<Vec<_>>(), wanted);
    Ok(())
}

/// An MP table and APICs for more CPUs than fit into eight bits of a mask; all are there from the
/// first instruction on.
#[test]
fn more_than_eight_processors() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let config = format!("/run/{}.toml", host.name("processors"));
    fs::write(&config, "max_vcpus = 10\n")?;
    let options = ["--runtime-config-path", config.as_str()];
    let script = "nproc; grep -c ^processor /proc/cpuinfo; cat /sys/devices/system/cpu/online";
    let output = host
        .run(&host.name("processors"), &options, &["sh", "-c", script])
        .ok()?;
    assert_eq!(output.text(), "10\n10\n0-9");
    figures::note(&format!(
        "a container with ten processors: {:.1} s",
        output.took.as_secs_f32()
    ));
    fs::remove_file(config)?;
    Ok(())
}

/// What `docs/architecture.md` tells administrators to declare for a RuntimeClass.
const OVERHEAD: u64 = 256 * MIB;

/// A pod with a limit of 128 MiB in which one container takes all of it. On the host the pod stays
/// below its limit and the overhead, and nothing of it is killed there. In the guest only the
/// greedy process is killed.
#[test]
fn a_pod_that_takes_all_its_memory_stays_within_its_limit() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let events = host.events()?;
    let limit = 128 * MIB;
    let annotation = format!("{SANDBOX_MEMORY}={limit}");
    let sandbox = CtrPod::start(&host, &["--annotation", &annotation])?;
    let neighbour = sandbox.container("neighbour", &[], &["sleep", "1000"])?;
    let bytes = limit.to_string();
    let greedy = sandbox.container(
        "greedy",
        &["--memory-limit", &bytes],
        &["tail", "/dev/zero"],
    )?;
    assert_eq!(
        events.exit(greedy.id(), greedy.id(), 90 * SECOND)?.status(),
        137
    );
    assert_eq!(neighbour.exec(&["echo", "lives"])?.text(), "lives");

    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", sandbox.pid()))?;
    let cgroup = cgroup.trim().strip_prefix("0::").unwrap_or_default();
    let cgroup = PathBuf::from(format!("/sys/fs/cgroup{cgroup}"));
    let read = |file: &str| -> TestResult<String> {
        fs::read_to_string(cgroup.join(file))
            .map_err(|error| failure(format!("{}/{file}: {error}", cgroup.display())))
    };
    let peak: u64 = read("memory.peak")?.trim().parse()?;
    figures::note(&format!(
        "a pod of {} MiB that takes all its memory: at most {:.1} MiB on the host",
        limit / MIB,
        peak as f64 / MIB as f64
    ));
    assert!(peak > limit, "only {peak}: it was not all taken");
    assert!(peak < limit + OVERHEAD, "{peak}");
    let bound: u64 = read("memory.max")?.trim().parse()?;
    let bound = bound - memory_of_roots()?;
    assert!(bound <= limit + OVERHEAD, "the host allows {bound}");
    let kills = read("memory.events")?;
    assert!(kills.contains("\noom_kill 0\n"), "{kills}");
    for pod in [greedy, neighbour] {
        pod.remove()?;
    }
    sandbox.remove()
}

/// What bounds a container beside its own limits, as files below /proc/sys. Each is at least as
/// large in the guest as on the host.
const BOUNDS: [&str; 33] = [
    "fs/aio-max-nr",
    "fs/file-max",
    "fs/inotify/max_queued_events",
    "fs/inotify/max_user_instances",
    "fs/inotify/max_user_watches",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/queues_max",
    "fs/nr_open",
    "fs/pipe-max-size",
    "fs/pipe-user-pages-soft",
    "kernel/keys/maxbytes",
    "kernel/keys/maxkeys",
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/ngroups_max",
    "kernel/pid_max",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/threads-max",
    "net/core/somaxconn",
    "net/ipv4/tcp_max_syn_backlog",
    "user/max_ipc_namespaces",
    "user/max_mnt_namespaces",
    "user/max_net_namespaces",
    "user/max_pid_namespaces",
    "user/max_user_namespaces",
    "user/max_uts_namespaces",
    "vm/max_map_count",
];

/// A container may ask for what it may ask for on the host, whatever the VM's size is. Its hard
/// limit of pending signals is the kernel's rule of one for two threads.
#[test]
fn the_kernel_s_bounds_are_no_lower_than_the_host_s() -> TestResult {
    let host = Host::shared()?;
    let cat = format!("cd /proc/sys && cat {} && ulimit -Hi", BOUNDS.join(" "));
    let seen = host.run(&host.name("bounds"), &[], &["sh", "-c", &cat]);
    let seen = seen.ok()?.text();
    let seen: Vec<&str> = seen.lines().collect();
    assert_eq!(seen.len(), BOUNDS.len() + 1, "{seen:?}");
    for (file, inside) in BOUNDS.iter().zip(&seen) {
        let outside = fs::read_to_string(format!("/proc/sys/{file}"))?;
        let (inside, outside): (u128, u128) = (inside.parse()?, outside.trim().parse()?);
        assert!(inside >= outside, "{file}: {inside}, on the host {outside}");
    }
    let signals = seen[BOUNDS.len()];
    if signals != "unlimited" {
        let threads = fs::read_to_string("/proc/sys/kernel/threads-max")?;
        let (signals, threads): (u64, u64) = (signals.parse()?, threads.trim().parse()?);
        assert!(signals >= threads / 2, "{signals} of {threads}");
    }
    Ok(())
}

/// A limit of huge pages reserves them, beside the memory limit.
#[test]
fn a_limit_of_huge_pages_reserves_them() -> TestResult {
    kata_like_only!(); // under runc the pool is the host's
    let host = Host::shared()?;
    let tool = Tool::new(&host)?;
    let rootfs = Rootfs::mount(&host)?;
    let script =
        format!("grep HugePages_Total /proc/meminfo; {TOOL} huge 16777216; {TOOL} huge 18874368");
    let mut spec = rootfs.spec(&["sh", "-c", &script])?;
    spec["linux"]["resources"]["hugepageLimits"] =
        json!([{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 16 * MIB}]);
    spec["linux"]["resources"]["memory"]["limit"] = json!(64 * MIB);
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.push(
            json!({"type": "bind", "source": tool.path(), "destination": TOOL,
            "options": ["bind", "ro"]}),
        );
    }
    let run = rootfs.run(&["--rm"], &host.name("huge"), &spec)?.ok()?;
    let seen = run.text();
    let seen: Vec<&str> = seen.split_whitespace().collect();
    assert_eq!(seen, ["HugePages_Total:", "8", "written", "ENOMEM"]);
    Ok(())
}
