//! Containers without a network of their own: one that shares another's, and one whose namespace is empty.

use kata_like_tests::namespace::Namespace;
use kata_like_tests::{Host, TestResult};

/// `--net container:X`, as Docker (by a file) and nerdctl (by X's pid) give it. The network outlives X.
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
        let up = options.is_empty() && kata_like_tests::is_oracle(); // under runc loopback of a new one is down
        match up {
            true => assert_eq!(names, ["lo"]),
            false => assert_eq!(names, ["lo", "hello"], "{}", seen.both()),
        }
    }
    host.leaves_nothing(&before)
}
