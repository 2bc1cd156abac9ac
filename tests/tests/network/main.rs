//! A pod's network: the guest has what the namespace on the host holds, traffic passes both ways,
//! and the namespace stays as it was.
//!
//! All traffic is between namespaces of the test: the pod's, and one at the far end of its
//! interfaces. Everything except what concerns the VM also runs against runc.

mod again;
mod kinds;
mod later;
mod resolver;
mod routes;
mod shared;
mod sysctls;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use kata_like_tests::namespace::{Namespace, pattern};
use kata_like_tests::process::until;
use kata_like_tests::{CtrContainer, Host, Parts, TestResult, failure, is_oracle, kata_like_only};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(60);
const BULK: usize = 4 << 20;

fn patient(stream: &TcpStream) -> TestResult {
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream.set_write_timeout(Some(PATIENCE))?)
}

/// Connects from a namespace as soon as somebody listens.
fn connect(from: &Namespace, address: &'static str) -> TestResult<TcpStream> {
    let mut last = Err(failure("not tried"));
    until("a connection", PATIENCE, || {
        last = from.inside(move || Ok(TcpStream::connect_timeout(&address.parse()?, PATIENCE)?));
        last.is_ok()
    })
    .map_err(|error| failure(format!("{error}: {address}: {last:?}")))?;
    last
}

/// Sends bytes, and reads the same number back.
fn echoed(mut stream: TcpStream, bytes: &[u8]) -> TestResult {
    patient(&stream)?;
    let mut writer = stream.try_clone()?;
    let mut back = vec![0; bytes.len()];
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(bytes));
        stream.read_exact(&mut back)
    })?;
    assert!(back == bytes, "other bytes came back");
    Ok(())
}

/// Accepts one connection, reads `length` bytes, and sends them back.
fn echo_once(listener: &TcpListener, length: usize) -> TestResult {
    let (mut stream, _) = listener.accept()?;
    patient(&stream)?;
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    Ok(stream.write_all(&bytes)?)
}

/// Bytes for each packet, received and sent.
fn bytes_a_packet(namespace: &Namespace, interface: &'static str) -> TestResult<[u64; 2]> {
    let table = namespace.inside(|| Ok(fs::read_to_string("/proc/thread-self/net/dev")?))?;
    let line = table.lines().find_map(|line| {
        let (name, rest) = line.trim().split_once(':')?;
        (name == interface).then_some(rest)
    });
    let line = line.ok_or_else(|| failure(format!("no {interface} in {table}")))?;
    let mut numbers = Vec::new();
    for word in line.split_whitespace() {
        numbers.push(word.parse::<u64>()?);
    }
    Ok([
        numbers[0] / numbers[1].max(1),
        numbers[8] / numbers[9].max(1),
    ])
}

/// An interface with a network, IPv4 and IPv6 (eth0), and one with only an address and a route to a
/// gateway that is in no network and answers no ARP (eth1). Their far ends are in `far`.
fn two_interfaces(inner: &Namespace, far: &Namespace) -> TestResult {
    for (number, mtu) in [(0, 1400), (1, 9000)] {
        inner.ip(&format!(
            "link add eth{number} mtu {mtu} address 02:00:00:00:07:0{number} type veth \
            peer name far{number} mtu {mtu} address 02:00:00:00:08:0{number} netns {}",
            far.name()
        ))?;
        inner.ip(&format!("link set eth{number} up"))?;
        far.ip(&format!("link set far{number} up"))?;
    }
    for step in [
        "address add 10.77.0.2/24 dev eth0",
        "address add fd77::2/64 dev eth0 nodad",
        "route add default via 10.77.0.1 dev eth0 metric 7",
        "route add default via fd77::1 dev eth0",
        "address add 10.88.0.2/32 dev eth1",
        "route add 169.254.1.1 dev eth1 scope link",
        "route add 10.99.0.0/16 via 169.254.1.1 dev eth1 src 10.88.0.2",
        "route add 10.98.0.0/16 via 169.254.9.9 dev eth1 onlink",
        "neighbour add 169.254.1.1 lladdr 02:00:00:00:08:01 dev eth1 nud permanent",
    ] {
        inner.ip(step)?;
    }
    for step in [
        "address add 10.77.0.1/24 dev far0",
        "address add fd77::1/64 dev far0 nodad",
        "address add 10.99.0.1/32 dev far1",
        "route add 10.88.0.2/32 dev far1",
    ] {
        far.ip(step)?;
    }
    Ok(())
}

