//! The pod's network namespace on the host: what it holds, and the taps that join it to the VM.
//!
//! Called by `pod_network`. Who has filled the namespace (a CNI plugin, a hook, Docker) finds it as
//! it was: an interface keeps its name, its addresses and its counters, and is joined to a tap by
//! `tc`, every frame both ways. What the guest must know of it is read here and made again there.
//!
//! An interface is judged by what it is at layer 2, not by its kind: Ethernet is joined, anything
//! else that is in use is refused by its name. One that is down and has no address is nobody's:
//! kernel modules put such into each namespace (`tunl0`, `sit0`, `gretap0`). The ports of a bridge
//! are the bridge's business, and what a VLAN lies upon is the VLAN's: frames taken there would
//! never get to the interface that has the addresses.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use kata_like_netlink::{Address, Link, Named, Neighbour, Route, Socket};

use crate::vm::agent::Interface;
use kata_like_failure::{Failure, Kind};

use super::tap::{self, TAP_PREFIX};
use super::tc;

pub mod later;

/// As many interfaces as the VM has slots for.
const MAX_INTERFACES: usize = 8;
/// What a driver can be told of an MTU (virtio 1.2, 5.1.4.2).
const MTUS: std::ops::RangeInclusive<u32> = 68..=65_535;

/// Mode of an ipvlan (include/uapi/linux/if_link.h): its packets come in within the network layer.
const IPVLAN_MODE_L3S: u16 = 2;

/// The priorities of the rules that every namespace begins with: local, main, default.
const OWN_RULES: [u32; 3] = [0, 32_766, 32_767];

/// What a namespace holds, and the guest gets.
#[derive(Clone, Debug, Default)]
pub struct Network {
    /// The interfaces, but for loopback.
    pub interfaces: Vec<Interface>,
    /// Routes, their hops by the interface's name.
    pub routes: Vec<Named<Route>>,
    /// Neighbours that were set by hand.
    pub neighbours: Vec<Named<Neighbour>>,
}

/// A namespace that is joined to the VM. Dropped, it is as it was before; the taps go with their
/// descriptors.
#[derive(Debug)]
pub struct Joined {
    socket: Socket,
    redirects: Vec<tc::Redirect>,
    /// What the guest has been told.
    told: Network,
    /// The numbers of interfaces that have come later and could not be joined.
    given_up: HashSet<u32>,
}

impl Joined {
    /// The numbers of the interfaces that have got a queueing discipline.
    pub fn qdiscs(&self) -> Vec<u32> {
        let redirects = self.redirects.iter();
        redirects.filter_map(tc::Redirect::own_qdisc).collect()
    }

    /// Makes a tap and joins the interface to it. Within the namespace.
    fn join(&mut self, interface: &Interface) -> Result<OwnedFd, Failure> {
        let joining = |source: io::Error| {
            let step = format!("join interface {} to a tap", interface.name);
            Failure::failed(step, source)
        };
        let (tap, index) = tap::make(&mut self.socket, interface.mtu.into()).map_err(joining)?;
        let redirect = tc::redirect(&mut self.socket, interface.index, index);
        self.redirects.push(redirect.map_err(joining)?);
        Ok(tap)
    }

    /// Takes the redirection from an interface, and joins it no more.
    pub fn give_up(&mut self, index: u32) {
        self.given_up.insert(index);
        self.told.interfaces.retain(|it| it.index != index);
        let redirects = std::mem::take(&mut self.redirects);
        let (gone, left) = redirects.into_iter().partition(|it| it.link() == index);
        self.redirects = left;
        self.undo(gone);
    }

    fn undo(&mut self, redirects: Vec<tc::Redirect>) {
        for redirect in redirects {
            if let Err(error) = redirect.undo(&mut self.socket) {
                tracing::warn!("take the redirection from an interface: {error}");
            }
        }
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let redirects = std::mem::take(&mut self.redirects);
        self.undo(redirects);
    }
}

/// Reads a namespace and makes a tap for each of its interfaces, in their order. Blocks.
pub fn join(namespace: BorrowedFd) -> Result<(Network, Vec<OwnedFd>, Joined), Failure> {
    inside(namespace, || {
        let socket = Socket::open().map_err(failed("open a netlink socket"))?;
        let mut joined = Joined {
            socket,
            redirects: Vec::new(),
            told: Network::default(),
            given_up: HashSet::new(),
        };
        let network = read(&mut joined.socket)?;
        let mut taps = Vec::new();
        for interface in &network.interfaces {
            taps.push(joined.join(interface)?);
        }
        joined.told = network.clone();
        Ok((network, taps, joined))
    })
}

