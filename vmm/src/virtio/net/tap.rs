//! A tap of the host: one read or write is one frame, with a header before it.
//!
//! The shim opens the tap and chooses its name and place. We check that it can serve as a device at
//! all (Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kata_like_linux::tun;

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
    Flags(libc::c_int),
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
        let flags = tun::flags(&file).map_err(BadTap::NoTap)?;
        // IFF_NO_PI can't be compared: in the answer its bit means IFF_NOFILTER.
        let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR;
        if flags & wanted != wanted || flags & libc::IFF_MULTI_QUEUE != 0 {
            return Err(BadTap::Flags(flags));
        }
        number::int(SIZE)
            .and_then(|size| tun::set_header_size(&file, size))
            .map_err(|source| BadTap::Set {
                step: "set the size of its headers",
                source,
            })?;
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
        tun::set_offloads(&self.file, offloads)
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
