//! The pod's network namespace on the host: what it holds, and the taps that join it to the VM.
//!
//! Called by `sandbox`. Whoever has filled the namespace (a CNI plugin, a hook, Docker) finds it as it was: an
//! interface keeps its name, its addresses and its counters, and is joined to a tap by `tc`, every frame both
//! ways. What the guest must know of it is read here and made again there.
//!
//! An interface is judged by what it is at layer 2, not by its kind: Ethernet is joined, anything else that is
//! in use is refused by its name. One that is down and has no address is nobody's: kernel modules put such
//! into each namespace (`tunl0`, `sit0`, `gretap0`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use kata_like_netlink::{Address, Link, Neighbour, Route, Socket};

use crate::error::{SandboxError, SandboxErrorKind};

pub mod resolver;
mod tap;
mod tc;

use tap::TAP_PREFIX;

/// As many interfaces as the VM has slots for.
const MAX_INTERFACES: usize = 8;
/// What a driver can be told of an MTU (virtio 1.2, 5.1.4.2).
const MTUS: std::ops::RangeInclusive<u32> = 68..=65_535;

/// The priorities of the rules that every namespace begins with: local, main, default.
const OWN_RULES: [u32; 3] = [0, 32_766, 32_767];

/// What a namespace holds, and the guest gets.
#[derive(Debug, Default)]
pub struct Network {
    /// The interfaces, but for loopback.
    pub interfaces: Vec<Interface>,
    /// Routes, their hops by the interface's name.
    pub routes: Vec<Named<Route>>,
    /// Neighbours that were set by hand.
    pub neighbours: Vec<Named<Neighbour>>,
}

/// An interface.
#[derive(Debug)]
pub struct Interface {
    /// The number of it in its namespace.
    index: u32,
    /// Its name.
    pub name: String,
    /// Its address at layer 2.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// Something with the names of the interfaces in it, in the order of its own numbers.
#[derive(Debug)]
pub struct Named<T> {
    /// The names.
    pub interfaces: Vec<String>,
    /// The thing itself.
    pub it: T,
}

/// A namespace that is joined to the VM. Dropped, it is as it was before; the taps go with their descriptors.
#[derive(Debug)]
pub struct Joined {
    socket: Socket,
    redirects: Vec<tc::Redirect>,
}

impl Joined {
    /// The numbers of the interfaces that have got a queueing discipline.
    pub fn qdiscs(&self) -> Vec<u32> {
        let redirects = self.redirects.iter();
        redirects.filter_map(tc::Redirect::own_qdisc).collect()
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        for redirect in std::mem::take(&mut self.redirects) {
            if let Err(error) = redirect.undo(&mut self.socket) {
                tracing::warn!("take the redirection from an interface: {error}");
            }
        }
    }
}

/// Reads a namespace and makes a tap for each of its interfaces, in their order. Blocks.
pub fn join(namespace: BorrowedFd) -> Result<(Network, Vec<OwnedFd>, Joined), SandboxError> {
    inside(namespace, || {
        let socket = Socket::open().map_err(failed("open a netlink socket"))?;
        let mut joined = Joined {
            socket,
            redirects: Vec::new(),
        };
        let network = read(&mut joined.socket)?;
        let mut taps = Vec::new();
        for interface in &network.interfaces {
            let joining = |source: io::Error| {
                SandboxError::failed(
                    format!("join interface {} to a tap", interface.name),
                    source,
                )
            };
            let (tap, index) =
                tap::make(&mut joined.socket, interface.mtu.into()).map_err(joining)?;
            taps.push(tap);
            let redirect = tc::redirect(&mut joined.socket, interface.index, index);
            joined.redirects.push(redirect.map_err(joining)?);
        }
        Ok((network, taps, joined))
    })
}

/// Takes from a namespace what a killed shim has left there: the redirections, and the queueing disciplines of
/// the interfaces with these numbers. The VM has ended. A namespace that is gone is no error.
pub fn undo(path: &Path, qdiscs: &[u32]) -> Result<(), SandboxError> {
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
fn inside<T: Send>(
    namespace: BorrowedFd,
    work: impl FnOnce() -> Result<T, SandboxError> + Send,
) -> Result<T, SandboxError> {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| failed("enter the pod's network namespace")(errno.into()))?;
            work()
        });
        let panicked = |_| {
            let what = "look into the pod's network namespace: the thread panicked";
            SandboxError::new(SandboxErrorKind::Failed, what)
        };
        thread.join().map_err(panicked)?
    })
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError::failed(step, source)
}

