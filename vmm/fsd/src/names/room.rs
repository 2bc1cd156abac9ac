//! Answers a request for room that is there already. `names` asks.

use std::io;

use virtiofsd::filesystem::{Context, FileSystem};

/// The guest's kernel asks for room before a store into a page. If the page has its blocks this
/// must succeed, but xfs refuses it on a full file system. So we look whether there is a hole.
/// Returns the error that remains.
pub fn is_there<F: FileSystem>(
    files: &F,
    (ctx, inode, handle): (Context, F::Inode, F::Handle),
    (mode, offset, length): (u32, u64, u64),
    refused: io::Error,
) -> io::Result<()> {
    let full = matches!(refused.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
    if !full || mode != libc::FALLOC_FL_KEEP_SIZE as u32 {
        return Err(refused);
    }
    match files.lseek(ctx, inode, handle, offset, libc::SEEK_HOLE as u32) {
        Ok(hole) if hole >= offset.saturating_add(length) => Ok(()),
        _ => Err(refused),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use virtiofsd::filesystem::{FsOptions, ROOT_ID};
    use virtiofsd::passthrough::{Config, PassthroughFs};

    use super::*;

    #[test]
    fn only_a_hole_needs_room() {
        let share = tempfile::tempdir().unwrap();
        let path = share.path().join("file");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        fs::File::open(&path).unwrap().sync_all().unwrap();
        let config = Config {
            root_dir: share.path().to_str().unwrap().into(),
            ..Config::default()
        };
        let files = Arc::new(PassthroughFs::new(config).unwrap());
        files.init(FsOptions::empty()).unwrap();
        let root = Context {
            uid: 0.into(),
            gid: 0.into(),
            pid: 1,
        };
        let node = files.lookup(root, ROOT_ID, c"file").unwrap().inode;
        let (handle, _) = files.open(root, node, false, libc::O_RDWR as u32).unwrap();
        let keep = libc::FALLOC_FL_KEEP_SIZE as u32;
        let ask = |mode, offset, length, errno| {
            let refused = io::Error::from_raw_os_error(errno);
            let handle = handle.unwrap();
            is_there(
                &*files,
                (root, node, handle),
                (mode, offset, length),
                refused,
            )
            .map_err(|error| error.raw_os_error())
        };
        assert_eq!(ask(keep, 0, 8192, libc::ENOSPC), Ok(()));
        assert_eq!(ask(keep, 4096, 4096, libc::EDQUOT), Ok(()));
        assert_eq!(ask(keep, 0, 1 << 19, libc::ENOSPC), Err(Some(libc::ENOSPC)));
        assert_eq!(
            ask(keep, 1 << 19, 4096, libc::EDQUOT),
            Err(Some(libc::EDQUOT))
        );
        // Other errors stay; so do requests for more than room.
        assert_eq!(ask(keep, 0, 8192, libc::EIO), Err(Some(libc::EIO)));
        assert_eq!(ask(0, 0, 8192, libc::ENOSPC), Err(Some(libc::ENOSPC)));
    }
}
