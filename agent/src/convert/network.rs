//! The pod's network as the wire has it.

use std::net::IpAddr;

use kata_like_agent_protocol::agent::{
    Address as AddressMessage, ConfigureNetworkRequest, Hop as HopMessage,
    Interface as InterfaceMessage, Neighbour as NeighbourMessage, Route as RouteMessage,
    ServeNamesRequest,
};
use kata_like_agent_protocol::status;
use kata_like_failure::Failure;
use kata_like_netlink::{Address, Hop, Named, Neighbour, Route};

use crate::network::{Interface, Network};

/// The longest name of an interface (IFNAMSIZ less its NUL).
const MAX_NAME: usize = 15;

/// Reads the network that the host asks for. The numbers of interfaces in it are still 0.
pub fn network(request: ConfigureNetworkRequest) -> ttrpc::Result<Network> {
    let convert = || {
        Ok(Network {
            interfaces: all(request.interfaces, interface)?,
            routes: all(request.routes, route)?,
            neighbours: all(request.neighbours, neighbour)?,
            remove: request.remove,
        })
    };
    convert().map_err(|error: Failure| status::of(&error))
}

/// Reads the address at which the agent takes questions for names.
pub fn server(request: &ServeNamesRequest) -> ttrpc::Result<IpAddr> {
    let address = ip("address", &request.address).map_err(|error| status::of(&error))?;
    match address.is_loopback() {
        true => Ok(address),
        false => Err(status::of(&Failure::bad(
            "address",
            format!("{address} is no loopback address"),
        ))),
    }
}

fn all<M, T>(messages: Vec<M>, one: fn(M) -> Result<T, Failure>) -> Result<Vec<T>, Failure> {
    messages.into_iter().map(one).collect()
}

fn interface(message: InterfaceMessage) -> Result<Interface, Failure> {
    let slot = message.slot;
    if slot > crate::device::MAX_SLOT {
        return Err(Failure::bad("interfaces.slot", format!("{slot}")));
    }
    Ok(Interface {
        slot,
        name: name("interfaces.name", message.name)?,
        mac: mac("interfaces.mac", &message.mac)?,
        mtu: message.mtu,
        up: message.up,
        no_arp: message.no_arp,
        bound: message.bound,
        addresses: all(message.addresses, address)?,
    })
}

/// Checks a name as the kernel does: no path, no space.
fn name(field: &str, name: String) -> Result<String, Failure> {
    let odd = |byte: u8| byte == b'/' || byte == b':' || byte == 0 || byte.is_ascii_whitespace();
    let wrong = name.is_empty() || name.len() > MAX_NAME || name == "." || name == "..";
    match wrong || name.bytes().any(odd) {
        true => Err(Failure::bad(
            field,
            format!("not an interface's name: {name:?}"),
        )),
        false => Ok(name),
    }
}

fn mac(field: &str, bytes: &[u8]) -> Result<[u8; 6], Failure> {
    let wrong = |_| Failure::bad(field, format!("{} bytes instead of 6", bytes.len()));
    bytes.try_into().map_err(wrong)
}

fn ip(field: &str, bytes: &[u8]) -> Result<IpAddr, Failure> {
    let given = optional_ip(field, bytes)?;
    given.ok_or_else(|| Failure::bad(field, "is missing"))
}

fn optional_ip(field: &str, bytes: &[u8]) -> Result<Option<IpAddr>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let sixteen = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    let wrong = |_| Failure::bad(field, format!("{} bytes instead of 4 or 16", bytes.len()));
    four.or(sixteen).map(Some).map_err(wrong)
}

fn small<T: TryFrom<u32>>(field: &str, value: u32) -> Result<T, Failure> {
    T::try_from(value).map_err(|_| Failure::bad(field, format!("{value} is too large")))
}

fn address(message: AddressMessage) -> Result<Address, Failure> {
    Ok(Address {
        link: 0,
        local: ip("addresses.local", &message.local)?,
        peer: optional_ip("addresses.peer", &message.peer)?,
        prefix: small("addresses.prefix", message.prefix)?,
        scope: small("addresses.scope", message.scope)?,
        flags: 0,
        broadcast: optional_ip("addresses.broadcast", &message.broadcast)?,
    })
}