#[test]
fn a_pod_has_the_network_that_its_namespace_has() -> TestResult {
    let host = Host::alone()?;
    let (inner, far) = (Namespace::new(&host, "pod")?, Namespace::new(&host, "far")?);
    two_interfaces(&inner, &far)?;
    let (before, untouched) = (host.footprint(), inner.look()?);

    let options = ["--with-ns", &inner.option()];
    let server = ["sh", "-c", "while :; do nc -l -p 6000 -e cat; done"];
    let pod = host.start("networked", &options, &server)?;
    let mut parts = Parts::new();
    parts.run("what is configured", || the_guest_has_two_interfaces(&pod));
    parts.run("out of the pod", || bytes_go_out_and_back(&pod, &far));
    // The server takes one after the other.
    for (address, length) in [
        ("10.77.0.2:6000", BULK),
        ("[fd77::2]:6000", 100_000),
        ("10.88.0.2:6000", 100_000),
    ] {
        parts.run(address, || {
            echoed(connect(&far, address)?, &pattern(length))
        });
    }
    // The average packet, acknowledgements included, is longer than the MTU.
    parts.run("the host's counters", || {
        let average = bytes_a_packet(&inner, "eth0")?;
        assert!(average.iter().all(|bytes| *bytes > 1414), "{average:?}");
        Ok(())
    });
    parts.run("the pod's end", || {
        pod.remove()?;
        assert_eq!(inner.look()?, untouched);
        host.leaves_nothing(&before)
    });
    parts.end()
}

fn the_guest_has_two_interfaces(pod: &CtrContainer) -> TestResult {
    let script = "ip addr; ip route; ip -6 route; cd /sys/class/net; \
        echo mtu $(cat eth0/mtu eth1/mtu) mac $(cat eth0/address eth1/address); \
        ping -c 1 -W 30 10.77.0.1 >/dev/null && echo reaches the gateway; \
        ping -c 1 -W 30 -s 8900 10.99.0.1 >/dev/null && echo reaches behind the other; \
        ping -6 -c 1 -W 30 fd77::1 >/dev/null && echo reaches by IPv6";
    let seen = pod.exec(&["sh", "-c", script])?;
    let text = seen.text();
    for wanted in [
        "inet 10.77.0.2/24 ",
        "inet 10.88.0.2/32 ",
        "inet6 fd77::2/64 ",
        "default via 10.77.0.1 dev eth0  metric 7",
        "10.77.0.0/24 dev eth0 scope link",
        "169.254.1.1 dev eth1 scope link",
        "10.99.0.0/16 via 169.254.1.1 dev eth1",
        "10.98.0.0/16 via 169.254.9.9 dev eth1",
        "src 10.77.0.2",
        "src 10.88.0.2",
        "fd77::/64 dev eth0",
        "default via fd77::1 dev eth0",
        "mtu 1400 9000 mac 02:00:00:00:07:00 02:00:00:00:07:01",
        "reaches the gateway",
        "reaches behind the other",
        "reaches by IPv6",
    ] {
        let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let found = text
            .lines()
            .any(|line| plain(line).contains(plain(wanted).as_str()));
        assert!(found, "no {wanted:?} in {}", seen.both());
    }
    Ok(())
}

/// Out of the pod and back.
fn bytes_go_out_and_back(pod: &CtrContainer, far: &Namespace) -> TestResult {
    let listener = far.inside(|| Ok(TcpListener::bind("10.77.0.1:5000")?))?;
    let script = format!(
        "dd if=/dev/urandom of=/tmp/x bs={BULK} count=1 2>/dev/null; md5sum </tmp/x; nc 10.77.0.1 5000 </tmp/x | md5sum"
    );
    let sums = thread::scope(|scope| {
        let server = scope.spawn(|| echo_once(&listener, BULK).map_err(|error| error.to_string()));
        let sums = pod.exec(&["sh", "-c", &script]);
        drop(server.join());
        sums
    })?;
    match sums.text().lines().collect::<Vec<_>>()[..] {
        [one, other] if one == other => {}
        _ => panic!("{}", sums.both()),
    }
    Ok(())
}

