//! Whether a number is somebody's in the host's database of users.

use std::io;
use std::mem::MaybeUninit;

/// As long as an entry may be (glibc says 1 KiB, and groups of directories make longer ones).
const LONGEST: usize = 64 << 10;

/// Whether a user of the host has this number, as the name service switch knows it: files, and
/// whatever else nsswitch.conf(5) names, which may be asked over a network. Blocks for as long as
/// that takes.
pub fn is_known(uid: u32) -> io::Result<bool> {
    let mut buffer = vec![0u8; LONGEST];
    let mut entry = MaybeUninit::<libc::passwd>::uninit();
    let mut found = std::ptr::null_mut();
    // SAFETY: getpwuid_r(3) writes an entry to the first pointer, its strings to the buffer of the
    // given length, and a pointer to the entry or null to the last. All of them are valid for it
    // until it returns; what it has written is not looked at, but for whether there is one.
    let error = unsafe {
        libc::getpwuid_r(
            uid,
            entry.as_mut_ptr(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            &mut found,
        )
    };
    match error {
        // An entry that does not fit is one.
        0 => Ok(!found.is_null()),
        libc::ERANGE => Ok(true),
        // What some services say of a number that they don't know (getpwuid(3), "ERRORS").
        libc::ENOENT | libc::ESRCH | libc::EBADF | libc::EPERM => Ok(false),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_known_and_not_every_number_is() {
        assert!(is_known(0).unwrap());
        assert!(!is_known(2_100_000_000).unwrap());
    }
}
