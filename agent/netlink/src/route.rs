//! Routes (RTM_*ROUTE), and the priorities of routing rules.

use std::io;
use std::net::IpAddr;

use crate::message::{
    Attributes, Message, address, address_bytes, byte, family, number, unspecified,
};
use crate::socket::Socket;

/// The size of struct rtmsg.
const FIXED: usize = 12;
/// The size of struct rtnexthop.
const HOP: usize = 8;

const RTNH_F_ONLINK: u8 = 4;
const RTA_VIA: u16 = 18;
const RTA_PREF: u16 = 20;
const RTA_ENCAP_TYPE: u16 = 21;

const FRA_PRIORITY: u16 = 6;

/// One hop towards a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The interface's number; 0: none.
    pub link: u32,
    /// The router. `None`: the destination is itself a neighbour.
    pub gateway: Option<IpAddr>,
    /// RTNH_F_ONLINK: the gateway is a neighbour, whatever the addresses say.
    pub on_link: bool,
    /// Its weight among several hops, less one.
    pub weight: u8,
}

/// A route of IPv4 or IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination; the unspecified address with prefix 0 is everywhere.
    pub destination: IpAddr,
    /// How many bits of the destination count.
    pub prefix: u8,
    /// How many bits of a packet's source address must match; 0: any source.
    pub from: u8,
    /// The number of its table.
    pub table: u32,
    /// Who made it: RTPROT_*.
    pub protocol: u8,
    /// How far the destination is: RT_SCOPE_*.
    pub scope: u8,
    /// What happens to packets: RTN_*.
    pub kind: u8,
    /// The type of service that it serves; 0: any.
    pub service: u8,
    /// Its priority among routes to the same destination; the lowest wins.
    pub metric: u32,
    /// The source address for packets that have none yet.
    pub source: Option<IpAddr>,
    /// IPv6's router preference: ICMPV6_ROUTER_PREF_*.
    pub preference: u8,
    /// MTU, window and others: RTAX_* by number.
    pub settings: Vec<(u16, u32)>,
    /// The hops; none if the route leads nowhere.
    pub hops: Vec<Hop>,
    /// The route wraps its packets (RTA_ENCAP). This crate does not read how.
    pub wraps: bool,
    /// Flags of the whole route: RTM_F_CLONED and others.
    pub flags: u32,
}

impl Route {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let attributes = Attributes(bytes.get(FIXED..)?);
        let family = byte(bytes, 0);
        if ![libc::AF_INET, libc::AF_INET6].contains(&libc::c_int::from(family)) {
            return None;
        }
        let find = |kind| attributes.get(kind).and_then(address);
        let word = |kind| attributes.get(kind).map(|value| number(value, 0));
        let hops = match attributes.get(libc::RTA_MULTIPATH) {
            Some(list) => hops(list),
            None => word(libc::RTA_OIF)
                .map(|link| Hop::of(link, attributes, byte(bytes, 8), 0))
                .into_iter()
                .collect(),
        };
        let settings = Attributes(attributes.get(libc::RTA_METRICS).unwrap_or_default());
        Some(Self {
            destination: find(libc::RTA_DST).unwrap_or(unspecified(family)),
            prefix: byte(bytes, 1),
            from: byte(bytes, 2),
            table: word(libc::RTA_TABLE).unwrap_or(u32::from(byte(bytes, 4))),
            protocol: byte(bytes, 5),
            scope: byte(bytes, 6),
            kind: byte(bytes, 7),
            service: byte(bytes, 3),
            metric: word(libc::RTA_PRIORITY).unwrap_or_default(),
            source: find(libc::RTA_PREFSRC),
            preference: byte(attributes.get(RTA_PREF).unwrap_or_default(), 0),
            settings: settings
                .filter(|(_, value)| value.len() == 4)
                .map(|(kind, value)| (kind, number(value, 0)))
                .collect(),
            hops,
            wraps: attributes.get(RTA_ENCAP_TYPE).is_some(),
            flags: number(bytes, 8),
        })
    }
}

impl Hop {
    fn of(link: u32, attributes: Attributes, flags: u8, weight: u8) -> Self {
        let via = attributes.get(RTA_VIA).and_then(|via| via.get(2..)); // behind the family
        let gateway = attributes.get(libc::RTA_GATEWAY).or(via);
        Self {
            link,
            gateway: gateway.and_then(address),
            on_link: flags & RTNH_F_ONLINK != 0,
            weight,
        }
    }

