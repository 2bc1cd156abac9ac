//! Sysctls, interfaces, addresses and routes: each sees what came before it, as under runc.

use std::fs;

use kata_like_tests::namespace::Namespace;
use kata_like_tests::process::until;
use kata_like_tests::rootfs::{Rootfs, join_namespace};
use kata_like_tests::{Host, TestResult, failure, kata_like_only};
use serde_json::json;

use crate::PATIENCE;

/// Both families and a route of each on eth0.
fn interface(inner: &Namespace, far: &Namespace) -> TestResult {
    // A new namespace takes it from a host that another test may have made a router.
    inner.inside(|| Ok(fs::write("/proc/sys/net/ipv4/ip_forward", "0")?))?;
    let peer = format!("peer name far0 netns {}", far.name());
    inner.ip(&format!("link add eth0 type veth {peer}"))?;
    far.ip("link set far0 up")?;
    for step in [
        "link set eth0 up",
        "address add 10.77.0.2/24 dev eth0",
        "address add fd77::2/64 dev eth0 nodad",
        "route add default via 10.77.0.1 dev eth0",
        "route add default via fd77::1 dev eth0",
    ] {
        inner.ip(step)?;
    }
    Ok(())
}

const LOOK: &str = "cd /proc/sys/net; head ipv?/conf/eth0/forwarding ipv6/conf/*/disable_ipv6 \
    ipv6/conf/*/hop_limit ipv4/neigh/eth0/base_reachable_time_ms ipv4/ip_default_ttl; \
    ip -o addr show eth0 | grep -o 'inet.* scope global'; ip route; ip -6 route";

/// The same in the pods of both runtimes, whatever the sysctls are.
#[test]
fn sysctls_find_the_interfaces_as_under_runc() -> TestResult {
    kata_like_only!(); // runs both
    let host = Host::alone()?;
    let far = Namespace::new(&host, "far")?;
    let rootfs = Rootfs::mount(&host)?;
    let before = host.footprint();
    for (what, sysctls) in [
        (
            "of an interface",
            json!({
                "net.ipv4.conf.eth0.forwarding": "1",
                "net.ipv4.neigh.eth0.base_reachable_time_ms": "12345",
                "net.ipv4.ip_default_ttl": "77",
            }),
        ),
        (
            "IPv6 is off",
            json!({
                "net.ipv6.conf.all.disable_ipv6": "1",
                "net.ipv6.conf.default.disable_ipv6": "1",
            }),
        ),
        (
            "of interfaces to come",
            json!({
                "net.ipv6.conf.default.disable_ipv6": "1",
                "net.ipv6.conf.default.hop_limit": "33",
            }),
        ),
    ] {
        let mut seen = Vec::new();
        for runtime in ["io.containerd.runc.v2", "io.containerd.kata-like.v2"] {
            let inner = Namespace::new(&host, "pod")?;
            interface(&inner, &far)?;
            let mut spec = rootfs.spec(&["sh", "-c", LOOK])?;
            spec["linux"]["sysctl"] = sysctls.clone();
            join_namespace(&mut spec, "network", &inner.path().display().to_string());
            let how = ["--rm", "--runtime", runtime];
            let run = rootfs.run(&how, &host.name("sysctls"), &spec)?;
            seen.push(run.ok()?.text());
        }
        assert!(seen[0].contains("10.77.0.2"), "{what}: {}", seen[0]);
        assert_eq!(seen[1], seen[0], "{what}");
    }
    host.leaves_nothing(&before)
}

/// An interface that comes later inherits, and has no address that it may not have.
#[test]
fn a_later_interface_has_no_ipv6_where_that_is_off() -> TestResult {
    kata_like_only!(); // under runc the host's own namespace refuses the address
    let host = Host::alone()?;
    let (inner, far) = (Namespace::new(&host, "pod")?, Namespace::new(&host, "far")?);
    let rootfs = Rootfs::mount(&host)?;
    let mut spec = rootfs.spec(&["sleep", "1000"])?;
    spec["linux"]["sysctl"] = json!({"net.ipv6.conf.default.disable_ipv6": "1"});
    join_namespace(&mut spec, "network", &inner.path().display().to_string());
    let pod = rootfs.start(&host.name("later"), &spec)?;
    interface(&inner, &far)?;
    let mut last = String::new();
    let look = ["sh", "-c", "ip -o addr; ip route; ip -6 route"];
    until("the route of eth0", PATIENCE, || {
        last = pod
            .exec(&look)
            .map_or_else(|error| error.to_string(), |seen| seen.both());
        last.contains("default via 10.77.0.1")
    })
    .map_err(|error| failure(format!("{error}: {last}")))?;
    assert!(!last.contains("fd77:"), "{last}");
    pod.remove()
}

/// The start fails, and says which sysctl there is no interface for.
#[test]
fn a_sysctl_of_no_interface_is_named() -> TestResult {
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    let rootfs = Rootfs::mount(&host)?;
    let mut spec = rootfs.spec(&["true"])?;
    spec["linux"]["sysctl"] = json!({"net.ipv4.conf.eth7.forwarding": "1"});
    join_namespace(&mut spec, "network", &inner.path().display().to_string());
    let before = host.footprint();
    let output = rootfs
        .run(&["--rm"], &host.name("sysctl"), &spec)?
        .output()?;
    assert_ne!(output.status, 0, "{}", output.both());
    assert!(output.error_text().contains("eth7"), "{}", output.both());
    host.leaves_nothing(&before)
}
