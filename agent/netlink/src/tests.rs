//! Tests against the kernel itself, in network namespaces that end with their threads: what is set
//! is read back. They need root.

use std::net::IpAddr;

use crate::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Runs `test` with a socket of a new namespace whose loopback is up.
fn in_new_namespace(test: impl FnOnce(&mut Socket) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
        let mut socket = Socket::open().unwrap();
        socket.set_link(1, &Change::Up).unwrap();
        test(&mut socket);
    });
    thread.join().unwrap();
}

/// Makes a pair of interfaces; returns their numbers.
fn pair(socket: &mut Socket, one: &str, other: &str) -> [u32; 2] {
    let name = |name: &str| [name.as_bytes(), &[0]].concat();
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let mut make = Message::new(libc::RTM_NEWLINK, flags, &[0; 16]);
    make.attribute(libc::IFLA_IFNAME, &name(one));
    make.nest(libc::IFLA_LINKINFO, |info| {
        info.attribute(libc::IFLA_INFO_KIND, b"veth");
        info.nest(libc::IFLA_INFO_DATA, |data| {
            data.nest(1, |peer| {
                peer.raw(&[0; 16]);
                peer.attribute(libc::IFLA_IFNAME, &name(other));
            });
        });
    });
    socket.change(make).unwrap();
    [one, other].map(|name| {
        let links = socket.links().unwrap();
        links.iter().find(|link| link.name == name).unwrap().index
    })
}

#[test]
fn an_interface_is_renamed_and_set() {
    in_new_namespace(|socket| {
        let [one, _] = pair(socket, "one", "other");
        socket.set_link(one, &Change::Name("eth0")).unwrap();
        socket.set_link(one, &Change::Mtu(1400)).unwrap();
        socket.set_link(one, &Change::NoOwnAddress).unwrap();
        socket.set_link(one, &Change::Up).unwrap();
        let links = socket.links().unwrap();
        let lo = links.iter().find(|link| link.name == "lo").unwrap();
        assert_eq!((lo.index, lo.hardware), (1, libc::ARPHRD_LOOPBACK));
        let eth0 = links.iter().find(|link| link.name == "eth0").unwrap();
        assert_eq!((eth0.mtu, eth0.is_up(), eth0.mac.len()), (1400, true, 6));
        assert_eq!(eth0.kind.as_deref(), Some("veth"));
        assert_eq!(eth0.hardware, libc::ARPHRD_ETHER);
        let of_it = |socket: &mut Socket| {
            let all = socket.addresses().unwrap();
            all.into_iter().filter(|it| it.link == one).count()
        };
        assert_eq!(of_it(socket), 0);
        socket.set_link(one, &Change::Down).unwrap();
        assert!(
            !socket
                .links()
                .unwrap()
                .iter()
                .any(|link| link.index == one && link.is_up())
        );
        let error = socket.set_link(one, &Change::Mtu(1)).unwrap_err();
        assert!(error.to_string().contains("mtu"), "{error}"); // in the kernel's words
    });
}

/// A pair of interfaces that are up and have no addresses; answers the number of one.
fn bare_link(socket: &mut Socket) -> u32 {
    let [one, other] = pair(socket, "one", "other");
    for link in [one, other] {
        socket.set_link(link, &Change::NoOwnAddress).unwrap();
        socket.set_link(link, &Change::Up).unwrap();
    }
    one
}

/// Addresses of every form.
fn addresses_of(one: u32) -> [Address; 4] {
    const PERMANENT: u32 = libc::IFA_F_PERMANENT;
    let plain = PERMANENT | libc::IFA_F_NOPREFIXROUTE;
    let address = |local: &str, prefix, flags| Address {
        link: one,
        local: ip(local),
        peer: None,
        prefix,
        scope: libc::RT_SCOPE_UNIVERSE,
        flags,
        broadcast: None,
    };
    [
        Address {
            broadcast: Some(ip("10.1.0.255")),
            ..address("10.1.0.2", 24, plain)
        },
        Address {
            peer: Some(ip("10.9.0.1")),
            ..address("10.9.0.2", 32, plain)
        },
        address("fd00::2", 64, plain | libc::IFA_F_NODAD),
        Address {
            scope: libc::RT_SCOPE_LINK,
            ..address("fe80::2", 64, plain | libc::IFA_F_NODAD)
        },
    ]
}

