//! Namespaces of a thread's own.

use std::io;

use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use crate::numbers::Call;

/// unshare(2): the calling thread gets namespaces of its own, or with `FS` a working directory of
/// its own. EINVAL for `FILES`: threads whose descriptors mean different files would mix them up.
pub fn unshare(kinds: UnshareFlags) -> io::Result<()> {
    if kinds.contains(UnshareFlags::FILES) {
        return Err(Errno::INVAL.into());
    }
    Call::Unshare(kinds.bits().cast_signed()).make()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gets_a_host_name_of_its_own() {
        let link = || std::fs::read_link("/proc/thread-self/ns/uts").unwrap();
        let apart = std::thread::spawn(move || unshare(UnshareFlags::NEWUTS).map(|()| link()));
        assert_ne!(apart.join().unwrap().unwrap(), link());
    }

    #[test]
    fn the_table_of_descriptors_stays_shared() {
        let refused = unshare(UnshareFlags::FILES | UnshareFlags::NEWUTS).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }
}
