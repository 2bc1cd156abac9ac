//! Descriptors by their number: those that a process was started with, and those that must go.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

use crate::lock;
use crate::numbers::Call;

/// The numbers that [`inherited`] has given away.
static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// Takes descriptor `number`, 3 or more, that this process's parent has left open for it. From now
/// on it is close-on-exec.
///
/// EBADF: nothing is open there, or it is something that this process has opened itself, or it was
/// taken before.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    let mut taken = lock(&TAKEN);
    // The first three are the standard library's.
    if number < 3 || taken.contains(&number) {
        return Err(Errno::BADF.into());
    }
    // SAFETY: `borrowed` serves for two calls that fail with EBADF where nothing is open. The
    // result has one owner:
    // - What came through exec lacks close-on-exec, and what the standard library and rustix open
    //   has it. So if the flag is missing, nothing in this process owns the descriptor yet.
    // - The list, which stays locked, gives each number away once.
    unsafe {
        let borrowed = BorrowedFd::borrow_raw(number);
        if fcntl_getfd(borrowed)?.contains(FdFlags::CLOEXEC) {
            return Err(Errno::BADF.into());
        }
        fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
        taken.push(number);
        Ok(OwnedFd::from_raw_fd(number))
    }
}

/// Closes all descriptors whose numbers are in `range`. For a process in which nobody uses them any
/// more: who still owns one gets EBADF, or another file once the number is used again.
pub fn close(range: RangeInclusive<u32>) -> io::Result<()> {
    close_range(range, 0)
}

/// Has all descriptors from `first` on close when this process runs another program.
pub fn close_at_exec(first: u32) -> io::Result<()> {
    close_range(first..=u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(range: RangeInclusive<u32>, flags: libc::c_uint) -> io::Result<()> {
    let (first, last) = range.into_inner();
    Call::CloseRange { first, last, flags }.make()
}

/// Copies descriptors to `first` and the numbers behind it, where they stay open across exec.
/// Whatever was open there is closed. Each must have a number above all of these: see [`lift`].
///
/// Allocates nothing and takes no lock, for it runs between fork and exec.
pub(crate) fn arrange(lifted: &[OwnedFd], first: RawFd) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    for (from, to) in lifted.iter().zip(first..) {
        let from = from.as_raw_fd();
        Call::Duplicate { from, to }.make()?;
    }
    Ok(())
}

/// A copy of `fd`, close-on-exec, whose number is `floor` or more.
pub(crate) fn lift(fd: BorrowedFd<'_>, floor: usize) -> io::Result<OwnedFd> {
    let floor = RawFd::try_from(floor).map_err(|_| Errno::MFILE)?;
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, floor)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn what_this_process_has_opened_is_not_inherited() {
        let (reader, _writer) = pipe();
        let refused = inherited(reader.as_raw_fd()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
        for number in [-1, 0, 2, 100_000] {
            assert!(inherited(number).is_err(), "{number}");
        }
    }

    #[test]
    fn an_inherited_one_is_given_away_once_and_ends_at_exec() {
        let (reader, _writer) = pipe();
        let high = lift(reader.as_fd(), 300).unwrap();
        fcntl_setfd(&high, FdFlags::empty()).unwrap();
        let number = high.into_raw_fd();
        let taken = inherited(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(fcntl_getfd(&taken).unwrap().contains(FdFlags::CLOEXEC));
        fcntl_setfd(&taken, FdFlags::empty()).unwrap();
        assert!(inherited(number).is_err());
    }

    #[test]
    fn a_range_is_closed_and_no_more() {
        let (reader, writer) = pipe();
        let numbers: Vec<RawFd> = (0..3)
            .map(|_| lift(writer.as_fd(), 500).unwrap())
            .map(IntoRawFd::into_raw_fd)
            .collect();
        drop(writer);
        let (first, last) = (numbers[0] as u32, numbers[2] as u32);
        assert_eq!(last - first, 2);
        close(first..=last - 1).unwrap();
        for number in first..last {
            let error = inherited(number as RawFd).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        }
        // The last copy still keeps the pipe open, and then nothing does.
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let read = |reader: &OwnedFd| rustix::io::read(reader, &mut [0u8; 1]);
        assert_eq!(read(&reader).unwrap_err(), Errno::AGAIN);
        close(last..=last).unwrap();
        assert_eq!(read(&reader).unwrap(), 0);
    }
}
