//! Interfaces.

use std::io;

use crate::message::{Attributes, Message, number, text};
use crate::socket::Socket;

/// struct ifinfomsg.
const FIXED: usize = 16;

const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What made it (`veth`, `macvlan`, …); none: hardware, or a kind without a name such as loopback.
    pub kind: Option<String>,
    /// What it is at layer 2: ARPHRD_*.
    pub hardware: u16,
    /// IFF_*.
    pub flags: u32,
    /// Its address at layer 2.
    pub mac: Vec<u8>,
    /// Its MTU in bytes.
    pub mtu: u32,
}

impl Link {
    /// Whether it is up, by its administrator's will.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let attributes = Attributes(bytes.get(FIXED..)?);
        let kind = attributes
            .get(libc::IFLA_LINKINFO)
            .and_then(|info| Attributes(info).get(libc::IFLA_INFO_KIND));
        Some(Self {
            index: number(bytes, 4),
            name: text(attributes.get(libc::IFLA_IFNAME)?),
            kind: kind.map(text),
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

/// What is to become different of an interface.
#[derive(Clone, Debug)]
pub enum Change<'a> {
    /// Its name: at most 15 bytes. It must be down.
    Name(&'a str),
    /// Its MTU.
    Mtu(u32),
    /// The kernel gives it no IPv6 address of its own making.
    NoOwnAddress,
    /// Up.
    Up,
    /// Down.
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
        let up = libc::IFF_UP as u32;
        let (flags, mask) = match change {
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
            Change::Up | Change::Down => {}
        }
        self.change(message)
    }
}
