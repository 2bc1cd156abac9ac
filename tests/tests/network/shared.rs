//! Containers without a network of their own: one shares another's, one has an empty namespace.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::thread;

use kata_like_tests::namespace::Namespace;
use kata_like_tests::{CtrContainer, Host, TestResult, failure, is_oracle, kata_like_only};
use rustix::process::Signal;

use crate::PATIENCE;

/// How many of these pods have a virtual machine.
fn machines(pods: &[CtrContainer]) -> usize {
    let has_one = |pod: &&CtrContainer| pod.state_folder().exists();
    pods.iter().filter(has_one).count()
}

/// The network claim: the file that says which pod a network namespace belongs to.
fn lock_of(namespace: &Namespace) -> TestResult<PathBuf> {
    let about = fs::metadata(namespace.path())?;
    let name = format!("network:{}:{}", about.dev(), about.ino());
    Ok(PathBuf::from("/run/kata-like").join(name))
}

/// Says hello through a server on the loopback of another container of the network.
fn hears_hello(pod: &CtrContainer, port: u16) -> TestResult {
    let script = format!(
        "for try in 1 2 3 4 5; do echo hello | nc -w 20 127.0.0.1 {port} && break; sleep 1; done"
    );
    let seen = pod.exec(&["sh", "-c", &script])?;
    match seen.text().contains("hello") {
        true => Ok(()),
        false => Err(failure(format!("no answer: {}", seen.both()))),
    }
}

fn echo_server(port: u16) -> String {
    format!("while :; do nc -l -p {port} -e cat; done")
}

/// Two containers that get one namespace at once share it, whoever comes first. So does one that
/// gets it while the first one's pod is being made. In the end there is room for a new pod in it.
#[test]
fn containers_that_start_at_once_share_a_network() -> TestResult {
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    let before = host.footprint();
    for round in 0..2 {
        let start = |port: u16| {
            let (option, server) = (inner.option(), echo_server(port));
            let command = ["sh", "-c", server.as_str()];
            let started = host.start(
                &format!("at-once-{round}"),
                &["--with-ns", &option],
                &command,
            );
            started.map_err(|error| error.to_string())
        };
        let (one, other) = thread::scope(|scope| {
            let other = scope.spawn(|| start(6001));
            (start(6000), other.join())
        });
        let other = other.map_err(|_| failure("a thread panicked"))?;
        let pods = [one.map_err(failure)?, other.map_err(failure)?];
        hears_hello(&pods[0], 6001)?;
        hears_hello(&pods[1], 6000)?;
        if !is_oracle() {
            assert_eq!(machines(&pods), 1);
            assert!(lock_of(&inner)?.exists());
        }
        for pod in pods {
            pod.remove()?;
        }
        host.leaves_nothing(&before)?;
    }
    Ok(())
}

/// A dead pod's namespace is free for the next one: the shim was killed a moment ago, or nobody has
/// cleaned up after it.
#[test]
fn the_network_of_a_killed_pod_is_free() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    let (before, lock) = (host.footprint(), lock_of(&inner)?);
    let option = inner.option();
    let start = |stem: &str| host.start(stem, &["--with-ns", &option], &["sleep", "1000"]);
    let (events, killed) = (host.events()?, start("killed")?);
    assert!(lock.exists());
    killed.process("shim")?.signal(Signal::KILL)?;
    let pods = [start("next")?];
    assert_eq!(machines(&pods), 1);
    let text = fs::read_to_string(&lock)?;
    assert!(text.ends_with(pods[0].id()), "{text}");
    // containerd tells of the exit when its `delete` is done.
    events.exit(killed.id(), killed.id(), PATIENCE)?;
    drop(events);
    assert_eq!(fs::read_to_string(&lock)?, text, "it is the next one's");
    killed.remove_container()?;
    for pod in pods {
        pod.remove()?;
    }
    host.leaves_nothing(&before)?;

    fs::write(&lock, text)?;
    fs::set_permissions(&lock, fs::Permissions::from_mode(0o600))?;
    let pods = [start("last")?];
    assert_eq!(machines(&pods), 1);
    for pod in pods {
        pod.remove()?;
    }
    host.leaves_nothing(&before)
}

/// Only a container of the same containerd namespace joins a pod; others are refused at once. Here
/// the test has the claim, as the pod's shim would.
#[test]
fn the_network_of_a_pod_of_another_of_containerd_s_namespaces_is_refused() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    drop(host.run(&host.name("first"), &[], &["true"]).ok()?); // now /run/kata-like exists
    let (path, before) = (lock_of(&inner)?, host.footprint());
    let mut options = fs::OpenOptions::new();
    let mut lock = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    lock.write_all(b"other:web")?;
    let arguments = ["--with-ns", &inner.option()];
    let refused = host
        .run(&host.name("refused"), &arguments, &["true"])
        .output()?;
    let line = refused.error_text();
    assert!(
        refused.status != 0 && line.contains("pod web in containerd's namespace other"),
        "{}",
        refused.both()
    );
    assert_eq!(fs::read(&path)?, b"other:web");
    fs::remove_file(&path)?;
    host.leaves_nothing(&before)
}

/// `--net container:X`, as Docker (by a file) and nerdctl (by X's pid) give it. The network
/// outlives X.
#[test]
fn containers_share_a_network_on_loopback_too() -> TestResult {
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    inner.ip("link add eth0 type veth peer name far0")?;
    inner.ip("link set eth0 up")?;
    inner.ip("address add 10.77.0.2/24 dev eth0")?;
    let before = host.footprint();
    let server = ["sh", "-c", "while :; do nc -l -p 6000 -e cat; done"];
    let first = host.start("x", &["--with-ns", &inner.option()], &server)?;
    let by_pid = format!("network:/proc/{}/ns/net", first.status()?.1);
    let script = "for try in 1 2 3 4 5; do echo hello | nc -w 20 127.0.0.1 6000 && break; sleep 1; done; ip -o -4 addr show eth0";
    let mut others = Vec::new();
    for option in [inner.option(), by_pid] {
        let other = host.start("y", &["--with-ns", &option], &["sleep", "1000"])?;
        let seen = other.exec(&["sh", "-c", script])?;
        let text = seen.text();
        assert!(
            text.contains("hello") && text.contains("10.77.0.2/24"),
            "{}",
            seen.both()
        );
        others.push(other);
    }
    first.remove()?;
    for other in others {
        let seen = other.exec(&["ip", "-o", "-4", "addr", "show", "eth0"])?;
        assert!(seen.text().contains("10.77.0.2/24"), "{}", seen.both());
        other.remove()?;
    }
    host.leaves_nothing(&before)
}

/// `--net none`, and a pod that nobody gives a network: there is loopback, and nothing else.
#[test]
fn an_empty_namespace_is_a_network_too() -> TestResult {
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    let before = host.footprint();
    let script = "ls /sys/class/net; echo hello >/tmp/x; nc -l -p 6000 </tmp/x >/dev/null & sleep 1; nc -w 20 127.0.0.1 6000 </dev/null";
    let given = ["--with-ns", &inner.option()];
    for options in [&[], given.as_slice()] {
        let seen = host
            .run(&host.name("empty"), options, &["sh", "-c", script])
            .ok()?;
        let names: Vec<_> = seen.text().split_whitespace().map(str::to_owned).collect();
        // Under runc loopback of a new one is down.
        let up = options.is_empty() && kata_like_tests::is_oracle();
        match up {
            true => assert_eq!(names, ["lo"]),
            false => assert_eq!(names, ["lo", "hello"], "{}", seen.both()),
        }
    }
    host.leaves_nothing(&before)
}
