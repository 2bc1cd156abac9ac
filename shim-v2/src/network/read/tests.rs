//! In network namespaces that end with their threads; `ip` makes what a plugin would, and `tc` what
//! is not ours. Needs root.

use std::io::{Read, Write};
use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use kata_like_boot::TAP_HEADER;

use super::later::Later;
use super::*;

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output();
    let done = done.unwrap();
    assert!(done.status.success(), "ip {arguments}: {done:?}");
}

fn tc(arguments: &str) -> String {
    let done = Command::new("tc").args(arguments.split(' ')).output();
    let done = done.unwrap();
    assert!(done.status.success(), "tc {arguments}: {done:?}");
    String::from_utf8(done.stdout).unwrap()
}

fn in_new_namespace(test: impl FnOnce(&mut Socket) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
        ip("link set lo up");
        test(&mut Socket::open().unwrap());
    });
    thread.join().unwrap();
}

#[test]
fn an_empty_namespace_has_no_network() {
    in_new_namespace(|socket| {
        let network = read(socket).unwrap();
        assert!(network.interfaces.is_empty() && network.neighbours.is_empty());
        assert!(network.routes.is_empty(), "{:?}", network.routes);
    });
}

#[test]
fn what_a_plugin_has_made_is_read() {
    in_new_namespace(|socket| {
        ip("link add eth0 mtu 1400 type veth peer name far");
        ip("link set far address 02:00:00:00:00:07");
        ip("link set eth0 address 02:00:00:00:00:08 up");
        ip("address add 10.1.0.2/32 dev eth0");
        ip("address add fd00::2/64 dev eth0 nodad");
        ip("route add 169.254.1.1 dev eth0 scope link");
        ip("route add default via 169.254.1.1 dev eth0 src 10.1.0.2 metric 5 onlink");
        ip("route add blackhole 10.66.0.0/16");
        ip("neighbour add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent");
        ip("neighbour add 10.1.0.9 lladdr ee:ee:ee:ee:ee:ef dev eth0 nud reachable");
        let network = read(socket).unwrap();
        let [eth0] = &network.interfaces[..] else {
            panic!("{network:?}");
        };
        assert_eq!(
            (eth0.name.as_str(), eth0.mtu, eth0.up),
            ("eth0", 1400, true)
        );
        assert_eq!(eth0.mac, [2, 0, 0, 0, 0, 8]);
        let addresses: Vec<_> = eth0
            .addresses
            .iter()
            .map(|it| (it.local, it.prefix))
            .collect();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(
            addresses.contains(&(address("10.1.0.2"), 32)),
            "{addresses:?}"
        );
        assert!(
            addresses.contains(&(address("fd00::2"), 64)),
            "{addresses:?}"
        );
        let route = |to: &str| {
            let found = network
                .routes
                .iter()
                .find(|route| route.it.destination == address(to));
            found.unwrap_or_else(|| panic!("no {to} in {:?}", network.routes))
        };
        let default = route("0.0.0.0");
        assert_eq!(default.interfaces, ["eth0"]);
        assert_eq!((default.it.prefix, default.it.metric), (0, 5));
        assert_eq!(default.it.source, Some(address("10.1.0.2")));
        assert!(default.it.hops[0].on_link);
        assert_eq!(route("169.254.1.1").it.scope, libc::RT_SCOPE_LINK);
        assert_eq!(route("10.66.0.0").it.hops, []);
        assert_eq!(route("fd00::").it.prefix, 64);
        let [neighbour] = &network.neighbours[..] else {
            panic!("{:?}", network.neighbours);
        };
        assert_eq!(neighbour.it.mac, [0xee; 6]);
    });
}

