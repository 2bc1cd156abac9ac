//! A start that failed because of the network, tried again.

use kata_like_tests::namespace::{Namespace, pattern};
use kata_like_tests::task::Task;
use kata_like_tests::task_api::{done, refused};
use kata_like_tests::{CtrContainer, Host, IMAGE, TestResult, kata_like_only, runtime};

use crate::{connect, echoed};

const BAD_ROUTE: &str = "route add 10.71.0.0/16 via 10.77.0.1 src 10.70.0.2";

/// What was joined before the failing part is undone, and joined anew in the same machine.
#[test]
fn a_start_that_the_network_has_failed_works_once_that_is_right() -> TestResult {
    kata_like_only!(); // under runc nothing can fail here
    let host = Host::alone()?;
    let (inner, far) = (Namespace::new(&host, "pod")?, Namespace::new(&host, "far")?);
    for step in [
        &format!(
            "link add eth0 type veth peer name far0 netns {}",
            far.name()
        ),
        "address add 10.77.0.2/24 dev eth0",
        "link set eth0 up",
        // The guest has no addresses of the loopback, and so refuses the route when it has the
        // interface already.
        "address add 10.70.0.2/32 dev lo",
        BAD_ROUTE,
    ] {
        inner.ip(step)?;
    }
    let untouched = inner.look()?;
    far.ip("address add 10.77.0.1/24 dev far0")?;
    far.ip("link set far0 up")?;
    let before = host.footprint();

    let (id, runtime, network) = (host.name("again"), runtime(), inner.option());
    let all = ["run", "-d", "--runtime", &runtime, "--with-ns", &network];
    let server = ["sh", "-c", "while :; do nc -l -p 6000 -e cat; done"];
    let failed = host
        .ctr(all.iter().chain(&[IMAGE, id.as_str()]).chain(&server))
        .output()?;
    let pod = CtrContainer::new(&host, id);
    assert!(
        failed.error_text().contains("add route 10.71.0.0/16"),
        "{}",
        failed.both()
    );
    assert_eq!(inner.look()?, untouched);

    // And a part that is refused before anything is joined.
    inner.ip("route delete 10.71.0.0/16")?;
    for step in [
        "tuntap add dev wg7 mode tun",
        "address add 10.70.0.3/24 dev wg7",
        "link set wg7 up",
    ] {
        inner.ip(step)?;
    }
    let task = Task::of(&host, pod.id())?;
    let text = refused(task.start("")?)?.text;
    assert!(text.contains("interface wg7"), "{text}");
    inner.ip("link delete wg7")?;
    done(task.start("")?)?;
    echoed(connect(&far, "10.77.0.2:6000")?, &pattern(100_000))?;
    drop(task);
    pod.remove()?;
    host.leaves_nothing(&before)
}
