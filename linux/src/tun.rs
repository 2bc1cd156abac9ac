//! The calls of a tap's own (Documentation/networking/tuntap.rst, linux/if_tun.h).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{c_int, c_short, c_uint, c_ulong};

/// `struct ifreq` as TUNSETIFF has it: the rest of its union is not its.
#[repr(C)]
#[derive(Default)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

/// Attaches an open `/dev/net/tun` to a new interface and answers its name. `template` is at most
/// 15 bytes; a `%d` in it becomes a number. `flags` are `IFF_TAP` and others of linux/if_tun.h.
pub fn attach(device: impl AsFd, template: &str, flags: c_int) -> io::Result<String> {
    let mut request = Request::default();
    let Some(name) = request.name.get_mut(..template.len()) else {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    };
    name.copy_from_slice(template.as_bytes());
    let flags = u16::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    request.flags = flags.cast_signed();
    ioctl(device, Call::Attach(&mut request))?;
    let name = request.name.split(|byte| *byte == 0).next();
    Ok(String::from_utf8_lossy(name.unwrap_or_default()).into_owned())
}

/// Sets the size of the header before each frame.
pub fn set_header_size(device: impl AsFd, size: c_int) -> io::Result<()> {
    ioctl(device, Call::SetHeaderSize(&size))
}

/// Sets what whoever reads the frames takes on itself: `TUN_F_…`.
pub fn set_offloads(device: impl AsFd, offloads: c_uint) -> io::Result<()> {
    ioctl(device, Call::SetOffloads(offloads))
}

enum Call<'a> {
    Attach(&'a mut Request),
    SetHeaderSize(&'a c_int),
    SetOffloads(c_uint),
}

fn ioctl(device: impl AsFd, call: Call) -> io::Result<()> {
    let (number, argument) = match call {
        Call::Attach(request) => (libc::TUNSETIFF, std::ptr::from_mut(request) as c_ulong),
        Call::SetHeaderSize(size) => (libc::TUNSETVNETHDRSZ, std::ptr::from_ref(size) as c_ulong),
        Call::SetOffloads(offloads) => (libc::TUNSETOFFLOAD, c_ulong::from(offloads)),
    };
    // SAFETY: the first reads and writes one `struct ifreq`, of which it gets a live and exclusive
    // one whose name ends with a zero byte or is refused. The second reads a live int. The last
    // takes a number. A descriptor of another kind refuses all of these.
    match unsafe { libc::ioctl(device.as_fd().as_raw_fd(), number, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::UnshareFlags;

    /// Needs root, and a kernel with taps.
    #[test]
    fn a_tap_is_made_and_takes_its_settings() {
        std::thread::spawn(|| {
            crate::namespace::unshare(UnshareFlags::NEWNET).unwrap();
            let device = std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun");
            let Ok(device) = device else { return };
            let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            assert!(set_header_size(&device, 12).is_err());
            assert_eq!(attach(&device, "tap-x%d", wanted).unwrap(), "tap-x0");
            set_header_size(&device, 12).unwrap();
            set_offloads(&device, libc::TUN_F_CSUM).unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(set_header_size(&file, 12).is_err());
        assert!(attach(&file, "a-name-of-sixteen", libc::IFF_TAP).is_err());
    }
}
