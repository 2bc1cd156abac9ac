//! The mounts that this thread's namespace has, from `/proc/thread-self/mountinfo`
//! (proc_pid_mountinfo(5)).
//!
//! Called by `file_systems` and by `share`. Paths in it are where a mount was when the file was
//! read. Whoever acts on one opens it and compares the mount's number.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number, as statx(2) has it.
    pub id: u64,
    /// The number of the mount that it is mounted on.
    pub parent: u64,
    /// The number of its file system's device.
    device: (u32, u32),
    /// Where it is mounted.
    pub path: PathBuf,
    /// The type of its file system.
    pub kind: String,
}

/// All mounts, each after the one that it is mounted on, unless somebody has moved them.
pub fn read() -> io::Result<Vec<Mount>> {
    let text = std::fs::read("/proc/thread-self/mountinfo")?;
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse(line).ok_or_else(|| {
                io::Error::other(format!(
                    "/proc/thread-self/mountinfo has the line {:?}",
                    String::from_utf8_lossy(line)
                ))
            })
        })
        .collect()
}

/// Whether this is the device of a devtmpfs. Its magic number is that of tmpfs, but all its mounts
/// are of one device.
pub fn is_devtmpfs(device: u64) -> io::Result<bool> {
    let device = (rustix::fs::major(device), rustix::fs::minor(device));
    let mut all = read()?.into_iter();
    Ok(all.any(|mount| mount.kind == "devtmpfs" && mount.device == device))
}

/// `ID PARENT MAJOR:MINOR ROOT PATH OPTIONS TAG… - TYPE SOURCE OPTIONS`
fn parse(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let id = number(words.next()?)?;
    let parent = number(words.next()?)?;
    let (major, minor) = std::str::from_utf8(words.next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let _root = words.next()?;
    let path = PathBuf::from(OsString::from_vec(unescape(words.next()?)));
    words.by_ref().find(|word| *word == b"-")?;
    // A user may have named a FUSE file system as he likes.
    let kind = String::from_utf8_lossy(&unescape(words.next()?)).into_owned();
    Some(Mount {
        id,
        parent,
        device,
        path,
        kind,
    })
}

fn number(word: &[u8]) -> Option<u64> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

/// Space, tab, newline and backslash stand there as `\` with three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = br"36 35 98:0 /mnt1 /mnt\040two\134x rw,noatime master:1 shared:2 - fuse.a\040b /dev/root rw";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.device), (36, 35, (98, 0)));
        assert_eq!(mount.path, PathBuf::from(r"/mnt two\x"));
        assert_eq!(mount.kind, "fuse.a b");
        let odd = parse(b"36 35 98:0 / /a rw - fuse.\xff /dev/root rw").unwrap();
        assert_eq!(odd.kind, "fuse.\u{fffd}");
        // Without optional fields, and what is no line at all.
        let line = b"21 1 0:20 / /proc rw - proc proc rw";
        assert_eq!(parse(line).unwrap().kind, "proc");
        for wrong in [
            "",
            "a b",
            "36 35 98:0 /a /b rw",
            "36 35 98 /a /b rw - ext4 x rw",
        ] {
            assert_eq!(parse(wrong.as_bytes()), None, "{wrong:?}");
        }
    }

    #[test]
    fn this_machine_s_mounts_are_read() {
        let all = read().unwrap();
        let proc = all.iter().find(|mount| mount.kind == "proc").unwrap();
        let (major, minor) = proc.device;
        assert!(!is_devtmpfs(rustix::fs::makedev(major, minor)).unwrap());
    }
}
