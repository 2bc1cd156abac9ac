//! The guest's disks: block devices of the host in the VM's slots.
//!
//! Called by `pod` when a container is made, and when it is deleted. A device is in one
//! slot for the whole pod, however many containers name it; the slot is free again when the last of
//! them is gone. The order of a way in is: the VMM fills a slot, the guest binds it; the way out is
//! the reverse, after the guest has let go of the container.
//!
//! A device that the host uses, by a mount or as a part of another device, is never given away: it
//! is opened exclusively (open(2), O_EXCL on a block device), which also keeps others off while the
//! VM has it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::agent::GuestDisk;
use super::guest::Guest;
use super::launch::DiskFile;
use crate::spec::DiskPart;
use crate::steps::blocking;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use kata_like_spec::DISK_FOR_WRITING;

/// How long a guest may take to let go of a device.
const UNBIND: Duration = Duration::from_secs(5);

/// Major and minor number on the host.
pub type Number = (u32, u32);

/// A disk of the pod.
#[derive(Clone, Copy, Debug)]
struct Disk {
    /// N of `virtio-mmio.N`; none while it is on its way in or out.
    slot: Option<u32>,
    read_only: bool,
    /// How many containers have it.
    users: usize,
}

/// The pod's disks.
#[derive(Debug)]
pub struct Disks {
    guest: Guest,
    disks: Mutex<HashMap<Number, Disk>>,
}

impl Disks {
    /// No disks, yet.
    pub fn new(guest: Guest) -> Self {
        Self {
            guest,
            disks: Mutex::default(),
        }
    }

    /// Gives the guest a disk, if it has it not yet. Each success is to be undone by
    /// [`release`](Self::release).
    pub async fn acquire(&self, part: &DiskPart) -> Result<GuestDisk, Failure> {
        let number = (part.major, part.minor);
        let guest_disk = |slot| GuestDisk {
            slot,
            major: part.major,
            minor: part.minor,
        };
        {
            let mut disks = self.disks();
            match disks.entry(number) {
                Entry::Vacant(entry) => {
                    entry.insert(Disk {
                        slot: None,
                        read_only: part.read_only,
                        users: 1,
                    });
                }
                Entry::Occupied(mut entry) => {
                    let disk = entry.get_mut();
                    let slot = disk.slot.ok_or_else(|| {
                        Failure::new(
                            Kind::WrongState,
                            format!("{}: it is on its way into or out of the pod", part.field),
                        )
                    })?;
                    if disk.read_only && !part.read_only {
                        let field = format!("{} for writing", part.field);
                        return Err(DISK_FOR_WRITING.of(field));
                    }
                    disk.users += 1;
                    return Ok(guest_disk(slot));
                }
            }
        }
        match self.add(part).await {
            Ok(slot) => {
                if let Some(disk) = self.disks().get_mut(&number) {
                    disk.slot = Some(slot);
                }
                Ok(guest_disk(slot))
            }
            Err(error) => {
                self.disks().remove(&number);
                Err(error.during(format!("give {} to the guest", part.field)))
            }
        }
    }

    async fn add(&self, part: &DiskPart) -> Result<u32, Failure> {
        let wanted = part.clone();
        let device = blocking(move || open(&wanted)).await?;
        let slot = self.guest.vmm.add_disk(&device).await?;
        if let Err(error) = self.guest.agent.bind_device(slot).await {
            if let Err(error) = self.guest.vmm.remove_disk(slot).await {
                tracing::warn!("{}", error.one_line());
            }
            return Err(error);
        }
        Ok(slot)
    }

    /// Undoes one [`acquire`](Self::acquire). What fails is told in the log: the slot then stays
    /// filled.
    pub async fn release(&self, number: Number) {
        let slot = {
            let mut disks = self.disks();
            let Some(disk) = disks.get_mut(&number) else {
                return;
            };
            disk.users = disk.users.saturating_sub(1);
            if disk.users > 0 {
                return;
            }
            disk.slot.take()
        };
        if let Some(slot) = slot
            && self.guest.answers()
        {
            let removed = match self.guest.agent.unbind_device(slot, UNBIND).await {
                Ok(()) => self.guest.vmm.remove_disk(slot).await,
                Err(error) => Err(error),
            };
            if let Err(error) = removed {
                tracing::warn!("{}; slot {slot} stays filled", error.one_line());
            }
        }
        self.disks().remove(&number);
    }

    fn disks(&self) -> MutexGuard<'_, HashMap<Number, Disk>> {
        lock(&self.disks)
    }
}

/// Opens a block device by its number, exclusively. Its path says where it may be found, no more.
fn open(part: &DiskPart) -> Result<DiskFile, Failure> {
    let DiskPart { major, minor, .. } = part;
    let by_number = PathBuf::from(format!("/dev/block/{major}:{minor}"));
    let number = rustix::fs::makedev(*major, *minor);
    let mut last = None;
    for path in [by_number.as_path(), part.path.as_path()] {
        match open_at(path, number, part.read_only) {
            Ok(device) => return Ok(device),
            Err(Errno::BUSY) => {
                return Err(Failure::new(
                    Kind::Failed,
                    format!(
                        "open block device {major}:{minor}: it is in use on the host (mounted, a part of another device, or another pod's)"
                    ),
                ));
            }
            Err(errno) => last = Some(errno),
        }
    }
    let cause = io::Error::from(last.unwrap_or(Errno::NODEV));
    Err(Failure::failed(
        format!(
            "open block device {major}:{minor} at {} or {}",
            by_number.display(),
            part.path.display()
        ),
        cause,
    ))
}

fn open_at(path: &Path, number: u64, read_only: bool) -> Result<DiskFile, Errno> {
    // First what it is: opening a device of another kind could do something.
    let about = rustix::fs::statat(CWD, path, rustix::fs::AtFlags::empty())?;
    let is_it = |about: &rustix::fs::Stat| {
        FileType::from_raw_mode(about.st_mode) == FileType::BlockDevice && about.st_rdev == number
    };
    if !is_it(&about) {
        return Err(Errno::NODEV);
    }
    let access = if read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let flags = access | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    if !is_it(&rustix::fs::fstat(&file)?) {
        return Err(Errno::NODEV);
    }
    Ok(DiskFile {
        bytes: rustix::fs::seek(&file, SeekFrom::End(0))?,
        block_size: rustix::fs::ioctl_blksszget(&file)?,
        file,
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_such_block_device_is_refused_with_its_number() {
        let part = DiskPart {
            field: "linux.devices[0] (/dev/null)".into(),
            path: "/dev/null".into(),
            major: 4000,
            minor: 9,
            read_only: true,
        };
        let line = open(&part).unwrap_err().one_line();
        assert!(
            line.starts_with("open block device 4000:9 at /dev/block/4000:9 or /dev/null: "),
            "{line}"
        );
    }
}