/// Takes from a namespace what a killed shim has left there: the redirections, and the queueing
/// disciplines of the interfaces with these numbers. The VM has ended. A namespace that is gone is
/// no error.
pub fn undo(path: &Path, qdiscs: &[u32]) -> Result<(), Failure> {
    let Ok(namespace) = File::open(path) else {
        return Ok(());
    };
    inside(namespace.as_fd(), || {
        let mut socket = Socket::open().map_err(failed("open a netlink socket"))?;
        for link in socket.links().map_err(failed("list the interfaces"))? {
            let own = qdiscs.contains(&link.index);
            let step = "take the redirection from an interface";
            tc::undo_stale(&mut socket, link.index, own).map_err(failed(step))?;
        }
        Ok(())
    })
}

/// Does something in a thread of the namespace's: what is opened there belongs to it.
pub fn inside<T: Send>(
    namespace: BorrowedFd,
    work: impl FnOnce() -> Result<T, Failure> + Send,
) -> Result<T, Failure> {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| failed("enter the pod's network namespace")(errno.into()))?;
            work()
        });
        let panicked = |_| {
            let what = "look into the pod's network namespace: the thread panicked";
            Failure::new(Kind::Failed, what)
        };
        thread.join().map_err(panicked)?
    })
}

pub(super) fn failed(step: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::failed(step, source)
}

fn read(socket: &mut Socket) -> Result<Network, Failure> {
    let links = socket.links().map_err(failed("list the interfaces"))?;
    let addresses = socket.addresses().map_err(failed("list the addresses"))?;
    let mut network = Network::default();
    for link in &links {
        if link.name.starts_with(TAP_PREFIX) {
            let why = "another virtual machine is joined to this network namespace";
            return Err(refused(link, why));
        }
        let found = interface(link, &links, &addresses)?;
        network.interfaces.extend(found);
    }
    if network.interfaces.len() > MAX_INTERFACES {
        return Err(Failure::unsupported(
            format_args!("a network of {} interfaces", network.interfaces.len()),
            format_args!("a virtual machine has at most {MAX_INTERFACES}"),
        ));
    }
    let rules = socket
        .rules()
        .map_err(failed("list the rules of routing"))?;
    if let Some(priority) = rules.iter().find(|rule| !OWN_RULES.contains(rule)) {
        return Err(Failure::unsupported(
            format_args!("policy routing in the pod's network (rule {priority})"),
            "the guest has the rules that every network begins with",
        ));
    }
    network.add_ways(socket, &links, &mut Err)?;
    Ok(network)
}

impl Network {
    fn has(&self, name: &str) -> bool {
        self.interfaces.iter().any(|found| found.name == name)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.interfaces.is_empty() && self.routes.is_empty() && self.neighbours.is_empty()
    }

    /// Adds the routes over its interfaces, and the neighbours on its interfaces. `refused` is
    /// asked what to do about a route that the guest can't have.
    fn add_ways(
        &mut self,
        socket: &mut Socket,
        links: &[Link],
        refused: &mut dyn FnMut(Failure) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        for route in socket.routes().map_err(failed("list the routes"))? {
            // Over what is left out nothing leads.
            let is_there = |name: &String| name == "lo" || self.has(name);
            let route = match named_route(route, links) {
                Ok(route) => route,
                Err(error) => {
                    refused(error)?;
                    continue;
                }
            };
            let route = route.filter(|route| route.interfaces.iter().all(is_there));
            self.routes.extend(route);
        }
        for it in socket.neighbours().map_err(failed("list the neighbours"))? {
            let mut interfaces = self.interfaces.iter();
            if let Some(found) = interfaces.find(|found| found.index == it.link)
                && it.is_permanent()
                && it.mac.len() == 6
            {
                let interfaces = vec![found.name.clone()];
                self.neighbours.push(Named { interfaces, it });
            }
        }
        Ok(())
    }
}

/// Whether it is only there for another interface of the namespace: a bridge that it is a port of,
/// or a VLAN.
fn carries_others_only(link: &Link, links: &[Link], own: &[Address]) -> bool {
    let mut upper = links.iter().filter(|other| is_upon(other, link));
    link.master.is_some() || upper.next().is_some() && !own.iter().any(is_global)
}

/// The interface of the same namespace that `link` lies upon, if it has addresses of its own: then
/// all of its frames go to the VM.
fn lies_upon<'a>(link: &Link, links: &'a [Link], addresses: &[Address]) -> Option<&'a Link> {
    let lower = links.iter().find(|lower| is_upon(link, lower))?;
    let mut own = addresses.iter().filter(|it| it.link == lower.index);
    own.any(is_global).then_some(lower)
}

