//! A tap of the host: one read or write is one frame, with a header before it.
//!
//! The shim makes the tap, chooses its place, and sets all that never changes (Linux
//! Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kata_like_boot::TAP_HEADER;
use kata_like_linux::tun;

use super::features::{FEATURE_GUEST_CSUM, FEATURE_GUEST_TSO4, FEATURE_GUEST_TSO6};
use super::header::SIZE;

const _: () = assert!(SIZE == TAP_HEADER);

/// An attached tap. Dropping it closes the descriptor; with the last descriptor the interface goes.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
    /// Whether the ioctls of a tap work. In tests a socket takes its place.
    is_tap: bool,
}

impl Tap {
    /// Takes a tap that is non-blocking, and whose frames have virtio's header.
    pub fn new(file: OwnedFd) -> Self {
        Self { file, is_tap: true }
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
    #[cfg(any(test, feature = "fuzz"))]
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
