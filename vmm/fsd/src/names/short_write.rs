//! A write for which there was only room in part. `names` puts this between the library and the
//! bytes.
//!
//! After a short write the library writes the rest, and forgets the first part if that fails.
//! write(2) returns how much was written, and the next one fails: programs that append rely on it.

use std::fs::File;
use std::io;

use virtiofsd::filesystem::ZeroCopyReader;
use virtiofsd::oslib::WritevFlags;

/// The bytes of a write.
pub struct ShortWrite<R>(pub R);

impl<R: ZeroCopyReader> ZeroCopyReader for ShortWrite<R> {
    fn write_to_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let before = file.metadata()?.len();
        let written = self.0.write_to_file_at(file, count, offset, flags);
        written.or_else(|error| {
            // Where it appends, the offset means nothing.
            let begun = flags.map_or(offset, |_| before);
            let after = file.metadata()?.len();
            match after.checked_sub(begun) {
                Some(part @ 1..) if after > before => {
                    Ok(usize::try_from(part).unwrap_or(count).min(count))
                }
                _ => Err(error),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// Takes this many bytes, then has no room.
    struct Room(usize);

    impl ZeroCopyReader for Room {
        fn write_to_file_at(
            &mut self,
            file: &File,
            count: usize,
            offset: u64,
            flags: Option<WritevFlags>,
        ) -> io::Result<usize> {
            let place = flags.map_or(offset, |_| file.metadata().unwrap().len());
            file.write_all_at(&vec![7; count.min(self.0)], place)?;
            match count > self.0 {
                true => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
                false => Ok(count),
            }
        }
    }

    #[test]
    fn what_found_room_is_told() {
        let file = tempfile::tempfile().unwrap();
        let write = |room, count, offset, flags| {
            let result = ShortWrite(Room(room)).write_to_file_at(&file, count, offset, flags);
            result.map_err(|error| error.raw_os_error())
        };
        let full = Err(Some(libc::ENOSPC));
        assert_eq!(write(100, 100, 0, None), Ok(100));
        assert_eq!(write(10, 50, 100, None), Ok(10));
        assert_eq!(write(0, 50, 110, None), full);
        let append = Some(WritevFlags::RWF_APPEND);
        assert_eq!(write(5, 50, 0, append), Ok(5));
        assert_eq!(write(0, 50, 0, append), full);
        // Beyond a hole, and within the file's length: nobody knows how far the write came, and it
        // can be repeated.
        assert_eq!(write(3, 50, 200, None), Ok(3));
        assert_eq!(write(3, 50, 20, None), full);
        assert_eq!(file.metadata().unwrap().len(), 203);
    }
}