fn is_upon(link: &Link, lower: &Link) -> bool {
    // Of a veth it is the other end.
    link.lower == Some(lower.index) && link.kind.as_deref() != Some("veth")
}

fn is_global(address: &Address) -> bool {
    address.scope == libc::RT_SCOPE_UNIVERSE
}

fn refused(link: &Link, why: impl std::fmt::Display) -> Failure {
    let (name, kind) = (&link.name, link.kind.as_deref());
    let kind = kind.unwrap_or("without a name");
    let what = format!("interface {name} of the pod's network (of kind {kind})");
    Failure::unsupported(what, why)
}

/// An interface for the guest; none if it is nobody's, or there for others only.
fn interface(
    link: &Link,
    links: &[Link],
    addresses: &[Address],
) -> Result<Option<Interface>, Failure> {
    let Link { name, hardware, .. } = link;
    let refuse = |why: String| Err(refused(link, why));
    if *hardware == libc::ARPHRD_LOOPBACK {
        return Ok(None);
    }
    let upon = lies_upon(link, links, addresses);
    let own = |address: &&Address| address.link == link.index;
    let addresses: Vec<_> = addresses.iter().filter(own).cloned().collect();
    if carries_others_only(link, links, &addresses) {
        tracing::info!("interface {name} has what is upon it: it is left out");
        return Ok(None);
    }
    if !link.is_up() && addresses.is_empty() {
        tracing::info!("interface {name} is down and has no address: it is left out");
        return Ok(None);
    }
    let Ok(mac) = <[u8; 6]>::try_from(link.mac.as_slice()) else {
        return refuse(format!("it is not Ethernet (ARPHRD {hardware})"));
    };
    if *hardware != libc::ARPHRD_ETHER {
        return refuse(format!("it is not Ethernet (ARPHRD {hardware})"));
    }
    if let Some(upon) = upon {
        let lower = &upon.name;
        return refuse(format!(
            "it lies upon {lower}, which has addresses of its own"
        ));
    }
    if link.ipvlan_mode == Some(IPVLAN_MODE_L3S) {
        return refuse("its mode is l3s: nothing comes in on it that could be redirected".into());
    }
    let Some(mtu) = MTUS.contains(&link.mtu).then_some(link.mtu as u16) else {
        return refuse(format!("its MTU is {}", link.mtu));
    };
    Ok(Some(Interface {
        index: link.index,
        name: name.clone(),
        mac,
        mtu,
        up: link.is_up(),
        arp: link.has_arp(),
        addresses,
    }))
}

/// A route that the guest must be given: not those that the kernel has for itself, or that a router
/// tells.
fn named_route(route: Route, links: &[Link]) -> Result<Option<Named<Route>>, Failure> {
    const RTM_F_CLONED: u32 = 0x200;
    const RTPROT_RA: u8 = 9;
    let leads_nowhere = [
        libc::RTN_BLACKHOLE,
        libc::RTN_UNREACHABLE,
        libc::RTN_PROHIBIT,
        libc::RTN_THROW,
    ];
    let told = route.protocol == RTPROT_RA || route.flags & RTM_F_CLONED != 0;
    let kernel_s = [libc::RTPROT_UNSPEC, libc::RTPROT_KERNEL].contains(&route.protocol);
    let is_plain = route.kind == libc::RTN_UNICAST;
    if told || kernel_s && (!is_plain || route.table == u32::from(libc::RT_TABLE_LOCAL)) {
        return Ok(None);
    }
    let refuse = |why: String| {
        let (to, prefix) = (route.destination, route.prefix);
        let what = format!("route {to}/{prefix} of the pod's network");
        Err(Failure::unsupported(what, why))
    };
    if route.wraps {
        return refuse("it wraps what it carries (an encap route)".into());
    }
    if route.from != 0 {
        return refuse("it is for packets from certain addresses only (a from route)".into());
    }
    if !is_plain && route.kind != libc::RTN_LOCAL && !leads_nowhere.contains(&route.kind) {
        let kind = route.kind;
        return refuse(format!("it is neither unicast nor local (kind {kind})"));
    }
    let mut route = Route { flags: 0, ..route };
    if leads_nowhere.contains(&route.kind) {
        route.hops.clear(); // IPv6 has them on loopback
    }
    let names = route.hops.iter().map(|hop| name_of(links, hop.link));
    let Some(interfaces) = names.collect::<Option<Vec<_>>>() else {
        return Ok(None); // its interface has gone since
    };
    Ok(Some(Named {
        interfaces,
        it: route,
    }))
}

fn name_of(links: &[Link], index: u32) -> Option<String> {
    let mut links = links.iter();
    links
        .find(|link| link.index == index)
        .map(|link| link.name.clone())
}

#[cfg(test)]
mod tests;