    /// Adds the gateway. A gateway of the other family has an attribute of its own.
    fn put_gateway(&self, of: u8, message: &mut Message) {
        let Some(gateway) = self.gateway else { return };
        let bytes = address_bytes(gateway);
        match family(gateway) {
            same if same == of => message.attribute(libc::RTA_GATEWAY, &bytes),
            other => {
                let other = u16::from(other).to_ne_bytes();
                message.attribute(RTA_VIA, &[&other[..], &bytes].concat())
            }
        };
    }

    fn flags(&self) -> u8 {
        match self.on_link {
            true => RTNH_F_ONLINK,
            false => 0,
        }
    }
}

/// The hops in RTA_MULTIPATH. Each begins with its length, as an attribute does, but contains
/// others.
fn hops(mut list: &[u8]) -> Vec<Hop> {
    let mut hops = Vec::new();
    while list.len() >= HOP {
        let length = usize::from(u16::from_ne_bytes([byte(list, 0), byte(list, 1)]));
        let Some(attributes) = list.get(HOP..length) else {
            break;
        };
        let (flags, weight) = (byte(list, 2), byte(list, 3));
        hops.push(Hop::of(
            number(list, 4),
            Attributes(attributes),
            flags,
            weight,
        ));
        list = list.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

impl Socket {
    /// All routes of IPv4 and IPv6, in all tables.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let ask = Message::new(libc::RTM_GETROUTE, 0, &[0; FIXED]);
        self.list(&ask, libc::RTM_NEWROUTE, Route::parse)
    }

    /// The priorities of the rules that choose a table (`ip rule`), for IPv4 and IPv6.
    pub fn rules(&mut self) -> io::Result<Vec<u32>> {
        // struct fib_rule_hdr is as long as struct rtmsg.
        let ask = Message::new(libc::RTM_GETRULE, 0, &[0; FIXED]);
        self.list(&ask, libc::RTM_NEWRULE, |bytes| {
            let attributes = Attributes(bytes.get(FIXED..)?);
            let priority = attributes.get(FRA_PRIORITY);
            Some(priority.map_or(0, |priority| number(priority, 0)))
        })
    }

    /// Adds a route behind others to the same destination. If it exists already this is no error.
    pub fn add_route(&mut self, it: &Route) -> io::Result<()> {
        // Not NLM_F_REPLACE: for IPv6 that takes a route over another interface for the same one.
        let flags = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
        match self.change_route(libc::RTM_NEWROUTE, flags, it) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done,
        }
    }

    /// Removes a route.
    pub fn remove_route(&mut self, it: &Route) -> io::Result<()> {
        self.change_route(libc::RTM_DELROUTE, 0, it)
    }

    fn change_route(&mut self, kind: u16, how: i32, it: &Route) -> io::Result<()> {
        let of = family(it.destination);
        let one = match it.hops.as_slice() {
            [one] => Some(one),
            _ => None,
        };
        let table = u8::try_from(it.table).unwrap_or(libc::RT_TABLE_UNSPEC);
        let mut fixed = vec![of, it.prefix, 0, it.service, table];
        fixed.extend_from_slice(&[it.protocol, it.scope, it.kind]);
        let flags = one.map_or(0, |hop| u32::from(hop.flags()));
        fixed.extend_from_slice(&flags.to_ne_bytes());
        let mut message = Message::new(kind, how, &fixed);
        if it.prefix > 0 {
            message.attribute(libc::RTA_DST, &address_bytes(it.destination));
        }
        message
            .attribute(libc::RTA_TABLE, &it.table.to_ne_bytes())
            .attribute(libc::RTA_PRIORITY, &it.metric.to_ne_bytes());
        if let Some(source) = it.source {
            message.attribute(libc::RTA_PREFSRC, &address_bytes(source));
        }
        if it.preference != 0 {
            message.attribute(RTA_PREF, &[it.preference]);
        }
        if !it.settings.is_empty() {
            message.nest(libc::RTA_METRICS, |settings| {
                for (kind, value) in &it.settings {
                    settings.attribute(*kind, &value.to_ne_bytes());
                }
            });
        }
        match (one, it.hops.is_empty()) {
            (Some(hop), _) => {
                message.attribute(libc::RTA_OIF, &hop.link.to_ne_bytes());
                hop.put_gateway(of, &mut message);
            }
            (None, true) => {}
            (None, false) => {
                message.nest(libc::RTA_MULTIPATH, |list| {
                    for hop in &it.hops {
                        let mut rest = vec![hop.flags(), hop.weight];
                        rest.extend_from_slice(&hop.link.to_ne_bytes());
                        list.counted(&rest, |attributes| hop.put_gateway(of, attributes));
                    }
                });
            }
        }
        self.change(message)
    }
}
