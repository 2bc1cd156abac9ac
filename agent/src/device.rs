//! Devices that the VMM adds after boot: binds them to their driver by name, and takes them from
//! it.
//!
//! Called by `service.rs`, by `disks.rs` for a device's numbers, and by `network.rs`. Each
//! virtio-mmio slot is there from the start, and an empty one fails its first probe. Writing a
//! slot's name to the driver's `bind` makes the driver probe again; the write returns when that is
//! done. It succeeds even if the virtio driver on top failed, so we look for that driver's link,
//! and unbind a slot that does not work.

use std::fs;
use std::io;
use std::path::Path;

use kata_like_failure::{Failure, Step};

/// Where the platform bus is in sysfs.
const BUS: &str = "/sys/bus/platform";

/// The highest number of a slot.
pub const MAX_SLOT: u32 = 63;

/// Binds the device in `slot`. It works when this returns.
pub fn bind(slot: u32) -> Result<(), Failure> {
    bind_on(Path::new(BUS), slot)
}

/// Takes the device in `slot` from its driver, which first writes back what it holds of a disk.
/// Does nothing if no driver has it.
pub fn unbind(slot: u32) -> Result<(), Failure> {
    unbind_on(Path::new(BUS), slot)
}

/// Finds the major and minor number of the disk in `slot`.
pub fn disk(slot: u32) -> Result<(u32, u32), Failure> {
    disk_on(Path::new(BUS), slot)
}

/// Finds the number of the network interface in `slot`.
pub fn interface(slot: u32) -> Result<u32, Failure> {
    interface_on(Path::new(BUS), slot)
}

fn name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

fn unbind_on(bus: &Path, slot: u32) -> Result<(), Failure> {
    let step = || format!("unbind device {}", name(slot));
    let device = bus.join("devices").join(name(slot));
    match fs::symlink_metadata(device.join("driver")) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && device.exists() => return Ok(()),
        Err(error) => return Err(error).step(step),
    }
    fs::write(bus.join("drivers/virtio-mmio/unbind"), name(slot)).step(step)
}

fn disk_on(bus: &Path, slot: u32) -> Result<(u32, u32), Failure> {
    let numbers = |text: &str| {
        let (major, minor) = text.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    let found = attributes(bus, slot, "block", "dev");
    let found = found.iter().find_map(|text| numbers(text));
    found.ok_or_else(|| none("disk", slot))
}

fn interface_on(bus: &Path, slot: u32) -> Result<u32, Failure> {
    let found = attributes(bus, slot, "net", "ifindex");
    let found = found.iter().find_map(|text| text.parse().ok());
    found.ok_or_else(|| none("interface", slot))
}

fn none(what: &str, slot: u32) -> Failure {
    Failure::failed(
        format!("find the {what} in device {}", name(slot)),
        "there is none",
    )
}

/// Reads one file of everything of one class that the device in `slot` provides.
fn attributes(bus: &Path, slot: u32, class: &str, file: &str) -> Vec<String> {
    let entries = |path| fs::read_dir(path).into_iter().flatten().flatten();
    entries(bus.join("devices").join(name(slot)))
        .flat_map(|device| entries(device.path().join(class)))
        .filter_map(|it| fs::read_to_string(it.path().join(file)).ok())
        .map(|text| text.trim().to_owned())
        .collect()
}

fn bind_on(bus: &Path, slot: u32) -> Result<(), Failure> {
    let name = name(slot);
    let driver = bus.join("drivers/virtio-mmio");
    let step = |step| move || format!("{step} device virtio-mmio.{slot}");
    fs::write(driver.join("bind"), &name).step(step("bind"))?;
    let devices = fs::read_dir(bus.join("devices").join(&name)).step(step("look into"))?;
    let driven = devices.flatten().any(|entry| {
        let virtio = entry.file_name().to_string_lossy().starts_with("virtio");
        virtio && entry.path().join("driver").exists()
    });
    if driven {
        return Ok(());
    }
    fs::write(driver.join("unbind"), &name).step(step("unbind"))?;
    Err(Failure::failed(
        format!("bind device {name}"),
        "no driver of this kernel takes it",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus(device: &str) -> tempfile::TempDir {
        let bus = tempfile::tempdir().unwrap();
        fs::create_dir_all(bus.path().join("drivers/virtio-mmio")).unwrap();
        fs::create_dir_all(bus.path().join("devices/virtio-mmio.4").join(device)).unwrap();
        bus
    }

    fn written(bus: &Path, file: &str) -> Option<String> {
        fs::read_to_string(bus.join("drivers/virtio-mmio").join(file)).ok()
    }

    #[test]
    fn a_device_with_a_driver_is_bound() {
        let bus = bus("virtio0/driver");
        bind_on(bus.path(), 4).unwrap();
        assert_eq!(
            written(bus.path(), "bind").as_deref(),
            Some("virtio-mmio.4")
        );
        assert_eq!(written(bus.path(), "unbind"), None);
    }

    #[test]
    fn a_device_that_no_driver_takes_is_unbound_again() {
        let bus = bus("virtio0");
        let error = bind_on(bus.path(), 4).unwrap_err();
        assert_eq!(
            error.one_line(),
            "bind device virtio-mmio.4: no driver of this kernel takes it"
        );
        assert_eq!(
            written(bus.path(), "unbind").as_deref(),
            Some("virtio-mmio.4")
        );
    }

    #[test]
    fn a_device_is_taken_from_its_driver_once() {
        let bus = bus("virtio0/driver");
        let device = bus.path().join("devices/virtio-mmio.4");
        unbind_on(bus.path(), 4).unwrap();
        assert_eq!(written(bus.path(), "unbind"), None);
        fs::create_dir(device.join("driver")).unwrap();
        unbind_on(bus.path(), 4).unwrap();
        assert_eq!(
            written(bus.path(), "unbind").as_deref(),
            Some("virtio-mmio.4")
        );
        let error = unbind_on(bus.path(), 5).unwrap_err();
        assert!(error.to_string().starts_with("unbind device virtio-mmio.5"));
    }

    #[test]
    fn an_interface_has_a_number_and_other_devices_have_none() {
        let bus = bus("virtio3/net/eth0");
        let file = "devices/virtio-mmio.4/virtio3/net/eth0/ifindex";
        fs::write(bus.path().join(file), "7\n").unwrap();
        assert_eq!(interface_on(bus.path(), 4).unwrap(), 7);
        let error = interface_on(bus.path(), 5).unwrap_err();
        assert!(error.to_string().contains("virtio-mmio.5"), "{error}");
    }

    #[test]
    fn a_disk_has_numbers_and_other_devices_have_none() {
        let bus = bus("virtio7/block/vda");
        let device = bus.path().join("devices/virtio-mmio.4");
        fs::create_dir_all(device.join("power")).unwrap();
        assert!(disk_on(bus.path(), 4).is_err());
        fs::write(device.join("virtio7/block/vda/dev"), "254:16\n").unwrap();
        assert_eq!(disk_on(bus.path(), 4).unwrap(), (254, 16));
        assert_eq!(
            disk_on(bus.path(), 5).unwrap_err().one_line(),
            "find the disk in device virtio-mmio.5: there is none"
        );
    }
}
