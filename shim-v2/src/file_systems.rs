//! Which of the host's file systems a guest can't have through virtio-fs, and what becomes of each.
//!
//! Called by `spec` for the source of a bind mount and by `share` for what it mounts and for what
//! is mounted below. A file system of this table is no place for files: it is an interface to the
//! host's kernel. Each file of it acts on the host, in the name of whoever opens it. That is the
//! file server, which would open its own `/proc/self/mem`. So none of them is carried. All that is
//! not in the table is carried. `docs/file-systems.md` tells users the same.
//!
//! The magic numbers are those of linux/magic.h; where it lacks one, the entry names the file of
//! the kernel's.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxAttributes, StatxFlags};
use rustix::mount::{OpenTreeFlags, open_tree};

use kata_like_failure::Failure;
use kata_like_spec::MOUNT_SOURCE;

pub mod in_memory;
pub mod mount_table;

/// TMPFS_MAGIC of linux/magic.h, which devtmpfs has as well.
pub const TMPFS_MAGIC: u32 = 0x0102_1994;

/// A file system that is not carried.
#[derive(Debug, PartialEq, Eq)]
pub struct KernelSystem {
    /// Its name, as in the file-system column of `/proc/self/mountinfo`.
    pub name: &'static str,
    /// What fstatfs(2) says of it. 0: another file system says the same.
    magic: u32,
    /// Why a guest can't have it.
    why: &'static str,
    /// What helps whoever needs it.
    helps: &'static str,
    /// The type of mount that shows the guest's own one, where a bind mount of the whole can only
    /// mean that.
    own: Option<&'static str>,
}

const KERNEL: &str = "its files act on the host's kernel, not on the guest's";
const TYPE_PROC: &str = "mount one of type proc";
const TYPE_SYSFS: &str = "mount one of type sysfs";
const TYPE_CGROUP: &str = "mount one of type cgroup";
const NOTHING: &str = "what needs it must run on the host: use runc for it";

const fn refused(name: &'static str, magic: u32, helps: &'static str) -> KernelSystem {
    KernelSystem {
        name,
        magic,
        why: KERNEL,
        helps,
        own: None,
    }
}

impl KernelSystem {
    const fn because(self, why: &'static str) -> Self {
        Self { why, ..self }
    }

    const fn own(self, kind: &'static str) -> Self {
        Self {
            own: Some(kind),
            ..self
        }
    }
}

/// The file systems that are not carried: this is the one place that says so.
static TABLE: [KernelSystem; 27] = [
    refused("proc", 0x9fa0, TYPE_PROC),
    refused("sysfs", 0x6265_6572, TYPE_SYSFS),
    refused("cgroup", 0x0027_e0eb, TYPE_CGROUP),
    refused("cgroup2", 0x6367_7270, TYPE_CGROUP).own("cgroup"),
    refused("mqueue", 0x1980_0202, "mount one of type mqueue").own("mqueue"),
    refused("devpts", 0x1cd1, "mount one of type devpts"),
    refused(
        "devtmpfs",
        0,
        "name devices one by one (ctr --device); a container has the guest's own /dev",
    )
    .because("its nodes lead to the host's devices"),
    refused(
        "hugetlbfs",
        0x9584_58f6,
        "use a volume in memory, and madvise with MADV_HUGEPAGE",
    )
    .because("its pages can only be mapped, and virtio-fs carries no mapping"),
    refused(
        "autofs",
        0x0187,
        "name a directory that is mounted below it",
    )
    .because("a look into it would make the host mount things"),
    refused("nsfs", 0x6e73_6673, "name it in linux.namespaces")
        .because("it stands for a namespace of the host's"),
    refused("pidfs", 0x5049_4446, NOTHING).because("it stands for a process of the host's"),
    refused("debugfs", 0x6462_6720, NOTHING),
    refused("tracefs", 0x7472_6163, NOTHING),
    refused("securityfs", 0x7363_6673, NOTHING),
    // fs/configfs/mount.c
    refused("configfs", 0x6265_6570, NOTHING),
    refused("pstore", 0x6165_676c, NOTHING),
    refused("efivarfs", 0xde5e_81e4, NOTHING),
    refused("bpf", 0xcafe_4a11, NOTHING),
    refused("selinuxfs", 0xf97c_ff8c, NOTHING),
    refused("smackfs", 0x4341_5d53, NOTHING),
    refused("apparmorfs", 0x5a3c_69f0, NOTHING),
    refused("binfmt_misc", 0x4249_4e4d, NOTHING),
    refused("fusectl", 0x6573_5543, NOTHING),
    // include/linux/sunrpc/msg_prot.h and net/sunrpc/rpc_pipe.c
    refused("rpc_pipefs", 0x6759_6969, NOTHING),
    // fs/nfsd/nfsctl.c
    refused("nfsd", 0x6e66_7364, NOTHING),
    refused("binder", 0x6c6f_6f70, NOTHING),
    refused("resctrl", 0x0765_5821, NOTHING),
];

/// A source that lies on a file system of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The file system.
    pub system: &'static KernelSystem,
    /// Whether the source is all that is mounted there, and not a part of it.
    whole: bool,
}

impl Found {
    /// The type of mount that shows the guest's own in its place, if there is one.
    pub fn own_kind(&self) -> Option<&'static str> {
        self.system.own.filter(|_| self.whole)
    }

    /// The error that names the field, the type, the reason and what helps.
    pub fn refusal(&self, field: &str, source: &Path) -> Failure {
        let KernelSystem {
            name, why, helps, ..
        } = self.system;
        MOUNT_SOURCE.because(
            format_args!("{field} with source {} of type {name}", source.display()),
            format_args!("{why}; {helps}"),
        )
    }
}

/// The entry of a file system's name.
pub fn named(name: &str) -> Option<&'static KernelSystem> {
    TABLE.iter().find(|system| system.name == name)
}

/// What the path's file or directory lies on, if that is not carried. Mounts what is to be mounted
/// automatically there, as mount(8) does. Devices, sockets and pipes lie on nothing: `share` looks
/// at what they are.
pub fn of_path(source: &Path) -> io::Result<Option<Found>> {
    let opened = open_tree(CWD, source, OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    of(opened.as_fd())
}

/// The same for one that is open, by O_PATH, too.
pub fn of(file: impl AsFd) -> io::Result<Option<Found>> {
    let about = rustix::fs::fstat(&file)?;
    if !matches!(
        FileType::from_raw_mode(about.st_mode),
        FileType::Directory | FileType::RegularFile
    ) {
        return Ok(None);
    }
    // The kernel's word is wider; all magic numbers have 32 bits.
    let magic = rustix::fs::fstatfs(&file)?.f_type as u32;
    let system = match magic {
        TMPFS_MAGIC if mount_table::is_devtmpfs(about.st_dev)? => named("devtmpfs"),
        magic => TABLE
            .iter()
            .find(|system| system.magic != 0 && system.magic == magic),
    };
    let Some(system) = system else {
        return Ok(None);
    };
    let status = rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    let whole = status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    Ok(Some(Found { system, whole }))
}

#[cfg(test)]
mod tests;