/// Routes of every form, among these addresses.
fn routes_of(one: u32) -> [Route; 8] {
    let hop = |link, gateway: Option<&str>| Hop {
        link,
        gateway: gateway.map(ip),
        on_link: false,
        weight: 0,
    };
    let route = |destination: &str, prefix, hops| Route {
        destination: ip(destination),
        prefix,
        from: 0,
        table: u32::from(libc::RT_TABLE_MAIN),
        protocol: libc::RTPROT_BOOT,
        scope: libc::RT_SCOPE_UNIVERSE,
        kind: libc::RTN_UNICAST,
        service: 0,
        metric: 7,
        source: None,
        preference: 0,
        settings: Vec::new(),
        hops,
        wraps: false,
        flags: 0,
    };
    let on_link = Hop {
        on_link: true,
        weight: 4,
        ..hop(one, Some("169.254.1.1"))
    };
    [
        Route {
            scope: libc::RT_SCOPE_LINK,
            source: Some(ip("10.1.0.2")),
            protocol: libc::RTPROT_KERNEL,
            metric: 0,
            ..route("10.1.0.0", 24, vec![hop(one, None)])
        },
        Route {
            settings: vec![(2, 1300)],
            ..route("0.0.0.0", 0, vec![hop(one, Some("10.1.0.1"))])
        },
        Route {
            flags: 4,
            table: 1000,
            ..route(
                "10.7.0.0",
                16,
                vec![Hop {
                    weight: 0,
                    ..on_link.clone()
                }],
            )
        },
        route("10.8.0.0", 16, vec![hop(one, Some("10.1.0.1")), on_link]),
        Route {
            kind: libc::RTN_BLACKHOLE,
            ..route("10.6.0.0", 16, Vec::new())
        },
        route("fd00::", 64, vec![hop(one, None)]),
        Route {
            source: Some(ip("fd00::2")),
            ..route("::", 0, vec![hop(one, Some("fe80::1"))])
        },
        route("10.5.0.0", 16, vec![hop(one, Some("fe80::1"))]),
    ]
}

#[test]
fn addresses_are_read_as_they_were_set() {
    in_new_namespace(|socket| {
        let addresses = addresses_of(bare_link(socket));
        for address in &addresses {
            socket.add_address(address).unwrap();
        }
        let found = socket.addresses().unwrap();
        for address in &addresses {
            assert!(found.contains(address), "{address:?} in {found:?}");
        }
    });
}

#[test]
fn routes_are_read_as_they_were_set() {
    in_new_namespace(|socket| {
        let one = bare_link(socket);
        for address in &addresses_of(one) {
            socket.add_address(address).unwrap();
        }
        let routes = routes_of(one);
        for route in &routes {
            socket.add_route(route).unwrap();
        }
        let found = socket.routes().unwrap();
        for route in &routes {
            assert!(found.contains(route), "{route:#?} in {found:#?}");
        }
    });
}

#[test]
fn neighbours_are_read_as_they_were_set() {
    in_new_namespace(|socket| {
        let one = bare_link(socket);
        for address in ["10.1.0.1", "fe80::1"] {
            let neighbour = Neighbour {
                link: one,
                address: ip(address),
                mac: vec![2, 0, 0, 0, 0, 1],
                state: libc::NUD_PERMANENT,
                flags: 0,
            };
            socket.add_neighbour(&neighbour).unwrap();
            let found = socket.neighbours().unwrap();
            assert!(found.contains(&neighbour), "{neighbour:?} in {found:?}");
            assert!(neighbour.is_permanent());
        }
    });
}

#[test]
fn what_is_cut_off_ends_the_attributes() {
    let mut message = Message::new(1, 0, &[0; 4]);
    message.attribute(3, b"abc").attribute(4, b"defgh");
    let bytes = message.finish(0, 1);
    let attributes = &bytes[20..];
    for length in 0..=attributes.len() {
        let found: Vec<_> = Attributes(&attributes[..length]).collect();
        let whole = [(3, &b"abc"[..]), (4, &b"defgh"[..])];
        assert!(whole.starts_with(&found), "{length}: {found:?}");
    }
    assert_eq!(Attributes(attributes).count(), 2);
    assert_eq!(Attributes(&[3, 0, 1, 0, 9, 9]).count(), 0); // shorter than itself
}
