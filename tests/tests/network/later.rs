//! Changes in the pod's namespace after its first container has started.

use std::thread;
use std::time::Duration;

use kata_like_tests::namespace::{Namespace, pattern};
use kata_like_tests::process::until;
use kata_like_tests::{Host, TestResult, failure, kata_like_only};

use crate::{PATIENCE, connect, echoed};

/// As `docker network connect` does: an interface with an address and a route, twice, since its
/// slot must become free; then more than there are slots. The log names what can't be joined.
#[test]
fn interfaces_that_come_later_are_there_until_they_go() -> TestResult {
    kata_like_only!(); // under runc nothing could be missing
    let host = Host::alone()?;
    let (inner, far) = (Namespace::new(&host, "pod")?, Namespace::new(&host, "far")?);
    let add = |number: u32| -> TestResult {
        let peer = format!("peer name far{number} netns {}", far.name());
        for step in [
            format!("link add later{number} mtu 1400 type veth {peer}"),
            format!("address add 10.9{number}.0.2/24 dev later{number}"),
            format!("link set later{number} up"),
            format!("route add 10.19{number}.0.0/16 via 10.9{number}.0.1 dev later{number}"),
        ] {
            inner.ip(&step)?;
        }
        far.ip(&format!("address add 10.9{number}.0.1/24 dev far{number}"))?;
        far.ip(&format!("link set far{number} up")).map(drop)
    };
    add(0)?;
    let before = host.footprint();
    let server = ["sh", "-c", "while :; do nc -l -p 6000 -e cat; done"];
    let pod = host.start("later", &["--with-ns", &inner.option()], &server)?;
    let sees = |wanted: &str, is_there: bool| {
        let mut last = String::new();
        until(wanted, PATIENCE, || {
            let seen = pod.exec(&["sh", "-c", "ip -o -4 addr; ip route"]);
            last = seen.map_or_else(|error| error.to_string(), |seen| seen.both());
            last.contains("10.90.0.2/24") && last.contains(wanted) == is_there
        })
        .map_err(|error| failure(format!("{error} ({is_there}): {last}")))
    };
    let untouched = inner.look()?;
    for address in ["10.91.0.2:6000", "10.91.0.2:6000"] {
        add(1)?;
        sees("10.191.0.0/16 via 10.91.0.1 dev later1", true)?;
        echoed(connect(&far, address)?, &pattern(100_000))?;
        inner.ip("link delete later1")?;
        sees("10.91.0.2", false)?;
        until("the tap has gone", PATIENCE, || {
            inner.look().is_ok_and(|now| now == untouched)
        })?;
    }
    inner.ip("tuntap add dev wg7 mode tun")?;
    inner.ip("address add 10.77.0.2/24 dev wg7")?;
    inner.ip("link set wg7 up")?;
    for number in 1..=8 {
        add(number)?;
    }
    sees("10.97.0.2", true)?;
    for words in [
        "wg7 has come and is left out",
        "later8 has come and is left out",
    ] {
        until(words, PATIENCE, || host.log().contains(words))?;
    }
    thread::sleep(Duration::from_secs(3)); // a settled namespace has been read by then
    assert_eq!(host.log().matches("wg7 has come").count(), 1);
    sees("10.98.0.2", false)?;
    pod.remove()?;
    let taps = inner.look()?;
    assert!(
        !taps.contains("kltap") && !taps.contains("clsact"),
        "{taps}"
    );
    host.leaves_nothing(&before)
}

/// A slow plugin: the guest has the interface long before the interface has its addresses, which
/// then change again. What a container has changed stays.
#[test]
fn what_an_interface_gets_later_is_there_until_it_goes() -> TestResult {
    kata_like_only!(); // under runc nothing could be missing
    let host = Host::alone()?;
    let (inner, far) = (Namespace::new(&host, "pod")?, Namespace::new(&host, "far")?);
    inner.ip(&format!(
        "link add eth0 mtu 1400 type veth peer name far0 netns {}",
        far.name()
    ))?;
    inner.ip("link set eth0 up")?;
    far.ip("address add 10.77.0.1/24 dev far0")?;
    far.ip("link set far0 up")?;
    let before = host.footprint();
    let server = ["sh", "-c", "while :; do nc -l -p 6000 -e cat; done"];
    let options = ["--cap-add", "CAP_NET_ADMIN", "--with-ns", &inner.option()];
    let pod = host.start("changes", &options, &server)?;
    let script = "ip -o addr; ip route; ip -6 route; cat /proc/net/arp; echo mtu $(cat /sys/class/net/eth0/mtu)";
    let sees = |wanted: &[&str], unwanted: &[&str]| {
        let mut last = String::new();
        until("the guest has followed", PATIENCE, || {
            let seen = pod.exec(&["sh", "-c", script]);
            last = seen.map_or_else(|error| error.to_string(), |seen| seen.both());
            wanted.iter().all(|words| last.contains(words))
                && !unwanted.iter().any(|words| last.contains(words))
        })
        .map_err(|error| failure(format!("{error}: {wanted:?}, not {unwanted:?}: {last}")))
    };
    sees(&["mtu 1400"], &["10.77.0.2"])?;
    thread::sleep(Duration::from_secs(3)); // the namespace has settled

    let steps = |steps: &[&str]| steps.iter().try_for_each(|step| inner.ip(step).map(drop));
    steps(&[
        "link set eth0 mtu 1300",
        "address add 10.77.0.2/24 dev eth0",
        "address add fd77::2/64 dev eth0 nodad",
        "route add 10.99.0.0/16 via 10.77.0.1",
        "route add fd99::/64 via fd77::1",
        "neighbour add 10.77.0.9 lladdr 02:00:00:00:08:09 dev eth0 nud permanent",
    ])?;
    let (v4, v6) = ("10.99.0.0/16 via 10.77.0.1", "fd99::/64 via fd77::1");
    let arp = "02:00:00:00:08:09";
    sees(
        &["10.77.0.2/24", "fd77::2/64", v4, v6, arp, "mtu 1300"],
        &[],
    )?;
    echoed(connect(&far, "10.77.0.2:6000")?, &pattern(100_000))?;

    let own = "10.55.0.0/16 via 10.77.0.1";
    pod.exec(&["sh", "-c", &format!("ip route add {own}")])?;
    steps(&[
        "route replace 10.99.0.0/16 via 10.77.0.9",
        "address add 10.77.0.3/24 dev eth0",
        "neighbour replace 10.77.0.9 lladdr 02:00:00:00:08:0a dev eth0 nud permanent",
    ])?;
    let replaced = "10.99.0.0/16 via 10.77.0.9";
    sees(
        &[replaced, "10.77.0.3/24", "02:00:00:00:08:0a", own],
        &[v4, arp],
    )?;

    steps(&[
        "route delete 10.99.0.0/16",
        "route delete fd99::/64",
        "address delete 10.77.0.3/24 dev eth0",
        "address delete fd77::2/64 dev eth0",
        "neighbour delete 10.77.0.9 dev eth0",
    ])?;
    let gone = [replaced, v6, "10.77.0.3", "fd77::2/64", "02:00:00:00:08:0a"];
    sees(&["10.77.0.2/24", own], &gone)?;
    echoed(connect(&far, "10.77.0.2:6000")?, &pattern(100_000))?;
    pod.remove()?;
    host.leaves_nothing(&before)
}