#[test]
fn what_the_guest_can_t_have_is_refused_by_its_name_once_it_is_used() {
    in_new_namespace(|socket| {
        ip("tuntap add dev wg7 mode tun");
        assert!(read(socket).unwrap().interfaces.is_empty());
        ip("address add 10.1.0.2/24 dev wg7");
        let line = read(socket).unwrap_err().one_line();
        assert!(
            line.starts_with("interface wg7 of the pod's network (of kind tun)"),
            "{line}"
        );
    });
    in_new_namespace(|socket| {
        ip("link add br0 type bridge");
        ip("link add eth0 type veth peer name far");
        ip("link set eth0 up");
        ip("address add 10.1.0.2/24 dev eth0");
        ip("link add mac0 link eth0 type macvlan");
        ip("link set mac0 up");
        let line = read(socket).unwrap_err().one_line();
        assert!(
            line.contains("mac0") && line.contains("upon eth0"),
            "{line}"
        );
        ip("address flush dev eth0");
        ip("link set far master br0 up");
        let names = |network: Network| -> Vec<_> {
            let interfaces = network.interfaces.into_iter();
            interfaces.map(|interface| interface.name).collect()
        };
        assert_eq!(names(read(socket).unwrap()), ["mac0"]);
        ip("link set br0 up");
        assert_eq!(names(read(socket).unwrap()), ["br0", "mac0"]);
    });
    in_new_namespace(|socket| {
        ip("rule add from 10.1.0.2 table 7 priority 100");
        let line = read(socket).unwrap_err().one_line();
        assert!(line.contains("(rule 100) is not supported"), "{line}");
    });
    for (route, why) in [
        ("10.61.0.0/16 encap ip id 7 dst 10.0.0.1 dev eth0", "encap"),
        ("fd61::/64 from fd77::/64 dev eth0", "from"),
        ("broadcast 10.61.0.0/16 dev eth0", "kind 3"),
    ] {
        in_new_namespace(move |socket| {
            ip("link add eth0 type veth peer name far");
            ip("link set eth0 up");
            ip("address add fd77::2/64 dev eth0 nodad");
            ip("address add 10.1.0.2/24 dev eth0");
            ip(&format!("route add {route}"));
            let line = read(socket).unwrap_err().one_line();
            let named =
                line.starts_with("route 10.61.0.0/16") || line.starts_with("route fd61::/64");
            assert!(named && line.contains(why), "{line}");
        });
    }
    in_new_namespace(|socket| {
        ip("tuntap add dev kltap0 mode tap");
        let line = read(socket).unwrap_err().one_line();
        assert!(line.contains("another virtual machine"), "{line}");
    });
    in_new_namespace(|socket| {
        for number in 0..9 {
            ip(&format!("tuntap add dev eth{number} mode tap"));
            ip(&format!("link set eth{number} up"));
        }
        let line = read(socket).unwrap_err().one_line();
        assert!(line.contains("9 interfaces"), "{line}");
    });
}

/// UDP from 10.1.0.1 to 10.1.0.2, both ports 9, as a frame without checksums.
fn datagram() -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 8, 8, 0];
    frame.extend([0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0x66, 0xc9]);
    frame.extend([10, 1, 0, 2, 10, 1, 0, 1, 0, 9, 0, 9, 0, 12, 0, 0]);
    frame.extend(b"ping");
    frame
}

/// Frames from the far end come out of the tap, and those written to it arrive at the far end. The
/// namespace is afterwards as it was, with what others have put there.
#[test]
fn every_frame_takes_the_way_over_the_tap_both_ways() {
    in_new_namespace(|socket| {
        let namespace = File::open("/proc/thread-self/ns/net").unwrap();
        ip("link add eth0 type veth peer name far");
        ip("link set eth0 address 02:00:00:00:00:08 up");
        // The far end has a namespace of its own, which ends with its thread.
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let far = std::thread::spawn(move || {
            kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            tell.send(rustix::thread::gettid().as_raw_nonzero())
                .unwrap();
            let _ = ended.recv();
        });
        let thread = told.recv().unwrap();
        ip(&format!("link set far netns {thread}"));
        let there = File::open(format!("/proc/self/task/{thread}/ns/net")).unwrap();
        let udp = inside(there.as_fd(), || {
            ip("link set lo up");
            ip("link set far address 02:00:00:00:00:07 up");
            ip("address add 10.1.0.1/24 dev far");
            ip("neighbour add 10.1.0.2 lladdr 02:00:00:00:00:08 dev far nud permanent");
            Ok(UdpSocket::bind("10.1.0.1:9").unwrap())
        })
        .unwrap();
        udp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (names, before) = (socket.links().unwrap().len(), tc("qdisc show"));

        for _ in 0..2 {
            let (network, taps, joined) = join(namespace.as_fd()).unwrap();
            assert_eq!((network.interfaces.len(), taps.len()), (1, 1));
            assert_eq!(joined.qdiscs(), [network.interfaces[0].index]);
            let error = join(namespace.as_fd()).map(drop).unwrap_err();
            assert!(error.one_line().contains("another virtual machine"));
            let mut tap = File::from(taps.into_iter().next().unwrap());
            // The VMM waits for a tap in another way.
            rustix::io::ioctl_fionbio(&tap, false).unwrap();
            udp.send_to(b"pong", "10.1.0.2:9").unwrap();
            let mut bytes = [0; 2000];
            let frame = loop {
                let count = tap.read(&mut bytes).unwrap();
                let frame = bytes[TAP_HEADER..count].to_vec();
                if frame[12..14] == [8, 0] {
                    break frame; // the far kernel's own neighbour discovery may come first
                }
            };
            assert_eq!(frame[..6], [2, 0, 0, 0, 0, 8]);
            assert!(frame.ends_with(b"pong"), "{frame:?}");
            tap.write_all(&[vec![0; TAP_HEADER], datagram()].concat())
                .unwrap();
            let mut bytes = [0; 10];
            let (count, from) = udp.recv_from(&mut bytes).unwrap();
            assert_eq!(
                (&bytes[..count], from.to_string()),
                (&b"ping"[..], "10.1.0.2:9".into())
            );
            drop(joined);
            drop(tap);
            assert_eq!(tc("qdisc show"), before);
            assert_eq!(socket.links().unwrap().len(), names);
        }

        a_killed_shim_s_redirections_go(namespace.as_fd(), &before);
        drop(end);
        far.join().unwrap();
    });
}

