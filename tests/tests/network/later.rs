//! What comes and goes in the pod's namespace after its first container has started.

use std::thread;
use std::time::Duration;

use kata_like_tests::namespace::{Namespace, pattern};
use kata_like_tests::process::until;
use kata_like_tests::{Host, TestResult, failure, kata_like_only};

use crate::{PATIENCE, connect, echoed};

/// As `docker network connect` does: an interface with an address and a route, twice, for its slot must be free
/// again; then more than there are slots. What can't be joined is named in the log.
#[test]
fn interfaces_that_come_later_are_there_until_they_go() -> TestResult {
    kata_like_only!(); // under runc there is nothing that could be missing
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
    thread::sleep(Duration::from_secs(3)); // longer than a settled namespace is looked at again
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
