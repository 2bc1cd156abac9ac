//! Features about parts of a file: making room, holes, copies without copying.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{Feature, checked, create, word};

/// A block of every file system here, in bytes.
const BLOCK: i64 = 4096;

/// How many blocks a file has; the second one is changed.
const BLOCKS: u8 = 4;

pub(super) const FEATURES: [Feature; 12] = [
    ("fallocate", |path| allocate(path, 0)),
    ("fallocate, KEEP_SIZE", |path| {
        allocate(path, libc::FALLOC_FL_KEEP_SIZE)
    }),
    ("fallocate, PUNCH_HOLE", |path| {
        change(
            path,
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            [1, 0, 3, 4, 9],
        )
    }),
    ("fallocate, ZERO_RANGE", |path| {
        change(path, libc::FALLOC_FL_ZERO_RANGE, [1, 0, 3, 4, 9])
    }),
    ("fallocate, COLLAPSE_RANGE", |path| {
        change(path, libc::FALLOC_FL_COLLAPSE_RANGE, [1, 3, 4, 9, 9])
    }),
    ("fallocate, INSERT_RANGE", |path| {
        change(path, libc::FALLOC_FL_INSERT_RANGE, [1, 0, 2, 3, 4])
    }),
    ("fallocate, UNSHARE_RANGE", |path| {
        change(path, libc::FALLOC_FL_UNSHARE_RANGE, [1, 2, 3, 4, 9])
    }),
    ("SEEK_HOLE and SEEK_DATA", seek),
    ("copy_file_range", |path| copy(path, copy_range)),
    ("sendfile", |path| copy(path, send)),
    ("FICLONE", |path| copy(path, clone)),
    ("sync_file_range", sync_range),
];

/// A file whose blocks hold 1, 2, 3 and 4.
fn filled(path: &Path) -> io::Result<File> {
    let file = create(path)?;
    for number in 1..=BLOCKS {
        let block = [number; BLOCK as usize];
        file.write_all_at(
            &block,
            i64::from(number - 1).cast_unsigned() * BLOCK.cast_unsigned(),
        )?;
    }
    file.sync_all()?;
    Ok(file)
}

fn fallocate(file: &File, mode: i32, start: i64, length: i64) -> io::Result<()> {
    // SAFETY: takes a descriptor that `file` keeps open, and numbers.
    checked(unsafe { libc::fallocate(file.as_raw_fd(), mode, start, length) })?;
    Ok(())
}

fn allocate(path: &Path, mode: i32) -> io::Result<&'static str> {
    let file = create(path)?;
    fallocate(&file, mode, 0, 16 * BLOCK)?;
    drop(file);
    let about = fs::metadata(path)?;
    let size = if mode == 0 {
        16 * BLOCK.cast_unsigned()
    } else {
        0
    };
    // Blocks of stat(2) have 512 bytes.
    let room = about.blocks() * 512 >= 16 * BLOCK.cast_unsigned();
    word(about.len() == size && room, "makes room", "makes no room")
}

/// Changes the second block. `wanted` is what each block holds then; 9: the block is gone.
fn change(path: &Path, mode: i32, wanted: [u8; 5]) -> io::Result<&'static str> {
    let file = filled(path)?;
    fallocate(&file, mode, BLOCK, BLOCK)?;
    drop(file);
    let wanted: Vec<u8> = wanted
        .into_iter()
        .filter(|number| *number != 9)
        .flat_map(|number| [number; BLOCK as usize])
        .collect();
    word(fs::read(path)? == wanted, "done", "another content")
}

fn seek(path: &Path) -> io::Result<&'static str> {
    const FAR: i64 = 1 << 20;
    let file = create(path)?;
    file.write_all_at(b"near", 0)?;
    file.write_all_at(b"far", FAR.cast_unsigned())?;
    file.sync_all()?;
    let find = |from: i64, what: i32| {
        // SAFETY: takes a descriptor that `file` keeps open, and numbers.
        checked(unsafe { libc::lseek(file.as_raw_fd(), from, what) })
    };
    let hole = find(0, libc::SEEK_HOLE)?;
    let right = (4..FAR).contains(&hole) && find(hole, libc::SEEK_DATA)? == FAR;
    word(right, "find", "find no hole")
}

fn copy(path: &Path, act: fn(&File, &File) -> io::Result<i64>) -> io::Result<&'static str> {
    let to_path = path.with_extension("copy");
    let (from, to) = (filled(path)?, create(&to_path)?);
    act(&from, &to)?;
    drop(to);
    word(
        fs::read(path)? == fs::read(to_path)?,
        "copies",
        "another content",
    )
}

const ALL: usize = BLOCK as usize * BLOCKS as usize;

fn copy_range(from: &File, to: &File) -> io::Result<i64> {
    let (mut start, mut at) = (0, 0);
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: the descriptors are open, and the kernel writes into two offsets that live.
    checked(unsafe { libc::copy_file_range(from, &mut start, to, &mut at, ALL, 0) } as i64)
}

fn send(from: &File, to: &File) -> io::Result<i64> {
    let mut start = 0;
    // SAFETY: the descriptors are open, and the kernel writes into an offset that lives.
    checked(unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), &mut start, ALL) } as i64)
}

fn clone(from: &File, to: &File) -> io::Result<i64> {
    // SAFETY: both descriptors are open, and this request takes the second one as a number.
    checked(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) })
}

fn sync_range(path: &Path) -> io::Result<&'static str> {
    let file = filled(path)?;
    let flags = libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: takes a descriptor that `file` keeps open, and numbers.
    checked(unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) })?;
    Ok("done")
}
