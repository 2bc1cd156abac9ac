//! What containers of a pod share on the host they share in the guest: a volume is in the share
//! once.
//!
//! Called by `share`, and by `pod` for the names. A file server's mount that each container had
//! for itself would be a file system for itself in the guest: with a cache of its own, and with
//! sockets and pipes that lead nowhere. So a volume's name tells what it shows and how, and who
//! asks for a name that is there gets what is there.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::mount::Mounted;
use crate::spec::Volume;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use kata_like_spec::ReadOnly;

/// The name of a volume: that of the file or directory that its source leads to now, and of how it
/// is shown.
pub fn name(volume: &Volume) -> Result<String, Failure> {
    let wanted = StatxFlags::INO | StatxFlags::MNT_ID;
    let found = rustix::fs::statx(CWD, &volume.source, AtFlags::empty(), wanted);
    let found = found.map_err(|errno| {
        let step = format!("{}: open source {}", volume.field, volume.source.display());
        Failure::failed(step, std::io::Error::from(errno))
    })?;
    let how: String = [
        (volume.read_only == ReadOnly::Top, 'r'),
        (volume.read_only == ReadOnly::All, 'R'),
        (volume.recursive, 'b'),
        (volume.follows, 's'),
    ]
    .into_iter()
    .filter_map(|(is_so, letter)| is_so.then_some(letter))
    .collect();
    Ok(format!(
        "volume-{}-{}-{}-{}-{how}",
        found.stx_mnt_id, found.stx_dev_major, found.stx_dev_minor, found.stx_ino
    ))
}

/// A root file system that containerd names no mounts for is the caller's: Docker changes the files
/// in it, too (`docker cp`). So it is a volume.
pub fn of_root(root: Option<PathBuf>) -> Result<Volume, Failure> {
    let bad = |text: &str| Failure::new(Kind::BadRequest, text);
    let source =
        root.ok_or_else(|| bad("root is missing in the spec, and no mount is given for it"))?;
    let mut volume = Volume {
        name: String::new(),
        field: "root.path".into(),
        source,
        read_only: ReadOnly::No,
        recursive: true,
        follows: false,
    };
    volume.name = name(&volume)?;
    match volume.source.is_dir() {
        true => Ok(volume),
        false => Err(bad(&format!(
            "root file system {} is not a directory",
            volume.source.display()
        ))),
    }
}

/// The mounts of volumes by their names, and how many hold each.
#[derive(Debug, Default)]
pub struct Table(Mutex<HashMap<String, (usize, Mounted)>>);

impl Table {
    /// Held while something is mounted or unmounted, so that no name is taken while it goes.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (usize, Mounted)>> {
        lock(&self.0)
    }
}

/// A container's part in a volume. With the last one dropped the volume is taken away.
#[derive(Debug)]
pub struct SharedVolume {
    table: Arc<Table>,
    name: String,
}

impl SharedVolume {
    pub(super) fn hold(
        table: &Arc<Table>,
        name: &str,
        mount: impl FnOnce() -> Result<Mounted, Failure>,
    ) -> Result<Self, Failure> {
        let mut mounts = table.lock();
        match mounts.get_mut(name) {
            Some((holders, _)) => *holders += 1,
            None => {
                mounts.insert(name.to_owned(), (1, mount()?));
            }
        }
        Ok(Self {
            table: Arc::clone(table),
            name: name.to_owned(),
        })
    }
}

impl Drop for SharedVolume {
    fn drop(&mut self) {
        let mut mounts = self.table.lock();
        if let Some((holders, _)) = mounts.get_mut(&self.name) {
            *holders -= 1; // this is one of them
            if *holders == 0 {
                mounts.remove(&self.name);
            }
        }
    }
}
