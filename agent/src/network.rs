//! The guest's network: makes in the guest what the pod's namespace on the host holds.
//!
//! Called by `service.rs` before the first container starts, and for later changes. The VMM has put
//! a device for each interface into a slot. Everything here is a copy of something that works on
//! the host: addresses are not tried for duplicates again, and there are no routes but the host's.
//! A container's sysctl may have turned IPv6 off on an interface meanwhile. What is IPv6 is left
//! out there, as the host's kernel would remove it.

use std::fs;
use std::io;
use std::net::IpAddr;

use kata_like_failure::{Failure, Kind, Step};
use kata_like_netlink::{Address, Change, Link, Named, Neighbour, Route, Socket};

use crate::device;

/// What is to be made, changed or removed.
#[derive(Debug)]
pub struct Network {
    pub interfaces: Vec<Interface>,
    /// The numbers of interfaces in these are still 0.
    pub routes: Vec<Named<Route>>,
    pub neighbours: Vec<Named<Neighbour>>,
    /// Remove all of it, except the interfaces themselves.
    pub remove: bool,
}

/// An interface as it is to be.
#[derive(Debug)]
pub struct Interface {
    /// N of `virtio-mmio.N`.
    pub slot: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub up: bool,
    pub no_arp: bool,
    /// The interface is there already.
    pub bound: bool,
    /// Their numbers of the interface are still 0.
    pub addresses: Vec<Address>,
}

/// Makes the network, or removes it.
pub fn configure(network: &Network) -> Result<(), Failure> {
    let mut socket = Socket::open().step(|| "open a netlink socket")?;
    if network.remove {
        return remove(&mut socket, network);
    }
    let indices = bind(&mut socket, &network.interfaces)?;
    for (interface, index) in network.interfaces.iter().zip(indices) {
        set_up(&mut socket, interface, index)?;
    }
    let links = socket.links().step(|| "list the interfaces")?;
    for route in in_order(&network.routes) {
        let mut route = route_here(route, &links)?;
        let leads = !route.hops.is_empty();
        let to = route.destination;
        route.hops.retain(|hop| takes(&links, hop.link, to));
        if leads && route.hops.is_empty() {
            continue;
        }
        let added = socket.add_route(&route);
        added.step(|| format!("add {}", described(&route)))?;
    }
    for neighbour in &network.neighbours {
        let neighbour = neighbour_here(neighbour, &links)?;
        if !takes(&links, neighbour.link, neighbour.address) {
            continue;
        }
        let added = socket.add_neighbour(&neighbour);
        added.step(|| format!("add neighbour {}", neighbour.address))?;
    }
    Ok(())
}

/// A thing that is not there any more, or whose interface is not, has gone with another one.
fn remove(socket: &mut Socket, network: &Network) -> Result<(), Failure> {
    let links = socket.links().step(|| "list the interfaces")?;
    let routes = network.routes.iter();
    for route in routes.filter_map(|it| route_here(it, &links).ok()) {
        let removed = absent_is_done(socket.remove_route(&route));
        removed.step(|| format!("remove {}", described(&route)))?;
    }
    let neighbours = network.neighbours.iter();
    for neighbour in neighbours.filter_map(|it| neighbour_here(it, &links).ok()) {
        let removed = absent_is_done(socket.remove_neighbour(&neighbour));
        removed.step(|| format!("remove neighbour {}", neighbour.address))?;
    }
    for interface in &network.interfaces {
        let link = device::interface(interface.slot)?;
        for address in &interface.addresses {
            let address = Address {
                link,
                ..address.clone()
            };
            let removed = absent_is_done(socket.remove_address(&address));
            removed.step(|| format!("remove address {}", address.local))?;
        }
    }
    Ok(())
}

