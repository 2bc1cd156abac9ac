//! Interfaces of every kind that a plugin makes: layer 2 decides what they are.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::thread;

use kata_like_tests::namespace::{Namespace, pattern};
use kata_like_tests::{Host, Parts, TestResult, failure, kata_like_only};

use crate::{connect, echoed};

/// A tap in the calling thread's namespace, with the end that is not the kernel's.
fn tap(name: &str) -> TestResult<File> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data, of which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose address is live and exclusively
    // ours. The name is shorter than its field, and so ends with a NUL.
    match unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(device),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

/// Answers each ARP request and each ICMP echo request until the interface is gone.
fn answer(mut tap: File) -> std::io::Result<()> {
    const MAC: [u8; 6] = [2, 0, 0, 0, 9, 1];
    let mut bytes = [0; 2000];
    loop {
        let length = tap.read(&mut bytes)?;
        let frame = &mut bytes[..length];
        let swap = |frame: &mut [u8], one: usize, other: usize, length: usize| {
            let (before, behind) = frame.split_at_mut(other);
            before[one..one + length].swap_with_slice(&mut behind[..length]);
        };
        match frame[12..14] {
            [8, 6] if frame[21] == 1 => {
                frame[21] = 2;
                swap(frame, 22, 32, 10); // address and MAC of the asker, and of the asked
                frame[22..28].copy_from_slice(&MAC);
            }
            [8, 0] if frame[23] == 1 && frame[34] == 8 => {
                frame[34] = 0;
                let sum = u32::from(u16::from_be_bytes([frame[36], frame[37]])) + 0x800;
                let sum = (sum & 0xffff) as u16 + (sum >> 16) as u16;
                frame[36..38].copy_from_slice(&sum.to_be_bytes());
                swap(frame, 26, 30, 4);
            }
            _ => continue,
        }
        swap(frame, 0, 6, 6);
        frame[6..12].copy_from_slice(&MAC);
        tap.write_all(frame)?;
    }
}

/// One of each kind, and a dummy.
const KINDS: [&str; 7] = ["mac1", "ip2", "ip3", "vlan4", "br5", "tap6", "dummy7"];

/// Makes an interface of each kind in `inner`. Behind each except the dummy somebody in `outer`
/// answers. `lower` has the interfaces below them, as the host does in reality.
fn one_of_each_kind(inner: &Namespace, lower: &Namespace, outer: &Namespace) -> TestResult {
    for number in 1..=4 {
        let peer = format!("peer name out{number} netns {}", outer.name());
        lower.ip(&format!("link add low{number} type veth {peer}"))?;
        lower.ip(&format!("link set low{number} up"))?;
        outer.ip(&format!("link set out{number} up"))?;
        outer.ip(&format!("address add 10.8{number}.0.1/24 dev out{number}"))?;
    }
    for kind in [
        "mac1 link low1 type macvlan mode bridge",
        "ip2 link low2 type ipvlan mode l2",
        "ip3 link low3 type ipvlan mode l3",
        "vlan4 link low4 type vlan id 7",
    ] {
        let name = kind.split(' ').next().unwrap_or_default();
        lower.ip(&format!("link add {kind}"))?;
        lower.ip(&format!("link set {name} netns {}", inner.name()))?;
    }
    // Peers behind an ipvlan of layer 3 are reached by routes.
    lower.ip("address add 10.83.0.254/24 dev low3")?;
    outer.ip("route add 10.83.0.2/32 via 10.83.0.254 dev out3")?;
    for step in [
        "address delete 10.84.0.1/24 dev out4",
        "link add vlan4 link out4 type vlan id 7",
        "address add 10.84.0.1/24 dev vlan4",
        "link set vlan4 up",
    ] {
        outer.ip(step)?;
    }
    inner.ip("link add br5 type bridge")?;
    inner.ip(&format!(
        "link add port5 type veth peer name out5 netns {}",
        outer.name()
    ))?;
    inner.ip("link set port5 master br5 up")?;
    outer.ip("link set out5 up")?;
    outer.ip("address add 10.85.0.1/24 dev out5")?;
    let device = inner.inside(|| tap("tap6"))?;
    thread::spawn(move || answer(device));
    inner.ip("link add dummy7 type dummy")?;
    for (number, name) in (1..).zip(KINDS) {
        inner.ip(&format!("address add 10.8{number}.0.2/24 dev {name}"))?;
        inner.ip(&format!("link set {name} up"))?;
    }
    Ok(())
}

