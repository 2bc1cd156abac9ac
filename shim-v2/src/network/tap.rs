//! A tap in the pod's network namespace: the host's end of a network interface of the VM's.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use kata_like_boot::TAP_HEADER;
use kata_like_linux::tun;
use kata_like_netlink::{Change, Socket};

/// What the names of our taps begin with; the kernel counts them.
pub const TAP_PREFIX: &str = "kltap";

/// Makes a tap in the calling thread's network namespace, up, with this MTU and without an address
/// of its own. Answers the descriptor, as the VMM takes it (`AddInterface`) and with which the tap
/// goes, and the tap's number.
pub fn make(socket: &mut Socket, mtu: u32) -> io::Result<(OwnedFd, u32)> {
    let device = File::options().read(true).write(true).open("/dev/net/tun");
    let device =
        device.map_err(|error| io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let name = tun::attach(&device, &format!("{TAP_PREFIX}%d"), flags)?;
    tun::set_header_size(&device, TAP_HEADER as i32)?;
    rustix::io::ioctl_fionbio(&device, true)?;
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
