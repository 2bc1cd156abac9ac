//! Routes and neighbours of every kind: the guest has them as the namespace on the host has them.

use std::process::Command;

use kata_like_tests::namespace::Namespace;
use kata_like_tests::{Call, Host, TestResult, userland};

/// iproute2's view of routes and neighbours. busybox has an `ip` of its own, which its shell
/// prefers.
const LOOK: &str = "$ip -d -o route show table all; $ip -d -o -6 route show table all; \
    $ip -o neighbour show nud permanent; $ip -o -6 neighbour show nud permanent";

/// All lines except those that every kernel has.
fn others_than_the_kernel_s(text: &str) -> Vec<String> {
    // The guest has no next-hop objects, only their content.
    let is_object = |line: &str| line.trim_start().starts_with("nh_info");
    let is_own = |line: &str| line.contains("table local") && line.contains("proto kernel");
    let lines = text
        .lines()
        .filter(|line| !is_own(line) && !is_object(line));
    let mut plain: Vec<_> = lines
        .map(|line| {
            let mut words: Vec<&str> = line.split_whitespace().collect();
            if let Some(place) = words.iter().position(|word| *word == "nhid") {
                words.drain(place..(place + 2).min(words.len()));
            }
            words.join(" ")
        })
        .collect();
    plain.sort();
    plain
}

#[test]
fn routes_and_neighbours_are_what_they_are_on_the_host() -> TestResult {
    let host = Host::alone()?;
    let (inner, far) = (Namespace::new(&host, "pod")?, Namespace::new(&host, "far")?);
    for number in [0, 1] {
        let peer = format!("peer name far{number} netns {}", far.name());
        inner.ip(&format!("link add eth{number} type veth {peer}"))?;
        inner.ip(&format!("link set eth{number} up"))?;
        far.ip(&format!("link set far{number} up"))?;
    }
    for step in [
        "address add 10.77.0.2/24 dev eth0",
        "address add fd77::2/64 dev eth0 nodad",
        "address add 10.88.0.2/24 dev eth1",
        "address add fd88::2/64 dev eth1 nodad",
        "route add default via 10.77.0.1 dev eth0 metric 7 src 10.77.0.2",
        "route add 10.60.0.0/16 proto static nexthop via 10.77.0.1 dev eth0 weight 3 nexthop via 10.88.0.1 dev eth1",
        "nexthop add id 7 via 10.77.0.9 dev eth0",
        "route add 10.61.0.0/16 nhid 7",
        "route add local 10.62.0.0/24 dev lo",
        "route add 10.63.0.0/16 via inet6 fd77::1 dev eth0",
        "route add 10.64.0.0/16 via 10.9.9.9 dev eth1 onlink tos 0x10",
        "route add 10.65.0.0/16 via 10.77.0.1 dev eth0 mtu 1300 advmss 1200 table 77",
        "route add blackhole 10.66.0.0/16",
        "route add unreachable 10.67.0.0/16 metric 5",
        "route add prohibit 10.68.0.0/16",
        "route add throw 10.69.0.0/16 table 100",
        "route add default via fd77::1 dev eth0 metric 9 src fd77::2 pref high",
        "route add fd60::/64 proto static nexthop via fd77::1 dev eth0 weight 2 nexthop via fd88::1 dev eth1",
        "route add local fd62::/64 dev lo",
        "route add fd63::/64 dev eth1 mtu 1300 table 77",
        "route add fd64::/64 via fe80::9 dev eth1 onlink",
        "route add fd65::1/128 via fd88::1 dev eth1",
        "route add blackhole fd66::/64",
        "route add unreachable fd67::/64 metric 5",
        "route add prohibit fd68::/64",
        "route add throw fd69::/64 table 100",
        "neighbour add 10.77.0.9 lladdr 02:00:00:00:08:09 dev eth0 nud permanent",
        "neighbour add fd88::9 lladdr 02:00:00:00:08:19 dev eth1 nud permanent",
    ] {
        inner.ip(step)?;
    }
    let mut look = Command::new("ip");
    let script = format!("ip=ip; {LOOK}");
    look.args(["netns", "exec", inner.name(), "sh", "-c", &script]);
    let wanted = others_than_the_kernel_s(&Call::new(look).ok()?.text());
    for part in ["10.60.0.0/16", "10.62.0.0/24", "fd60::/64", "fd88::9"] {
        assert!(
            wanted.iter().any(|line| line.contains(part)),
            "no {part} in {wanted:#?}"
        );
    }
    let before = host.footprint();
    let mut options = userland::options()?;
    options.extend(["--with-ns".to_owned(), inner.option()]);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let script = format!("ip=/usr/bin/ip; {LOOK}");
    let seen = host
        .run(&host.name("routes"), &options, &["sh", "-c", &script])
        .ok()?;
    let found = others_than_the_kernel_s(&seen.text());
    assert_eq!(found, wanted, "{}", seen.both());
    host.leaves_nothing(&before)
}
