//! Notices of changes in a network namespace.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// RTMGRP_* of linux/rtnetlink.h: interfaces, neighbours, addresses and routes of both families.
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

/// A socket that becomes readable when interfaces, neighbours, addresses or routes change in the
/// network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Changes(OwnedFd);

impl Changes {
    /// Opens a non-blocking socket.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Without a protocol it is the first one, NETLINK_ROUTE.
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&fd, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self(fd))
    }

    /// Takes all notices. `false`: there was none.
    pub fn take(&self) -> io::Result<bool> {
        let (mut some, mut part) = (false, [0; 4096]);
        loop {
            match recv(&self.0, &mut part, RecvFlags::empty()) {
                Ok(_) | Err(Errno::NOBUFS) => some = true, // it lost notices, so there were some
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(some),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl std::os::fd::AsRawFd for Changes {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}