/// The shim is killed: `delete` leaves a given namespace as it was.
#[test]
fn a_killed_shim_leaves_the_namespace_as_it_was() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    inner.ip("link add eth0 type veth peer name far0")?;
    inner.ip("link set eth0 up")?;
    inner.ip("address add 10.77.0.2/24 dev eth0")?;
    let (before, untouched) = (host.footprint(), inner.look()?);
    let events = host.events()?;
    let pod = host.start(
        "killed",
        &["--with-ns", &inner.option()],
        &["sleep", "1000"],
    )?;
    let joined = inner.look()?;
    assert!(
        joined.contains("kltap0") && joined.contains("clsact"),
        "{joined}"
    );
    pod.process("shim")?.signal(Signal::KILL)?;
    // containerd tells of the exit when its `delete` is done.
    events.exit(pod.id(), pod.id(), PATIENCE)?;
    drop(events);
    let mut last = String::new();
    until("the namespace is as it was", PATIENCE, || {
        last = inner.look().unwrap_or_default();
        last == untouched
    })
    .map_err(|error| failure(format!("{error}: {last}")))?;
    pod.remove_container()?;
    host.leaves_nothing(&before)
}

/// An interface that can't be joined fails the start by its name, and nothing stays of it.
#[test]
fn an_interface_that_is_not_ethernet_is_refused_by_its_name() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    inner.ip("tuntap add dev wg7 mode tun")?;
    inner.ip("address add 10.77.0.2/24 dev wg7")?;
    let (before, untouched) = (host.footprint(), inner.look()?);
    let options = ["--with-ns", &inner.option()];
    let refused = host
        .run(&host.name("refused"), &options, &["true"])
        .output()?;
    assert_ne!(refused.status, 0);
    let line = refused.error_text();
    for words in ["interface wg7", "of kind tun", "not Ethernet"] {
        assert!(line.contains(words), "no {words:?} in {line}");
    }
    assert_eq!(inner.look()?, untouched);
    host.leaves_nothing(&before)
}

/// A file system over a directory, gone with the value.
struct Cover(PathBuf);

impl Cover {
    fn new(path: &str) -> TestResult<Self> {
        fs::create_dir_all(path)?;
        mount("none", path, "tmpfs", MountFlags::empty(), None)?;
        Ok(Self(path.into()))
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// `ctr run --cni` lets the plugin make the interface after Create, in the namespace that came with
/// it.
#[test]
fn an_interface_that_comes_after_the_creation_is_there() -> TestResult {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::alone()?;
    let (plugins, configuration) = (Cover::new("/opt/cni")?, Cover::new("/etc/cni")?);
    let bin = plugins.0.join("bin");
    fs::create_dir(&bin)?;
    let plugin = r#"#!/bin/sh
ip="nsenter --net=$CNI_NETNS ip"
case $CNI_COMMAND in
ADD)
    if [ "$CNI_IFNAME" = lo ]; then
        $ip link set lo up
    else
        $ip link add $CNI_IFNAME mtu 1450 type veth peer name far0 &&
        $ip link set $CNI_IFNAME up && $ip address add 10.78.0.2/24 dev $CNI_IFNAME
    fi >&2 || exit 1
    echo '{"cniVersion": "0.4.0", "interfaces": [{"name": "'$CNI_IFNAME'", "sandbox": "'$CNI_NETNS'"}],
        "ips": [{"version": "4", "address": "10.78.0.2/24", "interface": 0}]}' ;;
VERSION) echo '{"cniVersion": "0.4.0", "supportedVersions": ["0.3.1", "0.4.0"]}' ;;
esac
"#;
    for name in ["made-for-the-test", "loopback"] {
        fs::write(bin.join(name), plugin)?;
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755))?;
    }
    let net = configuration.0.join("net.d");
    fs::create_dir(&net)?;
    let conf = r#"{"cniVersion": "0.4.0", "name": "test", "type": "made-for-the-test"}"#;
    fs::write(net.join("10-test.conf"), conf)?;
    let before = host.footprint();
    let script = "ip -o -4 addr show eth0; cat /sys/class/net/eth0/mtu";
    let output = host
        .run(&host.name("cni"), &["--cni"], &["sh", "-c", script])
        .ok()?;
    let text = output.text();
    assert!(
        text.contains("10.78.0.2/24") && text.contains("1450"),
        "{}",
        output.both()
    );
    if is_oracle() {
        return Ok(()); // `ctr` with runc leaves a namespace of which its plugin was told
    }
    host.leaves_nothing(&before)
}
