//! Network interfaces (RTM_*LINK).

use std::io;

use crate::message::{Attributes, Message, number, text};
use crate::socket::Socket;

/// The size of struct ifinfomsg.
const FIXED: usize = 16;

const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_IPVLAN_MODE: u16 = 1;

const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// At most 15 bytes.
    pub name: String,
    /// What made it (`veth`, `macvlan`, …). `None`: hardware, or a kind without a name such as
    /// loopback.
    pub kind: Option<String>,
    /// The number of the bridge or bond that it is a port of.
    pub master: Option<u32>,
    /// The number of the interface below it, or of its pair, if that is in the same namespace.
    pub lower: Option<u32>,
    /// IPVLAN_MODE_* of an ipvlan.
    pub ipvlan_mode: Option<u16>,
    /// Its layer 2: ARPHRD_*.
    pub hardware: u16,
    /// Its state: IFF_*.
    pub flags: u32,
    /// Its address at layer 2; empty if it has none.
    pub mac: Vec<u8>,
    /// In bytes.
    pub mtu: u32,
}

impl Link {
    /// Whether an administrator has set it up.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    /// Whether it resolves addresses of layer 2 (ARP).
    pub fn has_arp(&self) -> bool {
        self.flags & libc::IFF_NOARP as u32 == 0
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let attributes = Attributes(bytes.get(FIXED..)?);
        let info = Attributes(attributes.get(libc::IFLA_LINKINFO).unwrap_or_default());
        let kind = info.get(libc::IFLA_INFO_KIND).map(text);
        let mode = Attributes(info.get(IFLA_INFO_DATA).unwrap_or_default()).get(IFLA_IPVLAN_MODE);
        let mode = mode.and_then(|bytes| Some(u16::from_ne_bytes(*bytes.first_chunk()?)));
        let index = number(bytes, 4);
        let number_of = |attribute| attributes.get(attribute).map(|bytes| number(bytes, 0));
        let elsewhere = attributes.get(IFLA_LINK_NETNSID).is_some();
        Some(Self {
            index,
            master: number_of(libc::IFLA_MASTER).filter(|master| *master != 0),
            lower: number_of(libc::IFLA_LINK)
                .filter(|lower| !elsewhere && *lower != 0 && *lower != index),
            ipvlan_mode: mode.filter(|_| kind.as_deref() == Some("ipvlan")),
            name: text(attributes.get(libc::IFLA_IFNAME)?),
            kind,
            hardware: (number(bytes, 0) >> 16) as u16, // behind family and padding
            flags: number(bytes, 8),
            mac: attributes
                .get(libc::IFLA_ADDRESS)
                .unwrap_or_default()
                .to_vec(),
            mtu: number(attributes.get(libc::IFLA_MTU).unwrap_or_default(), 0),
        })
    }
}

/// One change of an interface.
#[derive(Clone, Debug)]
pub enum Change<'a> {
    /// A new name of at most 15 bytes. The interface must be down.
    Name(&'a str),
    /// The largest packet in bytes.
    Mtu(u32),
    /// The kernel makes no IPv6 address for it.
    NoOwnAddress,
    /// It resolves no addresses of layer 2.
    NoArp,
    /// Sets IFF_UP.
    Up,
    /// Clears IFF_UP.
    Down,
}

impl Socket {
    /// All interfaces of the namespace.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let ask = Message::new(libc::RTM_GETLINK, 0, &[0; FIXED]);
        self.list(&ask, libc::RTM_NEWLINK, Link::parse)
    }

    /// Changes an interface.
    pub fn set_link(&mut self, index: u32, change: &Change) -> io::Result<()> {
        let (up, no_arp) = (libc::IFF_UP as u32, libc::IFF_NOARP as u32);
        let (flags, mask) = match change {
            Change::NoArp => (no_arp, no_arp),
            Change::Up => (up, up),
            Change::Down => (0, up),
            _ => (0, 0),
        };
        let mut fixed = Vec::with_capacity(FIXED);
        for word in [0, index, flags, mask] {
            fixed.extend_from_slice(&u32::to_ne_bytes(word));
        }
        let mut message = Message::new(libc::RTM_NEWLINK, 0, &fixed);
        match change {
            Change::Name(name) => {
                message.attribute(libc::IFLA_IFNAME, &[name.as_bytes(), &[0]].concat());
            }
            Change::Mtu(mtu) => {
                message.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
            }
            Change::NoOwnAddress => {
                message.nest(libc::IFLA_AF_SPEC, |families| {
                    families.nest(libc::AF_INET6 as u16, |six| {
                        six.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
                    });
                });
            }
            Change::NoArp | Change::Up | Change::Down => {}
        }
        self.change(message)
    }
}

/// Brings the loopback interface of the calling thread's network namespace up, which gives it
/// 127.0.0.1 and ::1.
pub fn loopback_up() -> io::Result<()> {
    let mut socket = Socket::open()?;
    let links = socket.links()?;
    let is_loopback = |link: &&Link| link.hardware == libc::ARPHRD_LOOPBACK;
    match links.iter().find(is_loopback) {
        Some(link) if !link.is_up() => socket.set_link(link.index, &Change::Up),
        _ => Ok(()),
    }
}
