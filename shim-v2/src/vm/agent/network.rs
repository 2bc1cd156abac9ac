//! The pod's network as the wire has it.

use std::net::IpAddr;

use kata_like_agent_protocol::agent;
use kata_like_netlink::{Address, Hop, Named, Neighbour, Route, address_bytes};
use kata_like_proxy::wire::Method;

use super::{ASK, Agent, Limit, MAKE};
use kata_like_failure::Failure;

/// An interface of the pod, as the host has it and the guest is to have it.
#[derive(Clone, Debug)]
pub struct Interface {
    /// Its number in the namespace on the host.
    pub index: u32,
    pub name: String,
    /// Its address at layer 2.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Whether it is up.
    pub up: bool,
    /// Whether addresses at layer 2 are asked for on it.
    pub arp: bool,
    pub addresses: Vec<Address>,
}

/// An interface, and where the VM has it.
#[derive(Debug)]
pub struct GuestInterface {
    /// N of `virtio-mmio.N`.
    pub slot: u32,
    /// The interface on the host.
    pub interface: Interface,
    /// Whether the guest has it already.
    pub bound: bool,
}

impl Agent {
    /// Gives the guest its network; with `remove` takes addresses, routes and neighbours from it.
    pub async fn configure_network(
        &self,
        interfaces: Vec<GuestInterface>,
        routes: Vec<Named<Route>>,
        neighbours: Vec<Named<Neighbour>>,
        remove: bool,
    ) -> Result<(), Failure> {
        let request = agent::ConfigureNetworkRequest {
            interfaces: interfaces.into_iter().map(interface).collect(),
            routes: routes.into_iter().map(route).collect(),
            neighbours: neighbours.into_iter().map(neighbour).collect(),
            remove,
            ..Default::default()
        };
        let what = "set the network up in the guest";
        self.call(what, Limit::of(MAKE), Method::ConfigureNetwork, &request)
            .await
    }

    /// Has the guest take questions to the name server at this loopback address.
    pub async fn serve_names(&self, address: IpAddr) -> Result<(), Failure> {
        let request = agent::ServeNamesRequest {
            address: address_bytes(address),
            ..Default::default()
        };
        let what = format!("take questions at {address} in the guest");
        self.call(&what, Limit::of(ASK), Method::ServeNames, &request)
            .await
    }
}

fn optional(address: Option<IpAddr>) -> Vec<u8> {
    address.map(address_bytes).unwrap_or_default()
}

fn interface(
    GuestInterface {
        slot,
        interface,
        bound,
    }: GuestInterface,
) -> agent::Interface {
    let address = |address: Address| agent::Address {
        local: address_bytes(address.local),
        peer: optional(address.peer),
        prefix: address.prefix.into(),
        scope: address.scope.into(),
        broadcast: optional(address.broadcast),
        ..Default::default()
    };
    agent::Interface {
        slot,
        name: interface.name,
        mac: interface.mac.into(),
        mtu: interface.mtu.into(),
        up: interface.up,
        no_arp: !interface.arp,
        bound,
        addresses: interface.addresses.into_iter().map(address).collect(),
        ..Default::default()
    }
}

fn route(Named { interfaces, it }: Named<Route>) -> agent::Route {
    let hop = |(interface, hop): (String, Hop)| agent::Hop {
        interface,
        gateway: optional(hop.gateway),
        on_link: hop.on_link,
        weight: hop.weight.into(),
        ..Default::default()
    };
    let setting = |(kind, value): (u16, u32)| agent::RouteSetting {
        kind: kind.into(),
        value,
        ..Default::default()
    };
    agent::Route {
        destination: address_bytes(it.destination),
        prefix: it.prefix.into(),
        table: it.table,
        protocol: it.protocol.into(),
        scope: it.scope.into(),
        kind: it.kind.into(),
        service: it.service.into(),
        metric: it.metric,
        source: optional(it.source),
        preference: it.preference.into(),
        settings: it.settings.into_iter().map(setting).collect(),
        hops: interfaces.into_iter().zip(it.hops).map(hop).collect(),
        ..Default::default()
    }
}

fn neighbour(Named { interfaces, it }: Named<Neighbour>) -> agent::Neighbour {
    agent::Neighbour {
        interface: interfaces.into_iter().next().unwrap_or_default(),
        address: address_bytes(it.address),
        mac: it.mac,
        ..Default::default()
    }
}
