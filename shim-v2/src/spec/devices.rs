//! The spec's devices: what is in every guest, what becomes a disk of the guest, what can't be
//! given.
//!
//! A character device of the host can't be passed into a guest; those with numbers that mean the
//! same in every Linux are made of the guest's own. A block device becomes a disk. A privileged
//! container asks for every device that the host has: it starts all the same, with the guest's own
//! devices, and what is left out is told in the log.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use kata_like_failure::Failure;
use kata_like_spec::HOST_DEVICE;

use super::parts::bad;

/// A block device of the host that is to be a disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPart {
    /// Which entry of `linux.devices` it is, for messages.
    pub field: String,
    /// Its path in the container, which is most often that on the host.
    pub path: PathBuf,
    /// Its major number on the host.
    pub major: u32,
    /// Its minor number on the host.
    pub minor: u32,
    /// Whether the device rules allow no writes.
    pub read_only: bool,
}

/// Devices of the host that nobody names one by one: from so many on it is a whole /dev.
const WHOLE_DEV: usize = 8;
/// The most disks of one container; the VM has fewer slots.
const MAX_DISKS: usize = 64;

/// Takes the devices out of the spec that the guest does not have. Answers its disks, and the paths
/// of what was left out.
pub(super) fn split_devices(spec: &mut Spec) -> Result<(Vec<DiskPart>, Vec<PathBuf>), Failure> {
    let Some(linux) = spec.linux_mut() else {
        return Ok((Vec::new(), Vec::new()));
    };
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().clone())
        .unwrap_or_default();
    let devices = linux.devices().clone().unwrap_or_default();
    let of_the_host = devices
        .iter()
        .filter(|device| !is_in_every_guest(device))
        .count();
    let privileged = of_the_host > WHOLE_DEV && allows_all(&rules);
    let (mut kept, mut disks, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
    for (index, device) in devices.into_iter().enumerate() {
        if is_in_every_guest(&device) {
            kept.push(device);
            continue;
        }
        if privileged {
            left_out.push(device.path().clone());
            continue;
        }
        let field = format!("linux.devices[{index}] ({})", device.path().display());
        if device.typ() != LinuxDeviceType::B {
            return Err(refusal(field, &device));
        }
        if disks.len() >= MAX_DISKS {
            return Err(bad(&format!(
                "linux.devices holds more than {MAX_DISKS} block devices"
            )));
        }
        let number = |value: i64, name| {
            u32::try_from(value)
                .map_err(|_| bad(&format!("{field}.{name}: {value} is no device number")))
        };
        disks.push(DiskPart {
            path: device.path().clone(),
            major: number(device.major(), "major")?,
            minor: number(device.minor(), "minor")?,
            read_only: !may_write(&rules, &device),
            field,
        });
        kept.push(device);
    }
    linux.set_devices(Some(kept));
    Ok((disks, left_out))
}

/// Why a character device of the host can't be given.
fn refusal(field: String, device: &LinuxDevice) -> Failure {
    match (device.typ(), device.major(), device.minor()) {
        (LinuxDeviceType::C | LinuxDeviceType::U, 10, 232) => {
            HOST_DEVICE.because(field, "the guest can't run virtual machines itself")
        }
        _ => HOST_DEVICE.of(field),
    }
}

/// Pipes, and device numbers that mean the same in any Linux
/// (Documentation/admin-guide/devices.txt) and that the guest's kernel has.
fn is_in_every_guest(device: &LinuxDevice) -> bool {
    let is_character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
    device.typ() == LinuxDeviceType::P
        || is_character
            && matches!(
                (device.major(), device.minor()),
                // null, zero, full, random, urandom, kmsg; tty, console, ptmx; net/tun, fuse,
                // loop-control
                (1, 3 | 5 | 7 | 8 | 9 | 11) | (5, 0..=2) | (10, 200 | 229 | 237)
            )
}

/// Whether the last rule for all devices, `a *:* rwm`, allows them.
fn allows_all(rules: &[LinuxDeviceCgroup]) -> bool {
    let all = rules.iter().rev().find(|rule| {
        let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
        matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && any(rule.major())
            && any(rule.minor())
    });
    all.is_some_and(|rule| {
        let access = rule.access().as_deref().unwrap_or_default();
        rule.allow() && "rwm".chars().all(|kind| access.contains(kind))
    })
}

/// Whether the rules, of which the last that fits counts, let a device be written.
fn may_write(rules: &[LinuxDeviceCgroup], device: &LinuxDevice) -> bool {
    let fits = |rule: &&LinuxDeviceCgroup| {
        let is = |wanted: Option<i64>, number| wanted.is_none_or(|it| it < 0 || it == number);
        let access = rule.access().as_deref().unwrap_or_default();
        matches!(
            rule.typ(),
            None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
        ) && is(rule.major(), device.major())
            && is(rule.minor(), device.minor())
            && access.contains('w')
    };
    rules
        .iter()
        .rev()
        .find(fits)
        .is_some_and(LinuxDeviceCgroup::allow)
}
