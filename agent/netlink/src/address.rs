//! IP addresses of interfaces (RTM_*ADDR).

use std::io;
use std::net::IpAddr;

use crate::message::{Attributes, Message, address, address_bytes, byte, family, number};
use crate::socket::Socket;

/// The size of struct ifaddrmsg.
const FIXED: usize = 8;

/// An IP address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's number.
    pub link: u32,
    /// The address itself.
    pub local: IpAddr,
    /// The address of the other end, on a link whose two ends have no network in common.
    pub peer: Option<IpAddr>,
    /// How many bits the network's part has; with a peer, of the peer's address.
    pub prefix: u8,
    /// How far the address is valid: RT_SCOPE_*.
    pub scope: u8,
    /// Properties: IFA_F_*.
    pub flags: u32,
    /// IPv4's broadcast address of the network.
    pub broadcast: Option<IpAddr>,
}

impl Address {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let attributes = Attributes(bytes.get(FIXED..)?);
        let find = |kind| attributes.get(kind).and_then(address);
        // IFA_LOCAL is the address if there is a peer, and always for IPv4
        // (include/uapi/linux/if_addr.h).
        let (far, near) = (find(libc::IFA_ADDRESS), find(libc::IFA_LOCAL));
        let local = near.or(far)?;
        Some(Self {
            link: number(bytes, 4),
            local,
            peer: far.filter(|far| *far != local),
            prefix: byte(bytes, 1),
            scope: byte(bytes, 3),
            flags: match attributes.get(libc::IFA_FLAGS) {
                Some(flags) => number(flags, 0),
                None => u32::from(byte(bytes, 2)),
            },
            broadcast: find(libc::IFA_BROADCAST),
        })
    }
}

impl Socket {
    /// All addresses of the namespace.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let ask = Message::new(libc::RTM_GETADDR, 0, &[0; FIXED]);
        self.list(&ask, libc::RTM_NEWADDR, Address::parse)
    }

    /// Gives an interface an address.
    pub fn add_address(&mut self, it: &Address) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        self.change_address(libc::RTM_NEWADDR, flags, it)
    }

    /// Takes an address from an interface.
    pub fn remove_address(&mut self, it: &Address) -> io::Result<()> {
        self.change_address(libc::RTM_DELADDR, 0, it)
    }

    fn change_address(&mut self, kind: u16, flags: i32, it: &Address) -> io::Result<()> {
        let mut fixed = vec![family(it.local), it.prefix, 0, it.scope];
        fixed.extend_from_slice(&it.link.to_ne_bytes());
        let mut message = Message::new(kind, flags, &fixed);
        message
            .attribute(libc::IFA_LOCAL, &address_bytes(it.local))
            .attribute(
                libc::IFA_ADDRESS,
                &address_bytes(it.peer.unwrap_or(it.local)),
            )
            .attribute(libc::IFA_FLAGS, &it.flags.to_ne_bytes());
        if let Some(broadcast) = it.broadcast {
            message.attribute(libc::IFA_BROADCAST, &address_bytes(broadcast));
        }
        self.change(message)
    }
}