fn absent_is_done(done: io::Result<()>) -> io::Result<()> {
    const GONE: [io::ErrorKind; 2] = [io::ErrorKind::NotFound, io::ErrorKind::AddrNotAvailable];
    match done {
        Err(error) if GONE.contains(&error.kind()) => Ok(()),
        // ESRCH has no kind of its own.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

/// Binds each device that is not bound yet, and names its interface. Returns the interfaces'
/// numbers.
fn bind(socket: &mut Socket, interfaces: &[Interface]) -> Result<Vec<u32>, Failure> {
    let mut indices = Vec::new();
    for Interface {
        slot,
        name,
        mac,
        bound,
        ..
    } in interfaces
    {
        if *bound {
            indices.push(device::interface(*slot)?);
            continue;
        }
        device::bind(*slot)?;
        let index = device::interface(*slot)?;
        let links = socket.links().step(|| "list the interfaces")?;
        if !links
            .iter()
            .any(|link| link.index == index && link.mac == mac)
        {
            let what = format!("the device in slot {slot} has not the address of interface {name}");
            return Err(Failure::new(Kind::Failed, what));
        }
        // The name that the kernel chose may be that of an interface still to come.
        rename(socket, index, &format!("slot{slot}"))?;
        indices.push(index);
    }
    let all = interfaces.iter().zip(&indices);
    for (interface, index) in all.filter(|(interface, _)| !interface.bound) {
        rename(socket, *index, &interface.name)?;
    }
    Ok(indices)
}

fn rename(socket: &mut Socket, index: u32, name: &str) -> Result<(), Failure> {
    let renamed = socket.set_link(index, &Change::Name(name));
    renamed.step(|| format!("name interface {name}"))
}

fn set_up(socket: &mut Socket, interface: &Interface, index: u32) -> Result<(), Failure> {
    let Interface {
        name,
        mtu,
        up,
        no_arp,
        bound,
        ..
    } = interface;
    let mut set = |what: &str, change| {
        let set = socket.set_link(index, &change);
        set.step(|| format!("{what} of interface {name}"))
    };
    set("set the MTU", Change::Mtu(*mtu))?;
    set("turn off own addresses", Change::NoOwnAddress)?;
    if *no_arp {
        set("turn ARP off", Change::NoArp)?;
    }
    if *up {
        set("change the state", Change::Up)?;
    } else if *bound {
        set("change the state", Change::Down)?;
    }
    for address in &interface.addresses {
        if address.local.is_ipv6() && ipv6_is_off(name) {
            log::info!(
                "interface {name} has no {}: IPv6 is off there",
                address.local
            );
            continue;
        }
        let address = Address {
            link: index,
            flags: flags(address),
            ..address.clone()
        };
        let added = socket.add_address(&address);
        added.step(|| {
            format!(
                "add address {}/{} to interface {name}",
                address.local, address.prefix
            )
        })?;
    }
    Ok(())
}

/// Whether the interface with this number takes what belongs to this address.
fn takes(links: &[Link], number: u32, address: IpAddr) -> bool {
    let mut links = links.iter();
    let link = links.find(|link| link.index == number);
    address.is_ipv4() || !link.is_some_and(|link| ipv6_is_off(&link.name))
}

/// Whether a sysctl has turned IPv6 off on an interface (Documentation/networking/ip-sysctl.rst,
/// `disable_ipv6`).
fn ipv6_is_off(name: &str) -> bool {
    let off = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"));
    off.is_ok_and(|off| off.trim() == "1")
}

/// The routes come separately, and the host has looked for duplicates.
fn flags(address: &Address) -> u32 {
    match address.local.is_ipv6() {
        true => libc::IFA_F_NOPREFIXROUTE | libc::IFA_F_NODAD,
        false => libc::IFA_F_NOPREFIXROUTE,
    }
}

/// Routes to neighbours come first: the gateways of others are among them.
fn in_order(routes: &[Named<Route>]) -> impl Iterator<Item = &Named<Route>> {
    let has_gateway = |route: &Named<Route>| {
        let mut hops = route.it.hops.iter();
        hops.any(|hop| hop.gateway.is_some())
    };
    let (behind, near): (Vec<_>, Vec<_>) = routes.iter().partition(|route| has_gateway(route));
    near.into_iter().chain(behind)
}

fn route_here(Named { interfaces, it }: &Named<Route>, links: &[Link]) -> Result<Route, Failure> {
    let mut route = it.clone();
    for (hop, name) in route.hops.iter_mut().zip(interfaces) {
        hop.link = find(links, name)?;
    }
    Ok(route)
}

fn described(route: &Route) -> String {
    let (to, prefix, table) = (route.destination, route.prefix, route.table);
    format!("route {to}/{prefix} of table {table}")
}

fn neighbour_here(
    Named { interfaces, it }: &Named<Neighbour>,
    links: &[Link],
) -> Result<Neighbour, Failure> {
    let mut neighbour = it.clone();
    for name in interfaces {
        neighbour.link = find(links, name)?;
    }
    Ok(neighbour)
}

fn find(links: &[Link], name: &str) -> Result<u32, Failure> {
    let found = links.iter().find(|link| link.name == name);
    let none = || {
        let step = format!("find interface {name:?}: there is none");
        Failure::new(Kind::Failed, step)
    };
    found.map(|link| link.index).ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use super::*;

    use kata_like_netlink::Hop;

    fn route(destination: &str, gateway: Option<&str>) -> Named<Route> {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        Named {
            interfaces: vec!["lo".into()],
            it: Route {
                destination: ip(destination),
                prefix: 24,
                from: 0,
                table: 254,
                protocol: 3,
                scope: if gateway.is_some() { 0 } else { 253 },
                kind: 1,
                service: 0,
                metric: 0,
                source: None,
                preference: 0,
                settings: Vec::new(),
                hops: vec![Hop {
                    link: 0,
                    gateway: gateway.map(ip),
                    on_link: false,
                    weight: 0,
                }],
                wraps: false,
                flags: 0,
            },
        }
    }

    /// In a namespace of the test's own, with the one interface that there is: routes come in the
    /// order in which the kernel takes them, and what it does not take is named.
    #[test]
    fn routes_are_made_whatever_their_order() {
        let test = || {
            kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            let mut socket = Socket::open().unwrap();
            socket.set_link(1, &Change::Up).unwrap();
            let routes = vec![route("10.2.0.0", Some("10.1.0.1")), route("10.1.0.0", None)];
            let mut network = Network {
                interfaces: Vec::new(),
                routes,
                neighbours: Vec::new(),
                remove: false,
            };
            configure(&network).unwrap();
            let made = socket.routes().unwrap();
            let made = |wanted: &str| made.iter().any(|it| it.destination.to_string() == wanted);
            assert!(made("10.1.0.0") && made("10.2.0.0"));
            network.remove = true;
            configure(&network).unwrap();
            configure(&network).unwrap(); // what is gone is gone
            let left = socket.routes().unwrap().into_iter();
            let left: Vec<_> = left.filter(|it| it.table == 254).collect();
            assert_eq!(left, []);
            network.remove = false;

            // Where IPv6 is off, its routes are left out.
            fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1").unwrap();
            network.routes = vec![route("fd33::", None), route("10.4.0.0", None)];
            configure(&network).unwrap();
            let made = socket.routes().unwrap();
            let made = |wanted: &str| made.iter().any(|it| it.destination.to_string() == wanted);
            assert!(made("10.4.0.0") && !made("fd33::"));

            network.routes = vec![route("10.3.0.0", Some("10.9.0.1"))];
            let error = configure(&network).unwrap_err();
            assert_eq!(error.to_string(), "add route 10.3.0.0/24 of table 254");
            network.routes = vec![route("10.3.0.0", None)];
            network.routes[0].interfaces = vec!["eth7".into()];
            let error = configure(&network).unwrap_err();
            assert_eq!(error.to_string(), "find interface \"eth7\": there is none");
        };
        std::thread::spawn(test).join().unwrap();
    }
}
