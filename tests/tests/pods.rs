//! Several containers in one VM, as Kubernetes makes pods: what they share, what they don't, and
//! that they start, die and restart while the pod lives.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use kata_like_tests::annotations::{SANDBOX_CPU_PERIOD, SANDBOX_CPU_QUOTA, SANDBOX_MEMORY};
use kata_like_tests::process::{Process, until};
use kata_like_tests::{
    CtrContainer, CtrPod, Host, Parts, TestResult, failure, is_oracle, kata_like_only,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const SECOND: Duration = Duration::from_secs(1);

/// A tmpfs of the host, as containerd makes one for a sandbox's `/dev/shm`.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(host: &Host, size: &str) -> TestResult<Self> {
        let path = PathBuf::from(format!("/run/{}", host.name("tmpfs")));
        fs::create_dir(&path)?;
        let options = std::ffi::CString::new(format!("mode=1777,size={size}"))?;
        mount(
            "shm",
            &path,
            "tmpfs",
            MountFlags::empty(),
            options.as_c_str(),
        )?;
        Ok(Self(path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// Host name, IPC objects, `/dev/shm` and the network are the pod's; processes and files are the
/// container's own. All are in one VM.
#[test]
fn containers_share_what_kubernetes_shares() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let memory = Tmpfs::new(&host, "1m")?;
    let shm = format!(
        "type=bind,src={},dst=/dev/shm,options=rbind:rw",
        memory.0.display()
    );
    let sandbox = CtrPod::start(&host, &["--hostname", "the-pod"])?;
    let one = sandbox.container("one", &["--mount", &shm], &["sleep", "1000"])?;
    let two = sandbox.container("two", &["--mount", &shm], &["sleep", "1000"])?;

    let mut parts = Parts::new();
    parts.run("the host name", || {
        assert_eq!(one.exec(&["hostname"])?.text(), "the-pod");
        Ok(())
    });
    parts.run("namespaces", || {
        let (of_one, of_two) = (namespaces(&one)?, namespaces(&two)?);
        assert_eq!(of_one.len(), 5);
        assert_eq!(of_one[..3], of_two[..3]);
        assert_ne!(of_one[3], of_two[3]);
        assert_ne!(of_one[4], of_two[4]);
        Ok(())
    });
    parts.run("files", || {
        let script = "echo shared >/dev/shm/file; echo own >/tmp/file";
        one.exec_call(&[], &["sh", "-c", script]).ok()?;
        let output = two.exec(&["sh", "-c", "cat /dev/shm/file; cat /tmp/file"])?;
        assert_eq!(output.text(), "shared");
        Ok(())
    });
    parts.run("the size of the host's tmpfs", || {
        let output = two.exec(&[
            "dd",
            "if=/dev/zero",
            "of=/dev/shm/big",
            "bs=1024",
            "count=2048",
        ])?;
        assert!(
            output.error_text().contains("No space left"),
            "{}",
            output.both()
        );
        Ok(())
    });
    parts.run("one machine", || {
        let vmms = Process::all()
            .into_iter()
            .filter(|process| process.is("kata-like-vmm"));
        assert!(is_oracle() || vmms.count() == 1);
        Ok(())
    });
    parts.run("the pod's end", || {
        two.remove()?;
        one.remove()?;
        sandbox.remove()?;
        drop(memory);
        host.leaves_nothing(&before)
    });
    parts.end()
}

/// Which network, IPC, UTS, PID and mount namespaces a container is in.
fn namespaces(pod: &CtrContainer) -> TestResult<Vec<String>> {
    let links = ["net", "ipc", "uts", "pid", "mnt"].map(|kind| format!("/proc/self/ns/{kind}"));
    let script = format!("for n in {}; do readlink $n; done", links.join(" "));
    let text = pod.exec(&["sh", "-c", &script])?.text();
    Ok(text.lines().map(str::to_owned).collect())
}

/// A container in a crash loop: each life has its exit code, and the pod holds no more than before.
#[test]
fn a_crash_loop_in_a_living_pod_leaks_nothing() -> TestResult {
    let host = Host::alone()?;
    let sandbox = CtrPod::start(&host, &[])?;
    let neighbour = sandbox.container("neighbour", &[], &["sleep", "1000"])?;
    let crash = |code: i32| -> TestResult {
        let script = format!("ls -lR /etc >/dev/null; exit {code}");
        let output = sandbox
            .run("crashes", &[], &["sh", "-c", &script])
            .output()?;
        assert_eq!(output.status, code, "{}", output.both());
        Ok(())
    };
    crash(1)?; // what stays after the first time is no leak
    crash(2)?;
    let held = |role| -> TestResult<usize> { sandbox.first().process(role)?.open_files() };
    let count = || -> TestResult<Vec<usize>> {
        match is_oracle() {
            true => Ok(Vec::new()),
            false => ["shim", "fsd", "vmm", "proxy"]
                .into_iter()
                .map(held)
                .collect(),
        }
    };
    let (files, footprint) = (count()?, host.footprint());
    for code in 3..11 {
        crash(code)?;
    }
    // A failed create leaves as little.
    for _ in 0..2 {
        let output = sandbox.run("missing", &[], &["/no/such"]).output()?;
        assert_eq!(output.status, 1, "{}", output.both());
    }
    // A stream's last descriptor may go a moment after its container.
    let mut last = Vec::new();
    until(
        "no more open files of shim, fsd and vmm",
        10 * SECOND,
        || {
            last = count().unwrap_or_default();
            last.len() == files.len() && last.iter().zip(&files).all(|(now, before)| now <= before)
        },
    )
    .map_err(|error| failure(format!("{error}: {files:?}, now {last:?}")))?;
    host.leaves_nothing(&footprint)?;
    assert_eq!(neighbour.exec(&["echo", "lives"])?.text(), "lives");
    neighbour.remove()?;
    sandbox.remove()
}

/// `shareProcessNamespace`, and a debugging container that joins another one's processes.
#[test]
fn process_namespaces_are_shared_on_demand() -> TestResult {
    let host = Host::shared()?;
    let sandbox = CtrPod::start(&host, &[])?;
    let pids = |pid: i32| format!("pid:/proc/{pid}/ns/pid");
    let shared = pids(sandbox.pid());
    let one = sandbox.container("one", &["--with-ns", &shared], &["sleep", "1111"])?;
    let two = sandbox.container("two", &["--with-ns", &shared], &["sleep", "2222"])?;
    let mut parts = Parts::new();
    parts.run("each other's processes", || {
        let list = two.exec(&["ps", "-o", "args"])?.text();
        for command in ["sleep 1111", "sleep 2222"] {
            assert!(list.contains(command), "no {command:?} in: {list}");
        }
        Ok(())
    });
    // PID 1 is the pod's, and reaps orphans.
    parts.run("PID 1", || {
        let script = "(sleep 0.1 &) ; sleep 1; ps -o stat | grep -c ^Z || true";
        assert_eq!(two.exec(&["sh", "-c", script])?.text(), "0");
        assert!(
            !one.exec(&["sh", "-c", "readlink /proc/1/exe; echo $$"])?
                .text()
                .ends_with("\n1")
        );
        Ok(())
    });
    parts.run("a container that debugs another", || {
        let own = sandbox.container("own", &[], &["sleep", "3333"])?;
        let (_, pid) = own.status()?;
        let target = pids(pid);
        let list = sandbox
            .run("debug", &["--with-ns", &target], &["ps", "-o", "pid,args"])
            .ok()?
            .text();
        assert!(list.contains("1 sleep 3333"), "{list}");
        assert!(!list.contains("sleep 1111"), "{list}");
        own.remove()
    });
    parts.run("the pod's end", || {
        for pod in [two, one] {
            pod.remove()?;
        }
        sandbox.remove()
    });
    parts.end()
}

/// A pod with users of its own, as Kubernetes makes one for `hostUsers: false`: its containers join
/// the sandbox's user namespace, to which everything else that they share belongs. Mounts can be
/// joined, too. A namespace of no container of the pod is refused by its field.
#[test]
fn users_and_mounts_are_shared_on_demand() -> TestResult {
    let host = Host::shared()?;
    let map = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
    let sandbox = CtrPod::start(&host, &[&map[..], &["--hostname", "mapped"]].concat())?;
    let users = |pid: i32| format!("user:/proc/{pid}/ns/user");
    let mounts = |pid: i32| format!("mount:/proc/{pid}/ns/mnt");
    let shared = users(sandbox.pid());
    let mapped = [&map[..], &["--with-ns", &shared]].concat();
    let one = sandbox.container("one", &mapped, &["sleep", "1111"])?;
    // Its root may do to the network what a root may: the network belongs to its users.
    let script = "cat /proc/self/uid_map; id -u; hostname; stat -c %u /dev/mqueue
        ping -c 1 -W 20 127.0.0.1 >/dev/null && echo pinged; httpd -p 127.0.0.1:80 && echo bound
        echo of one >/tmp/file; readlink /proc/self/ns/user; readlink /proc/self/ns/net";
    let said = one.exec_call(&[], &["sh", "-c", script]).ok()?.text();
    let (first, links) = said
        .split_once("bound\n")
        .ok_or_else(|| failure(said.clone()))?;
    let words: Vec<_> = first.split_whitespace().collect();
    assert_eq!(
        words,
        ["0", "100000", "65536", "0", "mapped", "0", "pinged"]
    );

    let (_, pid) = one.status()?;
    // Its /proc tells of its own processes alone.
    let (of_one, beside) = (mounts(pid), format!("pid:/proc/{pid}/ns/pid"));
    let options = [&mapped[..], &["--with-ns", &of_one, "--with-ns", &beside]].concat();
    let script = "readlink /proc/self/ns/user; readlink /proc/self/ns/net; cat /tmp/file; echo left >/tmp/left";
    let said = sandbox.run("debug", &options, &["sh", "-c", script]);
    assert_eq!(said.ok()?.text(), format!("{}\nof one", links.trim()));
    assert_eq!(one.exec(&["cat", "/tmp/left"])?.text(), "left");

    // A container that doesn't join them has the machine's own users, in the same network.
    let plain = sandbox.container("plain", &[], &["sleep", "2222"])?;
    let script = "readlink /proc/self/ns/user; readlink /proc/self/ns/net";
    let said = plain.exec(&["sh", "-c", script])?.text();
    let (user, network) = said.split_once('\n').unwrap_or_default();
    assert!(
        !links.contains(user) && links.contains(network),
        "{said}, {links}"
    );

    let (_, pid) = plain.status()?;
    let (foreign, none) = (mounts(1), users(pid));
    for (namespace, text) in [
        (
            &foreign,
            "linux.namespaces of type mount with path /proc/1/ns/mnt",
        ),
        (&none, "linux.namespaces[user].path"),
    ] {
        let output = sandbox.run("refused", &["--with-ns", namespace], &["true"]);
        let output = output.output()?;
        assert_ne!(output.status, 0, "{namespace}");
        if !is_oracle() {
            assert!(output.error_text().contains(text), "{}", output.both());
        }
    }
    for pod in [plain, one] {
        pod.remove()?;
    }
    sandbox.remove()
}

/// One container runs out of memory. The OOM is told before its exit, and the others live.
#[test]
fn one_container_out_of_memory_spares_the_others() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let sandbox = CtrPod::start(&host, &[])?;
    let neighbour = sandbox.container("neighbour", &[], &["sleep", "1000"])?;
    let hungry = sandbox.container(
        "hungry",
        &["--memory-limit", "33554432"],
        &["tail", "/dev/zero"],
    )?;
    let exit = events.exit(hungry.id(), hungry.id(), 60 * SECOND)?;
    assert_eq!(exit.status(), 137);
    let topics: Vec<_> = events
        .of(hungry.id())
        .into_iter()
        .map(|event| event.topic)
        .filter(|topic| topic == "/tasks/oom" || topic == "/tasks/exit")
        .collect();
    assert_eq!(topics, ["/tasks/oom", "/tasks/exit"]);
    assert_eq!(neighbour.exec(&["echo", "lives"])?.text(), "lives");
    for pod in [hungry, neighbour] {
        pod.remove()?;
    }
    sandbox.remove()
}

/// CRI deletes the sandbox container last and then removes the network. When that call is answered
/// the VM is gone, even if a container was left over.
#[test]
fn the_sandboxs_end_is_the_pods() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    let events = host.events()?;
    let sandbox = CtrPod::start(&host, &[])?;
    let left = sandbox.container("left", &[], &["sleep", "1000"])?;
    let vmm = sandbox.first().process("vmm")?;
    sandbox.remove()?;
    assert!(!vmm.is_alive(), "the VMM outlives its sandbox");
    assert_eq!(
        events.exit(left.id(), left.id(), 10 * SECOND)?.status(),
        137
    );
    left.remove()?;
    drop(events);
    host.leaves_nothing(&before)
}

