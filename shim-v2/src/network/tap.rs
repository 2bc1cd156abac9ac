//! A tap in the pod's network namespace: the host's end of a network interface of the VM's.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use kata_like_netlink::{Change, Socket};

/// What the names of our taps begin with; the kernel counts them.
pub const TAP_PREFIX: &str = "kltap";

/// Makes a tap in the calling thread's network namespace, up, with this MTU and without an address
/// of its own. Answers the descriptor, with which it goes, and its number.
pub fn make(socket: &mut Socket, mtu: u32) -> io::Result<(OwnedFd, u32)> {
    let device = File::options().read(true).write(true).open("/dev/net/tun");
    let device =
        device.map_err(|error| io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;
    // SAFETY: `ifreq` is plain data, of which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let template = format!("{TAP_PREFIX}%d");
    for (to, from) in request.ifr_name.iter_mut().zip(template.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short; // all of them are in 16 bits
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose live and exclusive address it
    // gets; the template ends with a NUL, for the name is longer.
    if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|byte| byte.cast_unsigned())
        .collect();
    let name = kata_like_netlink::text(&name);
    let links = socket.links()?;
    let tap = links.iter().find(|link| link.name == name);
    let index = tap.ok_or(io::ErrorKind::NotFound)?.index;
    socket.set_link(index, &Change::Mtu(mtu))?;
    // The guest would hear its neighbour discovery. A kernel without IPv6 has none.
    if let Err(error) = socket.set_link(index, &Change::NoOwnAddress)
        && error.raw_os_error() != Some(libc::EAFNOSUPPORT)
    {
        return Err(error);
    }
    socket.set_link(index, &Change::Up)?;
    Ok((device.into(), index))
}
