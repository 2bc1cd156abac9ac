//! How long operations on many small files take, and on a large one.
//!
//! Prints a line for each: `NAME MICROSECONDS`, of one file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

/// A small file's size in bytes.
const SMALL: usize = 1 << 10;
/// The large one's.
const LARGE: usize = 8 << 20;

/// One operation on the file with this number.
type Operation<'a> = (&'a str, &'a dyn Fn(u32) -> io::Result<()>);

/// Works on `count` files in a new folder.
pub fn times(folder: &str, count: &str) -> io::Result<String> {
    let count: u32 = count.parse().map_err(io::Error::other)?;
    let folder = Path::new(folder);
    fs::create_dir(folder)?;
    let path = |number: u32| folder.join(format!("file-{number}"));
    let other = |number: u32| folder.join(format!("other-{number}"));
    let content = [7; SMALL];
    let operations: [Operation; 7] = [
        ("create, write 1 KiB, close", &|number| {
            File::create_new(path(number))?.write_all(&content)
        }),
        ("stat", &|number| fs::metadata(path(number)).map(drop)),
        ("open, read 1 KiB, close", &|number| {
            File::open(path(number))?.read_exact(&mut [0; SMALL])
        }),
        ("list", &|_| match fs::read_dir(folder)?.count() {
            0 => Err(io::ErrorKind::NotFound.into()),
            _ => Ok(()),
        }),
        ("rename", &|number| fs::rename(path(number), other(number))),
        (
            "look for a name that is not there",
            &|number| match fs::metadata(path(number)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                _ => Err(io::ErrorKind::AlreadyExists.into()),
            },
        ),
        ("remove", &|number| fs::remove_file(other(number))),
    ];
    let mut lines = Vec::new();
    let mut time = |name: &str, count: u32, work: &dyn Fn(u32) -> io::Result<()>| {
        let begun = Instant::now();
        for number in 0..count {
            work(number)?;
        }
        let one = begun.elapsed().as_secs_f64() * 1e6 / f64::from(count);
        lines.push(format!("{name} {one:.2}"));
        io::Result::Ok(())
    };
    for (name, work) in operations {
        time(name, count, work)?;
    }
    let large = folder.join("large");
    let block = vec![7; 1 << 20];
    time("write 8 MiB and fsync", 1, &|_| {
        let mut file = File::create_new(&large)?;
        for _ in 0..LARGE / block.len() {
            file.write_all(&block)?;
        }
        file.sync_all()
    })?;
    let file = File::open(&large)?;
    // SAFETY: takes numbers alone. Not kept pages are read again, here and on the host.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    time("read 8 MiB, not cached", 1, &|_| {
        let mut block = vec![0; 1 << 20];
        let mut file = &file;
        (0..LARGE / block.len()).try_for_each(|_| file.read_exact(&mut block))
    })?;
    fs::remove_dir_all(folder)?;
    Ok(lines.join("\n"))
}
