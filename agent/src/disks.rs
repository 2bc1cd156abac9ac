//! The host's disks in a container's spec: replaces their numbers by those that they have in the
//! guest.
//!
//! Called by `pod.rs` before a container is made. The VMM has put each disk into a slot, and a
//! driver has it. The runner makes the device nodes and the rules for devices.

use kata_like_failure::{Failure, Step};
use oci_spec::runtime::{LinuxDeviceType, Spec};

/// A disk, with the numbers that it has on the host and in the spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// N of `virtio-mmio.N`.
    pub slot: u32,
    pub major: u32,
    pub minor: u32,
}

/// Replaces the host's numbers of `disks` wherever the spec has them. `find` returns the guest's.
pub fn renumber<E>(
    spec: &mut Spec,
    disks: &[Disk],
    find: impl Fn(u32) -> Result<(u32, u32), E>,
) -> Result<(), Failure>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut numbers: Vec<([i64; 2], [i64; 2])> = Vec::new();
    for disk in disks {
        let host = [disk.major, disk.minor].map(i64::from);
        if numbers.iter().any(|(other, _)| *other == host) {
            let why = format!("{}:{} is given twice", disk.major, disk.minor);
            return Err(Failure::bad("disks", why));
        }
        let found = find(disk.slot)
            .step(|| format!("use disk {}:{} of the host", disk.major, disk.minor))?;
        numbers.push((host, [found.0, found.1].map(i64::from)));
    }
    let guest = |host: [i64; 2]| {
        let mut numbers = numbers.iter();
        numbers
            .find(|(other, _)| *other == host)
            .map(|(_, guest)| *guest)
    };
    let Some(linux) = spec.linux_mut() else {
        return Ok(());
    };
    for device in linux.devices_mut().iter_mut().flatten() {
        if device.typ() == LinuxDeviceType::B
            && let Some([major, minor]) = guest([device.major(), device.minor()])
        {
            device.set_major(major).set_minor(minor);
        }
    }
    let resources = linux.resources_mut().as_mut();
    let rules = resources.and_then(|resources| resources.devices_mut().as_mut());
    for rule in rules.into_iter().flatten() {
        if rule.typ() == Some(LinuxDeviceType::B)
            && let (Some(major), Some(minor)) = (rule.major(), rule.minor())
            && let Some([major, minor]) = guest([major, minor])
        {
            rule.set_major(Some(major)).set_minor(Some(minor));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn renumbered(disks: &[Disk]) -> Result<Value, Failure> {
        let spec = json!({
            "ociVersion": "1.2.0",
            "linux": {
                "devices": [
                    {"path": "/dev/a", "type": "b", "major": 8, "minor": 0},
                    {"path": "/dev/b", "type": "b", "major": 254, "minor": 0},
                    {"path": "/dev/c", "type": "c", "major": 8, "minor": 0},
                ],
                "resources": {"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rw"},
                    {"allow": true, "type": "b", "major": 8, "access": "r"},
                    {"allow": true, "type": "c", "major": 8, "minor": 0, "access": "r"},
                ]},
            },
        });
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        // Slot 12 has what is another disk's number on the host.
        let find = |slot| match slot {
            12 => Ok((254, 0)),
            13 => Ok((254, 16)),
            _ => Err("no such disk"),
        };
        renumber(&mut spec, disks, find)?;
        Ok(serde_json::to_value(spec).unwrap()["linux"].take())
    }

    fn numbers(entry: &Value) -> (&Value, &Value) {
        (&entry["major"], &entry["minor"])
    }

    const FIRST: Disk = Disk {
        slot: 12,
        major: 8,
        minor: 0,
    };
    const SECOND: Disk = Disk {
        slot: 13,
        major: 254,
        minor: 0,
    };

    #[test]
    fn each_disk_gets_its_own_numbers_and_nothing_else_does() {
        let linux = renumbered(&[FIRST, SECOND]).unwrap();
        let devices = linux["devices"].as_array().unwrap();
        assert_eq!(numbers(&devices[0]), (&json!(254), &json!(0)));
        assert_eq!(numbers(&devices[1]), (&json!(254), &json!(16)));
        assert_eq!(numbers(&devices[2]), (&json!(8), &json!(0)));
        let rules = linux["resources"]["devices"].as_array().unwrap();
        assert_eq!(numbers(&rules[1]), (&json!(254), &json!(0)));
        assert_eq!(numbers(&rules[2]), (&json!(8), &Value::Null));
        assert_eq!(numbers(&rules[3]), (&json!(8), &json!(0)));
    }

    #[test]
    fn a_disk_that_is_not_there_is_named() {
        let absent = Disk { slot: 14, ..FIRST };
        let error = renumbered(&[absent]).unwrap_err();
        assert_eq!(error.to_string(), "use disk 8:0 of the host");
        let error = renumbered(&[FIRST, Disk { slot: 13, ..FIRST }]).unwrap_err();
        assert_eq!(error.to_string(), "disks: 8:0 is given twice");
    }
}
