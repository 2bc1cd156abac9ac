//! Devices that the VMM adds after boot: bound to their driver by name.
//!
//! Called by `service.rs`. Each virtio-mmio slot is there from the start, and empty ones fail their
//! first probe; writing a slot's name to the driver's `bind` makes it probe again and returns when
//! that is done. `bind` says success even if the virtio driver on top failed, so its link is looked
//! for, and a slot that does not work is unbound again.

use std::fs;
use std::io;
use std::path::Path;

/// Where the platform bus is in sysfs.
const BUS: &str = "/sys/bus/platform";

/// The highest slot there can be.
pub const MAX_SLOT: u32 = 63;

/// Why a device can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// sysfs refused.
    #[error("{step} device virtio-mmio.{slot}")]
    Sysfs {
        step: &'static str,
        slot: u32,
        #[source]
        source: io::Error,
    },
    /// The transport is there, but nothing drives the device.
    #[error("bind device virtio-mmio.{slot}: no driver of this kernel takes it")]
    NoDriver { slot: u32 },
}

/// Binds the device in `slot`; it works when this returns.
pub fn bind(slot: u32) -> Result<(), DeviceError> {
    bind_on(Path::new(BUS), slot)
}

fn bind_on(bus: &Path, slot: u32) -> Result<(), DeviceError> {
    let name = format!("virtio-mmio.{slot}");
    let driver = bus.join("drivers/virtio-mmio");
    let failed = |step| move |source| DeviceError::Sysfs { step, slot, source };
    fs::write(driver.join("bind"), &name).map_err(failed("bind"))?;
    let devices = fs::read_dir(bus.join("devices").join(&name)).map_err(failed("look into"))?;
    let driven = devices.flatten().any(|entry| {
        let virtio = entry.file_name().to_string_lossy().starts_with("virtio");
        virtio && entry.path().join("driver").exists()
    });
    if driven {
        return Ok(());
    }
    fs::write(driver.join("unbind"), &name).map_err(failed("unbind"))?;
    Err(DeviceError::NoDriver { slot })
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
        assert!(matches!(error, DeviceError::NoDriver { slot: 4 }));
        assert_eq!(
            written(bus.path(), "unbind").as_deref(),
            Some("virtio-mmio.4")
        );
    }
}
