//! Neighbours: which address at layer 2 belongs to which IP address (RTM_*NEIGH).

use std::io;
use std::net::IpAddr;

use crate::message::{Attributes, Message, address, address_bytes, byte, family, number};
use crate::socket::Socket;

/// The size of struct ndmsg.
const FIXED: usize = 12;

/// An entry of the neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number.
    pub link: u32,
    /// Its address at layer 3.
    pub address: IpAddr,
    /// Its address at layer 2.
    pub mac: Vec<u8>,
    /// How reliable the entry is: NUD_*.
    pub state: u16,
    /// Properties: NTF_*.
    pub flags: u8,
}

impl Neighbour {
    /// Whether an administrator has set it, so that it stays until it is removed.
    pub fn is_permanent(&self) -> bool {
        self.state & libc::NUD_PERMANENT != 0
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let attributes = Attributes(bytes.get(FIXED..)?);
        Some(Self {
            link: number(bytes, 4),
            address: attributes.get(libc::NDA_DST).and_then(address)?,
            mac: attributes
                .get(libc::NDA_LLADDR)
                .unwrap_or_default()
                .to_vec(),
            state: u16::from_ne_bytes([byte(bytes, 8), byte(bytes, 9)]),
            flags: byte(bytes, 10),
        })
    }
}

impl Socket {
    /// The neighbours of IPv4 and IPv6.
    pub fn neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        let ask = Message::new(libc::RTM_GETNEIGH, 0, &[0; FIXED]);
        self.list(&ask, libc::RTM_NEWNEIGH, Neighbour::parse)
    }

    /// Adds a neighbour, or replaces the one with its address.
    pub fn add_neighbour(&mut self, it: &Neighbour) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        self.change_neighbour(libc::RTM_NEWNEIGH, flags, it)
    }

    /// Removes the neighbour with this address.
    pub fn remove_neighbour(&mut self, it: &Neighbour) -> io::Result<()> {
        self.change_neighbour(libc::RTM_DELNEIGH, 0, it)
    }

    fn change_neighbour(&mut self, kind: u16, flags: i32, it: &Neighbour) -> io::Result<()> {
        let mut fixed = vec![family(it.address), 0, 0, 0];
        fixed.extend_from_slice(&it.link.to_ne_bytes());
        fixed.extend_from_slice(&it.state.to_ne_bytes());
        fixed.extend_from_slice(&[it.flags, 0]);
        let mut message = Message::new(kind, flags, &fixed);
        message
            .attribute(libc::NDA_DST, &address_bytes(it.address))
            .attribute(libc::NDA_LLADDR, &it.mac);
        self.change(message)
    }
}