/// The sandbox container is a placeholder: it answers like any other, and costs the guest no
/// process.
#[test]
fn the_sandbox_container_runs_nothing() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let sandbox = CtrPod::start(&host, &[])?;
    assert_eq!(sandbox.first().status()?.0, "RUNNING");
    let metrics = host
        .ctr(["task", "metrics", "--format", "json", sandbox.first().id()])
        .ok()?
        .text();
    let metrics: serde_json::Value = serde_json::from_str(&metrics)?;
    let pids = &metrics["pids"]["current"];
    assert!(pids.is_null() || *pids == 0, "{metrics}");
    let refused = sandbox.first().exec(&["true"])?;
    assert_ne!(refused.status, 0, "an exec in a placeholder ran");
    sandbox.remove()
}

/// The VM is as large as kubelet's annotations say; a bad number is refused by its annotation.
#[test]
fn a_pods_size_comes_from_its_annotations() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let size = |memory: &str, quota: &str| {
        [
            format!("{SANDBOX_MEMORY}={memory}"),
            format!("{SANDBOX_CPU_QUOTA}={quota}"),
            format!("{SANDBOX_CPU_PERIOD}=100000"),
        ]
    };
    let start = |size: &[String; 3]| {
        let mut options = Vec::new();
        for annotation in size {
            options.extend(["--annotation", annotation.as_str()]);
        }
        CtrPod::start(&host, &options)
    };
    let mut parts = Parts::new();
    parts.run("a size", || {
        let sandbox = start(&size("536870912", "150000"))?;
        let script = "nproc; grep MemTotal /proc/meminfo";
        let text = sandbox
            .run("sized", &[], &["sh", "-c", script])
            .ok()?
            .text();
        let mut words = text.split_whitespace();
        let cpus: usize = words.next().unwrap_or_default().parse()?;
        let online = std::thread::available_parallelism()?.get();
        assert_eq!(cpus, 2.min(online), "{text}");
        let kib: u64 = words.nth(1).unwrap_or_default().parse()?;
        // The pod's 512 MiB must fit beside the guest's own needs, with little more.
        assert!((560_000..=800_000).contains(&kib), "{text}");
        sandbox.remove()
    });
    parts.run("a bad number", || match start(&size("lots", "1000")) {
        Ok(_) => Err(failure("a sandbox with \"lots\" of memory started")),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(SANDBOX_MEMORY), "{text}");
            Ok(())
        }
    });
    parts.end()
}