#[test]
fn interfaces_of_all_kinds_carry_traffic() -> TestResult {
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    let (lower, outer) = (Namespace::new(&host, "low")?, Namespace::new(&host, "out")?);
    one_of_each_kind(&inner, &lower, &outer)?;
    let (before, untouched) = (host.footprint(), inner.look()?);

    let server = ["sh", "-c", "while :; do nc -l -p 6000 -e cat; done"];
    let pod = host.start("kinds", &["--with-ns", &inner.option()], &server)?;
    let script = "for number in 1 2 3 4 5 6; do \
        ping -c 1 -W 20 10.8$number.0.1 >/dev/null && echo answer $number; done; \
        ip -o -4 addr; ip -o link";
    let seen = pod.exec(&["sh", "-c", script])?;
    let text = seen.text();
    let mut parts = Parts::new();
    for (number, name) in (1..).zip(KINDS) {
        parts.run(name, || {
            let address = format!("10.8{number}.0.2/24");
            let has_address = |line: &str| line.contains(name) && line.contains(&address);
            assert!(text.lines().any(has_address), "no {address} in {text}");
            let answered = name == "dummy7" || text.contains(&format!("answer {number}"));
            assert!(answered, "nobody answers behind {name}: {}", seen.both());
            Ok(())
        });
    }
    // And from outside, checksums and segments included.
    for address in [
        "10.81.0.2:6000",
        "10.82.0.2:6000",
        "10.83.0.2:6000",
        "10.84.0.2:6000",
        "10.85.0.2:6000",
    ] {
        parts.run(address, || {
            echoed(connect(&outer, address)?, &pattern(100_000))
        });
    }
    parts.run("the pod's end", || {
        pod.remove()?;
        assert_eq!(inner.look()?, untouched);
        host.leaves_nothing(&before)
    });
    parts.end()
}

/// A bond over two interfaces of the namespace, one of which fails, and a macvtap that nobody
/// reads.
#[test]
fn a_bond_and_a_macvtap_carry_traffic() -> TestResult {
    kata_like_only!(); // under runc only the reader of a macvtap receives anything
    let host = Host::alone()?;
    let (inner, outer) = (Namespace::new(&host, "pod")?, Namespace::new(&host, "out")?);
    let lower = Namespace::new(&host, "low")?;
    for step in [
        "link add br1 type bridge",
        "link set br1 up",
        "address add 10.81.0.1/24 dev br1",
    ] {
        outer.ip(step)?;
    }
    inner.ip("link add bond1 type bond mode active-backup miimon 100")?;
    for name in ["a", "b"] {
        let peer = format!("peer name out{name} netns {}", outer.name());
        inner.ip(&format!("link add port{name} type veth {peer}"))?;
        inner.ip(&format!("link set port{name} master bond1"))?;
        outer.ip(&format!("link set out{name} master br1 up"))?;
    }
    let peer = format!("peer name out2 netns {}", outer.name());
    lower.ip(&format!("link add low2 type veth {peer}"))?;
    lower.ip("link set low2 up")?;
    lower.ip("link add tap2 link low2 type macvtap mode bridge")?;
    lower.ip(&format!("link set tap2 netns {}", inner.name()))?;
    outer.ip("link set out2 up")?;
    outer.ip("address add 10.82.0.1/24 dev out2")?;
    for (number, name) in [(1, "bond1"), (2, "tap2")] {
        inner.ip(&format!("address add 10.8{number}.0.2/24 dev {name}"))?;
        inner.ip(&format!("link set {name} up"))?;
    }
    let (before, untouched) = (host.footprint(), inner.look()?);

    let server = ["sh", "-c", "while :; do nc -l -p 6000 -e cat; done"];
    let pod = host.start("bond", &["--with-ns", &inner.option()], &server)?;
    let script = "ls /sys/class/net; for number in 1 2; do \
        ping -c 1 -W 20 10.8$number.0.1 >/dev/null && echo answer $number; done";
    let seen = pod.exec(&["sh", "-c", script])?;
    let words: Vec<_> = seen.text().split_whitespace().map(str::to_owned).collect();
    let wanted = ["bond1", "lo", "tap2", "answer", "1", "answer", "2"];
    assert_eq!(words, wanted, "{}", seen.both());
    for address in ["10.81.0.2:6000", "10.82.0.2:6000"] {
        echoed(connect(&outer, address)?, &pattern(100_000))
            .map_err(|error| failure(format!("{address}: {error}")))?;
    }
    outer.ip("link set outa down")?;
    echoed(connect(&outer, "10.81.0.2:6000")?, &pattern(100_000))?;
    pod.remove()?;
    assert_eq!(inner.look()?, untouched);
    host.leaves_nothing(&before)
}

/// Nothing that could be redirected comes in on an ipvlan of mode l3s, or on a VLAN whose lower
/// interface is joined itself.
#[test]
fn an_interface_that_can_t_be_joined_is_refused_by_its_name() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    for (steps, wanted) in [
        (
            ["link add ip7 link low type ipvlan mode l3s"].as_slice(),
            ["interface ip7", "l3s"],
        ),
        (
            &[
                "link set low up",
                "address add 10.76.0.2/24 dev low",
                "link add v7 link low type vlan id 7",
            ],
            ["interface v7", "upon low"],
        ),
    ] {
        let inner = Namespace::new(&host, "pod")?;
        inner.ip("link add low type veth peer name far")?;
        for step in steps {
            inner.ip(step)?;
        }
        let name = wanted[0].trim_start_matches("interface ");
        inner.ip(&format!("address add 10.77.0.2/24 dev {name}"))?;
        inner.ip(&format!("link set {name} up"))?;
        let untouched = inner.look()?;
        let options = ["--with-ns", &inner.option()];
        let refused = host
            .run(&host.name("refused"), &options, &["true"])
            .output()?;
        let line = refused.error_text();
        let is_named = wanted.iter().all(|words| line.contains(words));
        if refused.status == 0 || !is_named {
            return Err(failure(format!("no {wanted:?} in {}", refused.both())));
        }
        assert_eq!(inner.look()?, untouched);
    }
    Ok(())
}
