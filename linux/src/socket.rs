//! Options of sockets that rustix does not have.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// An option, with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketOption {
    /// NETLINK_CAP_ACK: an error comes without the whole request behind it.
    NetlinkShortErrors,
    /// NETLINK_EXT_ACK: an error comes with the kernel's words for it.
    NetlinkWords,
    /// SO_VM_SOCKETS_CONNECT_TIMEOUT: how long a vsock connect may take; whole seconds.
    VsockConnectTimeout(Duration),
}

const SOL_NETLINK: libc::c_int = 270;
const NETLINK_CAP_ACK: libc::c_int = 10;
const NETLINK_EXT_ACK: libc::c_int = 11;
/// SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW: for a `timeval` of two 64-bit words (linux/vm_sockets.h).
const CONNECT_TIMEOUT: libc::c_int = 8;

/// Sets an option.
pub fn set(socket: impl AsFd, option: SocketOption) -> io::Result<()> {
    let on = 1i32.to_ne_bytes();
    let mut time = [0; 16];
    let (level, name, value) = match option {
        SocketOption::NetlinkShortErrors => (SOL_NETLINK, NETLINK_CAP_ACK, on.as_slice()),
        SocketOption::NetlinkWords => (SOL_NETLINK, NETLINK_EXT_ACK, on.as_slice()),
        SocketOption::VsockConnectTimeout(timeout) => {
            let (seconds, _microseconds) = time.split_at_mut(8);
            seconds.copy_from_slice(&timeout.as_secs().to_ne_bytes());
            (libc::AF_VSOCK, CONNECT_TIMEOUT, time.as_slice())
        }
    };
    // SAFETY: for the options above the kernel reads a plain value of the length passed, which is
    // that of a live slice. It copies the value byte by byte, so no alignment is asked for.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

    #[test]
    fn a_netlink_socket_takes_its_own_options() {
        let flags = SocketFlags::CLOEXEC;
        let kind = SocketType::RAW;
        let netlink = socket_with(AddressFamily::NETLINK, kind, flags, None);
        let netlink = netlink.unwrap();
        set(&netlink, SocketOption::NetlinkShortErrors).unwrap();
        set(&netlink, SocketOption::NetlinkWords).unwrap();
        let foreign = SocketOption::VsockConnectTimeout(Duration::from_secs(1));
        assert!(set(&netlink, foreign).is_err());
    }

    /// A kernel without vsock has no such socket to try it on.
    #[test]
    fn a_vsock_socket_takes_its_patience() {
        let flags = SocketFlags::CLOEXEC;
        let vsock = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None);
        if let Ok(vsock) = vsock {
            let patience = SocketOption::VsockConnectTimeout(Duration::from_secs(20));
            set(&vsock, patience).unwrap();
        }
    }
}