fn read(socket: &mut Socket) -> Result<Network, SandboxError> {
    let links = socket.links().map_err(failed("list the interfaces"))?;
    let addresses = socket.addresses().map_err(failed("list the addresses"))?;
    let mut network = Network::default();
    for link in &links {
        let own = |address: &&Address| address.link == link.index;
        let addresses: Vec<_> = addresses.iter().filter(own).cloned().collect();
        network.interfaces.extend(interface(link, addresses)?);
    }
    if network.interfaces.len() > MAX_INTERFACES {
        return Err(SandboxError::unsupported(
            format_args!("a network of {} interfaces", network.interfaces.len()),
            format_args!("a virtual machine has at most {MAX_INTERFACES}"),
        ));
    }
    let rules = socket
        .rules()
        .map_err(failed("list the rules of routing"))?;
    if let Some(priority) = rules.iter().find(|rule| !OWN_RULES.contains(rule)) {
        return Err(SandboxError::unsupported(
            format_args!("policy routing in the pod's network (rule {priority})"),
            "the guest has the rules that every network begins with",
        ));
    }
    for route in socket.routes().map_err(failed("list the routes"))? {
        network.routes.extend(named_route(route, &links)?);
    }
    for it in socket.neighbours().map_err(failed("list the neighbours"))? {
        let name = name_of(&links, it.link);
        let joined = network
            .interfaces
            .iter()
            .any(|found| found.index == it.link);
        if let Some(name) = name
            && it.is_permanent()
            && it.mac.len() == 6
            && joined
        {
            network.neighbours.push(Named {
                interfaces: vec![name],
                it,
            });
        }
    }
    Ok(network)
}

/// An interface for the guest; none if it is nobody's.
fn interface(link: &Link, addresses: Vec<Address>) -> Result<Option<Interface>, SandboxError> {
    let Link { name, hardware, .. } = link;
    let refuse = |why: String| {
        let kind = link.kind.as_deref().unwrap_or("without a name");
        Err(SandboxError::unsupported(
            format_args!("interface {name} of the pod's network (of kind {kind})"),
            why,
        ))
    };
    if *hardware == libc::ARPHRD_LOOPBACK {
        return Ok(None);
    }
    if name.starts_with(TAP_PREFIX) {
        let why = "another virtual machine is joined to this network namespace";
        return refuse(why.to_owned());
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
    let Some(mtu) = MTUS.contains(&link.mtu).then_some(link.mtu as u16) else {
        return refuse(format!("its MTU is {}", link.mtu));
    };
    Ok(Some(Interface {
        index: link.index,
        name: name.clone(),
        mac,
        mtu,
        up: link.is_up(),
        addresses,
    }))
}

/// A route that the guest must be given: not those that the kernel has for itself, or that a router tells.
fn named_route(route: Route, links: &[Link]) -> Result<Option<Named<Route>>, SandboxError> {
    const RTM_F_CLONED: u32 = 0x200;
    const RTPROT_RA: u8 = 9;
    let leads_nowhere = [
        libc::RTN_BLACKHOLE,
        libc::RTN_UNREACHABLE,
        libc::RTN_PROHIBIT,
    ];
    let told = route.protocol == RTPROT_RA || route.flags & RTM_F_CLONED != 0;
    let own = route.table == u32::from(libc::RT_TABLE_LOCAL)
        || route.kind != libc::RTN_UNICAST && !leads_nowhere.contains(&route.kind);
    if told || own {
        return Ok(None);
    }
    let (to, prefix) = (route.destination, route.prefix);
    if route.wraps {
        return Err(SandboxError::unsupported(
            format_args!("route {to}/{prefix} of the pod's network"),
            "it wraps what it carries (an encap route)",
        ));
    }
    let mut route = route;
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
