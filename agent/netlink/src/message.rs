//! Messages and their attributes as bytes (netlink(7)): native byte order, everything aligned to
//! four.

use std::net::IpAddr;

/// struct nlmsghdr: length, type, flags, sequence, port.
pub(crate) const HEADER: usize = 16;
/// struct rtattr: length, type.
const ATTRIBUTE: usize = 4;
/// NLA_F_NESTED and NLA_F_NET_BYTEORDER.
const TYPE_FLAGS: u16 = 0xc000;

/// A request that is being built.
#[derive(Clone, Debug)]
pub struct Message(Vec<u8>);

impl Message {
    /// A request of this type with these flags and the family's own fixed header. The socket adds
    /// NLM_F_REQUEST and NLM_F_ACK.
    pub fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        let (_length, rest) = bytes.split_at_mut(4);
        let (kind_bytes, rest) = rest.split_at_mut(2);
        kind_bytes.copy_from_slice(&kind.to_ne_bytes());
        let (flag_bytes, _) = rest.split_at_mut(2);
        flag_bytes.copy_from_slice(&(flags as u16).to_ne_bytes()); // all flags are in 16 bits
        let mut message = Self(bytes);
        message.0.extend_from_slice(fixed);
        message.align();
        message
    }

    /// Adds an attribute. If it is too long the kernel refuses the whole message.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.nest(kind, |inner| inner.0.extend_from_slice(value))
    }

    /// Adds an attribute that contains what `fill` adds.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let begin = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        fill(self);
        self.set_length(begin);
        self.align();
        self
    }

    /// Adds bytes as they are: a fixed structure inside an attribute.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Like [`Message::nest`], for a structure that begins with its own length in 16 bits, as
    /// `rtnexthop` does.
    pub(crate) fn counted(&mut self, rest: &[u8], fill: impl FnOnce(&mut Self)) -> &mut Self {
        let begin = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(rest);
        fill(self);
        self.set_length(begin);
        self
    }

    /// Writes the length from `begin` to the end as 16 bits at `begin`.
    fn set_length(&mut self, begin: usize) {
        let length = u16::try_from(self.0.len() - begin).unwrap_or(u16::MAX);
        for (byte, value) in self.0.iter_mut().skip(begin).zip(length.to_ne_bytes()) {
            *byte = value;
        }
    }

    fn align(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// The whole message, with these further flags and this sequence number.
    pub(crate) fn finish(mut self, flags: i32, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        let before = number(&self.0, 4) >> 16;
        let flags = before as u16 | flags as u16;
        let put = |bytes: &mut Vec<u8>, at: usize, value: &[u8]| {
            for (byte, value) in bytes.iter_mut().skip(at).zip(value) {
                *byte = *value;
            }
        };
        put(&mut self.0, 0, &length.to_ne_bytes());
        put(&mut self.0, 6, &flags.to_ne_bytes());
        put(&mut self.0, 8, &sequence.to_ne_bytes());
        self.0
    }
}

/// The attributes in some bytes, in their order. A truncated attribute ends them.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Attributes<'a> {
    /// The first attribute of this type.
    pub fn get(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|(found, _)| *found == kind)
            .map(|(_, value)| value)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (header, _) = self.0.split_at_checked(ATTRIBUTE)?;
        let [l0, l1, k0, k1] = <[u8; 4]>::try_from(header).ok()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = self.0.get(ATTRIBUTE..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & !TYPE_FLAGS, value))
    }
}

/// Four bytes from `at` on as a number; 0 if there are fewer.
pub fn number(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk());
    four.map_or(0, |four| u32::from_ne_bytes(*four))
}

/// One byte; 0 if it is not there.
pub(crate) fn byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or_default()
}

/// A string up to a NUL or the end.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    let bytes = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

/// An IP address; its length tells the family.
pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// An address in network byte order.
pub fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

/// AF_INET or AF_INET6.
pub(crate) fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// The family's unspecified address: 0.0.0.0 or ::.
pub(crate) fn unspecified(family: u8) -> IpAddr {
    match libc::c_int::from(family) {
        libc::AF_INET6 => IpAddr::from([0; 16]),
        _ => IpAddr::from([0; 4]),
    }
}
