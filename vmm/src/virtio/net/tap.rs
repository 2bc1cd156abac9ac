//! A tap of the host: one read or write is one frame, with a header before it.
//!
//! The shim opens the tap and chooses its name and place. We check that it can serve as a device at
//! all (Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::features::{FEATURE_GUEST_CSUM, FEATURE_GUEST_TSO4, FEATURE_GUEST_TSO6};
use super::header::SIZE;
use crate::virtio::number;

#[derive(Debug, thiserror::Error)]
pub enum BadTap {
    /// The kernel says that it is no tap.
    #[error("add an interface: the descriptor is not an attached tap")]
    NoTap(#[source] io::Error),
    /// It is attached with flags other than those we need.
    #[error("add an interface: the descriptor's flags are {0:#x}, not a tap's with vnet headers")]
    Flags(u16),
    #[error("add an interface: {step}")]
    Set {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

/// An attached tap. Dropping it closes the descriptor; with the last descriptor the interface goes.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
    /// Whether the ioctls of a tap work. In tests a socket takes its place.
    is_tap: bool,
}

impl Tap {
    /// Takes the descriptor if it is a tap whose frames have virtio's header.
    pub fn new(file: OwnedFd) -> Result<Self, BadTap> {
        // SAFETY: `ifreq` is plain data, of which all zeros is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes one `struct ifreq`; its address is live and exclusively ours. On
        // a descriptor of another kind the call fails and writes nothing.
        let got = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        if got != 0 {
            return Err(BadTap::NoTap(io::Error::last_os_error()));
        }
        // SAFETY: TUNGETIFF has set this member of the union; any bytes are a `c_short`.
        let flags = unsafe { request.ifr_ifru.ifru_flags }.cast_unsigned();
        // IFF_NO_PI can't be compared: in the answer its bit means IFF_NOFILTER.
        let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR;
        let bits = libc::c_int::from(flags);
        if bits & wanted != wanted || bits & libc::IFF_MULTI_QUEUE != 0 {
            return Err(BadTap::Flags(flags));
        }
        let size = number::int(SIZE).map_err(|source| BadTap::Set {
            step: "take the size of its headers",
            source,
        })?;
        // SAFETY: TUNSETVNETHDRSZ reads one int, whose address is live.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        if set != 0 {
            return Err(BadTap::Set {
                step: "set the size of its headers",
                source: io::Error::last_os_error(),
            });
        }
        rustix::io::ioctl_fionbio(&file, true).map_err(|errno| BadTap::Set {
            step: "make it non-blocking",
            source: errno.into(),
        })?;
        Ok(Self { file, is_tap: true })
    }

    /// From now on leaves to the driver what it takes, by the negotiated features.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let mut offloads = 0;
        // The others build on this one (virtio 1.2, 5.1.3.1); without it the tap refuses them.
        if features & FEATURE_GUEST_CSUM != 0 {
            offloads |= libc::TUN_F_CSUM;
            if features & FEATURE_GUEST_TSO4 != 0 {
                offloads |= libc::TUN_F_TSO4;
            }
            if features & FEATURE_GUEST_TSO6 != 0 {
                offloads |= libc::TUN_F_TSO6;
            }
        }
        if !self.is_tap {
            return Ok(());
        }
        // SAFETY: TUNSETOFFLOAD takes its argument as a number.
        match unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// A socket in the place of a tap; each message is a frame.
    #[cfg(test)]
    pub fn of_socket(file: OwnedFd) -> Self {
        Self {
            file,
            is_tap: false,
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