/// Also beside a filter of somebody else's, which stays.
fn a_killed_shim_s_redirections_go(namespace: BorrowedFd, before: &str) {
    tc("qdisc add dev eth0 clsact");
    tc("filter add dev eth0 ingress pref 7 u32 match u32 0 1 action mirred egress redirect dev lo");
    let shared = tc("filter show dev eth0 ingress");
    let (_, taps, joined) = join(namespace).unwrap();
    assert!(joined.qdiscs().is_empty());
    std::mem::forget(joined);
    drop(taps);
    assert_ne!(tc("filter show dev eth0 ingress"), shared);
    undo(Path::new("/proc/thread-self/ns/net"), &[]).unwrap();
    assert_eq!(tc("filter show dev eth0 ingress"), shared);
    tc("qdisc del dev eth0 clsact");
    let (_, taps, joined) = join(namespace).unwrap();
    let qdiscs = joined.qdiscs();
    std::mem::forget(joined);
    drop(taps);
    undo(Path::new("/proc/thread-self/ns/net"), &qdiscs).unwrap();
    assert_eq!(tc("qdisc show"), before);
    undo(Path::new("/proc/thread-self/ns/net"), &qdiscs).unwrap();
}

#[test]
fn what_comes_later_is_joined_once_and_forgotten_when_it_goes() {
    in_new_namespace(|_| {
        let namespace = File::open("/proc/thread-self/ns/net").unwrap();
        let changes = later::open(namespace.as_fd()).unwrap();
        let (_, _, mut joined) = join(namespace.as_fd()).unwrap();
        assert!(!changes.take().unwrap());
        ip("link add eth1 type veth peer name far");
        assert!(changes.take().unwrap());
        let mut look = || joined.look_again(namespace.as_fd()).unwrap();
        assert!(look().come.interfaces.is_empty()); // it is not up yet
        ip("address add 10.1.0.2/24 dev eth1");
        ip("link set eth1 up");
        ip("route add 10.2.0.0/16 via 10.1.0.1");
        ip("route add blackhole 10.66.0.0/16");
        ip("tuntap add dev wg7 mode tun");
        ip("link set wg7 up");
        let Later {
            gone, come, taps, ..
        } = look();
        let [eth1] = &come.interfaces[..] else {
            panic!("{come:?}");
        };
        assert_eq!((eth1.name.as_str(), eth1.addresses.len()), ("eth1", 1));
        assert_eq!((gone.len(), taps.len()), (0, 1));
        let destinations = come.routes.iter().map(|route| route.it.destination);
        let destinations: Vec<_> = destinations.map(|it| it.to_string()).collect();
        assert_eq!(destinations, ["10.1.0.0", "10.2.0.0", "10.66.0.0"]);
        ip("address add 10.1.0.3/24 dev eth1");
        ip("address add fd01::3/64 dev eth1 nodad");
        ip("route del 10.2.0.0/16");
        ip("route add 10.4.0.0/16 via 10.1.0.1");
        ip("route add 10.5.0.0/16 encap ip id 7 dst 10.0.0.1 dev eth1");
        let Later {
            come,
            changed,
            removed,
            ..
        } = look();
        assert!(come.interfaces.is_empty() && removed.interfaces.is_empty());
        let addresses = changed[0].addresses.iter();
        let addresses: Vec<_> = addresses.map(|it| it.local.to_string()).collect();
        assert_eq!(addresses, ["10.1.0.3", "fd01::3"]);
        let destinations = |routes: &[Named<Route>]| -> Vec<_> {
            let routes = routes.iter().filter(|route| route.it.destination.is_ipv4());
            routes.map(|it| it.it.destination.to_string()).collect()
        };
        assert_eq!(destinations(&come.routes), ["10.4.0.0"]);
        assert_eq!(destinations(&removed.routes), ["10.2.0.0"]);
        ip("address del 10.1.0.3/24 dev eth1");
        ip("link set eth1 mtu 1300");
        let Later {
            changed, removed, ..
        } = look();
        assert_eq!((changed[0].mtu, changed[0].addresses.len()), (1300, 0));
        assert_eq!(removed.interfaces[0].addresses.len(), 1);
        let again = look();
        assert!(again.gone.is_empty() && again.come.is_empty());
        assert!(
            again.changed.is_empty() && again.removed.is_empty(),
            "{again:?}"
        );
        ip("link delete eth1");
        assert_eq!(look().gone, [eth1.index]);
        assert!(look().gone.is_empty());
    });
}