fn route(message: RouteMessage) -> Result<Named<Route>, Failure> {
    let mut settings = Vec::new();
    for setting in message.settings {
        settings.push((small("routes.settings.kind", setting.kind)?, setting.value));
    }
    let (mut interfaces, mut hops) = (Vec::new(), Vec::new());
    for message in message.hops {
        let (interface, hop) = hop(message)?;
        interfaces.push(interface);
        hops.push(hop);
    }
    let route = Route {
        destination: ip("routes.destination", &message.destination)?,
        prefix: small("routes.prefix", message.prefix)?,
        from: 0,
        table: message.table,
        protocol: small("routes.protocol", message.protocol)?,
        scope: small("routes.scope", message.scope)?,
        kind: small("routes.kind", message.kind)?,
        service: small("routes.service", message.service)?,
        metric: message.metric,
        source: optional_ip("routes.source", &message.source)?,
        preference: small("routes.preference", message.preference)?,
        settings,
        hops,
        wraps: false,
        flags: 0,
    };
    Ok(Named {
        interfaces,
        it: route,
    })
}

fn hop(message: HopMessage) -> Result<(String, Hop), Failure> {
    let hop = Hop {
        link: 0,
        gateway: optional_ip("routes.hops.gateway", &message.gateway)?,
        on_link: message.on_link,
        weight: small("routes.hops.weight", message.weight)?,
    };
    Ok((name("routes.hops.interface", message.interface)?, hop))
}

fn neighbour(message: NeighbourMessage) -> Result<Named<Neighbour>, Failure> {
    let neighbour = Neighbour {
        link: 0,
        address: ip("neighbours.address", &message.address)?,
        mac: mac("neighbours.mac", &message.mac)?.into(),
        state: libc::NUD_PERMANENT,
        flags: 0,
    };
    Ok(Named {
        interfaces: vec![name("neighbours.interface", message.interface)?],
        it: neighbour,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ttrpc::Code;

    fn good() -> ConfigureNetworkRequest {
        let address = AddressMessage {
            local: vec![10, 0, 0, 2],
            prefix: 24,
            ..Default::default()
        };
        let interface = InterfaceMessage {
            slot: 4,
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            up: true,
            addresses: vec![address],
            ..Default::default()
        };
        let hop = HopMessage {
            interface: "eth0".into(),
            gateway: vec![0xfe; 16],
            ..Default::default()
        };
        let route = RouteMessage {
            destination: vec![0; 4],
            hops: vec![hop],
            ..Default::default()
        };
        let neighbour = NeighbourMessage {
            interface: "eth0".into(),
            address: vec![10, 0, 0, 1],
            mac: vec![2; 6],
            ..Default::default()
        };
        ConfigureNetworkRequest {
            interfaces: vec![interface],
            routes: vec![route],
            neighbours: vec![neighbour],
            ..Default::default()
        }
    }

    #[test]
    fn what_the_kernel_could_misread_is_refused_by_its_field() {
        let network = network(good()).unwrap();
        assert_eq!(network.interfaces[0].addresses[0].prefix, 24);
        assert_eq!(network.routes[0].interfaces, ["eth0"]);
        type Change = fn(&mut ConfigureNetworkRequest);
        let changes: [(Change, &str); 9] = [
            (|it| it.interfaces[0].name = "a/b".into(), "interfaces.name"),
            (
                |it| it.interfaces[0].name = "x".repeat(16),
                "interfaces.name",
            ),
            (|it| it.interfaces[0].mac = vec![0; 5], "interfaces.mac"),
            (|it| it.interfaces[0].slot = 64, "interfaces.slot"),
            (
                |it| it.interfaces[0].addresses[0].local = vec![1; 5],
                "addresses.local",
            ),
            (
                |it| it.interfaces[0].addresses[0].prefix = 256,
                "addresses.prefix",
            ),
            (|it| it.routes[0].destination.clear(), "routes.destination"),
            (
                |it| it.routes[0].hops[0].interface.clear(),
                "routes.hops.interface",
            ),
            (|it| it.neighbours[0].mac.clear(), "neighbours.mac"),
        ];
        for (change, field) in changes {
            let mut request = good();
            change(&mut request);
            let Err(ttrpc::Error::RpcStatus(status)) = super::network(request) else {
                panic!("{field} is taken");
            };
            assert_eq!(status.code(), Code::INVALID_ARGUMENT);
            assert!(status.message.starts_with(field), "{}", status.message);
        }
    }
}
