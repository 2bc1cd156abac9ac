//! What a host must have, and what its administrator should know.
//!
//! Called by `check`: `require` before the boot, since without it no pod can run; `notes` after it.

use std::fs;
use std::path::{Path, PathBuf};

use kata_like_config::{Config, HugePages};

use crate::exposure;

const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const SELINUX_ENFORCES: &str = "/sys/fs/selinux/enforce";
const MOUNTINFO: &str = "/proc/self/mountinfo";
const CGROUP: &str = "/sys/fs/cgroup";
/// linux/magic.h
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// What is mounted is not the unified hierarchy.
    #[error(
        "use the cgroups of this host: {CGROUP} is not cgroup v2, which kata-like needs; boot with systemd.unified_cgroup_hierarchy=1"
    )]
    CgroupV1,
    #[error("look at {}", path.display())]
    Look {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Fails on a host where no pod can run, whatever its KVM.
pub fn require() -> Result<(), HostError> {
    let statfs = rustix::fs::statfs(CGROUP).map_err(|errno| HostError::Look {
        path: CGROUP.into(),
        source: errno.into(),
    })?;
    match statfs.f_type as u64 {
        CGROUP2_SUPER_MAGIC => Ok(()),
        _ => Err(HostError::CgroupV1),
    }
}

/// What an administrator should change on this host. `huge_pages`: how many the booted guest had.
pub fn notes(config: &Config, huge_pages: u64) -> Vec<String> {
    let mut notes = Vec::new();
    if huge_pages == 0 && config.hugepages == HugePages::Transparent {
        let setting = fs::read_to_string(SHMEM_ENABLED).unwrap_or_default();
        notes.push(small_pages(&setting));
    }
    if fs::read_to_string(MOUNTINFO).is_ok_and(|text| !root_is_shared(&text)) {
        notes.push(
            "note: the mount `/` is private, so volumes mounted after a pod's start don't reach it; \
             run `mount --make-rshared /` before containerd starts"
                .into(),
        );
    }
    let enforces = fs::read_to_string(SELINUX_ENFORCES).unwrap_or_default();
    if config.selinux && enforces.trim() == "1" {
        notes.push(
            "note: SELinux is enforced here: pods that containerd gives a label (its `enable_selinux`) run under that, which \
             was not tried; what the policy refuses then is in `ausearch -m avc`"
                .into(),
        );
    }
    notes.extend(exposure::notes(Path::new("/")));
    notes
}

fn small_pages(setting: &str) -> String {
    let chosen = setting
        .split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    match chosen {
        Some("never" | "deny") | None => format!(
            "note: guests run on 4 KiB pages and boot at half the speed: {} is \"{}\"; set it to \"advise\"",
            Path::new(SHMEM_ENABLED).display(),
            chosen.unwrap_or("missing"),
        ),
        Some(_) => "note: guests run on 4 KiB pages although 2 MiB pages are allowed: the host has no free memory in \
                    pieces of 2 MiB"
            .into(),
    }
}

/// Whether the mount at `/` has a peer group (proc(5): the optional fields before the dash).
fn root_is_shared(mountinfo: &str) -> bool {
    mountinfo
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some("/"))
        .is_some_and(|line| {
            let mut optional = line.split(' ').skip(6).take_while(|field| *field != "-");
            optional.any(|field| field.starts_with("shared:"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_without_a_peer_group_is_private() {
        let first = "1 1 0:2 / / rw - rootfs rootfs rw\n";
        let shared = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n";
        let slave = "22 1 8:1 / / rw,relatime master:1 - ext4 /dev/shared:1 rw\n";
        assert!(root_is_shared(&format!("{first}{shared}")));
        assert!(!root_is_shared(&format!("{shared}{slave}")));
        assert!(!root_is_shared(""));
    }

    #[test]
    fn the_note_on_small_pages_names_the_setting() {
        let never = small_pages("always within_size advise [never] deny force\n");
        assert!(never.contains("shmem_enabled is \"never\""), "{never}");
        assert!(small_pages("").contains("\"missing\""));
        assert!(small_pages("always within_size [advise] never").contains("although"));
    }
}
