//! Descriptors that a runtime of tokio watches for being ready.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A value whose descriptor the runtime watches. All that `AsyncFd` does without changing the value
/// is there; nobody gets it back or exchanges it.
#[derive(Debug)]
pub struct Watched<T: AsFd>(AsyncFd<Held<T>>);

/// The watched value, as `AsyncFd` has it.
#[derive(Debug)]
pub struct Held<T> {
    number: RawFd,
    value: Box<T>,
}

impl<T: AsFd> Watched<T> {
    /// Has `value` watched for `interest`. Its descriptor must be non-blocking to be of use, and
    /// there must be a runtime.
    pub fn new(value: T, interest: Interest) -> io::Result<Self> {
        let value = Box::new(value);
        let number = value.as_fd().as_raw_fd();
        let held = Held { number, value };
        // SAFETY: the descriptor stays open, and the same file, until the `AsyncFd` is dropped,
        // since that is what `AsFd` promises for as long as a value is borrowed.
        // - The value stays in its box, and nobody can do more than borrow it: `Held` hands out
        //   shared references alone, and `Watched` no exclusive one to its `AsyncFd`.
        // - `as_raw_fd` of a `Held` is one number for ever.
        // - The `AsyncFd` takes the number out of the reactor before it drops the value.
        Ok(Self(unsafe {
            AsyncFd::register_with_interest(held, interest)
        }?))
    }
}

impl<T: AsFd> Deref for Watched<T> {
    type Target = AsyncFd<Held<T>>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T: AsFd> AsFd for Watched<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl<T: AsFd> AsFd for Held<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.value.as_fd()
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> AsRawFd for Held<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::os::fd::OwnedFd;

    #[tokio::test]
    async fn a_pipe_tells_when_it_can_be_read() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let reader = Watched::new(reader, Interest::READABLE).unwrap();
        let read = |reader: &OwnedFd| rustix::io::read(reader, &mut [0u8; 8]);
        assert_eq!(read(reader.get_ref()).unwrap_err(), Errno::AGAIN);
        let writing = async {
            tokio::task::yield_now().await;
            rustix::io::write(&writer, b"abc").unwrap();
        };
        let reading = reader.async_io(Interest::READABLE, |held| Ok(read(held)?));
        assert_eq!(tokio::join!(reading, writing).0.unwrap(), 3);
    }

    #[tokio::test]
    async fn a_file_can_not_be_watched() {
        let file = tempfile::tempfile().unwrap();
        assert!(Watched::new(file, Interest::READABLE).is_err());
    }
}
