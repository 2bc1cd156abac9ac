//! The mounts of the spec, in its order: each is made detached and then put on a resolved target.
//!
//! Called by `init`, to check them in the runner and to make them in the container's process. A
//! file system is made with fsopen(2), a bind mount with open_tree(2). The mount gets its
//! attributes before anybody can see it. move_mount(2) attaches it to a file descriptor that
//! `rootfs` has resolved. What a bind mount shows is always a name in one of the two directories of
//! the pod's volumes: a container can name nothing else of the guest.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kata_like_failure::{Failure, Kind, Step};
use kata_like_linux::mount::{MountAttributes, set_attributes};
use kata_like_spec::MOUNT_TYPE;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use super::copy_up;
use super::error::Result;
use super::namespaces::Namespaces;
use super::options::{Options, READ_ONLY};
use super::request::Bind;
use super::rootfs::{Rootfs, Target, attach, clone_mount};

/// The files in /proc that a mount may cover: programs such as lxcfs replace them.
const REPLACEABLE_IN_PROC: [&str; 10] = [
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

/// The mounts that become read-only when everything is in place.
#[derive(Debug, Default)]
pub(super) struct Pending(Vec<(PathBuf, OwnedFd)>);

impl Pending {
    /// Called after the devices are made and all is mounted.
    pub(super) fn make_read_only(self) -> Result<()> {
        let attributes = MountAttributes {
            set: READ_ONLY,
            ..MountAttributes::default()
        };
        for (destination, mount) in self.0 {
            set_attributes(&mount, false, &attributes)
                .step(|| format!("make the mount on {} read-only", destination.display()))?;
        }
        Ok(())
    }
}

/// The sources of the bind mounts, by their place in the list: each detached, and what it is.
pub(super) type Sources = BTreeMap<usize, (OwnedFd, Target)>;

/// One entry of the spec's list, checked.
pub(super) struct Entry<'a> {
    field: String,
    mount: &'a Mount,
    options: Options,
    /// Where a bind mount is from.
    bind: Option<&'a Bind>,
}

/// Checks the spec's list, before anything is made.
pub(super) fn check<'a>(
    spec: &'a Spec,
    binds: &'a BTreeMap<usize, Bind>,
) -> Result<Vec<Entry<'a>>> {
    let mounts = spec.mounts().iter().flatten().enumerate();
    mounts
        .map(|(index, mount)| Entry::of(format!("mounts[{index}]"), mount, binds.get(&index)))
        .collect()
}

impl<'a> Entry<'a> {
    fn of(field: String, mount: &'a Mount, bind: Option<&'a Bind>) -> Result<Self> {
        if kata_like_spec::is_bind(mount) != bind.is_some() {
            let why = "a source is given for each bind mount, and for no other";
            return Err(Failure::bad(format!("{field}.source"), why));
        }
        if super::rootfs::split(mount.destination()).is_none() {
            return Err(Failure::bad(
                format!("{field}.destination"),
                format!("{:?} names nothing below the root", mount.destination()),
            ));
        }
        let options = mount.options().as_deref().unwrap_or_default();
        let options = Options::parse(options, &format!("{field}.options"))?;
        Ok(Self {
            field,
            mount,
            options,
            bind,
        })
    }
}

/// Takes a copy of each volume that is mounted, out of the two directories of the pod's volumes:
/// the shared ones, and those in memory.
pub(super) fn open_sources(entries: &[Entry], volumes: &Path, memory: &Path) -> Result<Sources> {
    let mut sources = Sources::new();
    for (index, entry) in entries.iter().enumerate() {
        let Entry {
            mount,
            options,
            bind: Some(bind),
            ..
        } = entry
        else {
            continue;
        };
        let (directory, name) = match bind {
            Bind::Volume(name) => (volumes, name),
            Bind::Memory(name) => (memory, name),
        };
        let step = || {
            format!(
                "mount bind on {}: open volume {name:?}",
                mount.destination().display()
            )
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty()).step(step)?;
        let (source, target) = open_volume(directory.as_fd(), name).step(step)?;
        let copy = clone_mount(source.as_fd(), options.recursive).step(step)?;
        sources.insert(index, (copy, target));
    }
    Ok(sources)
}

/// Makes the mounts. `sysfs` was made outside, for a container that can't make its own.
pub(super) fn apply(
    entries: &[Entry],
    namespaces: &Namespaces,
    rootfs: &Rootfs,
    mut sources: Sources,
    mut sysfs: Option<OwnedFd>,
) -> Result<Pending> {
    let mut pending = Pending::default();
    for (index, entry) in entries.iter().enumerate() {
        let Entry {
            field,
            mount,
            options,
            ..
        } = entry;
        let place = Place { mount, rootfs };
        if let Some((source, target)) = sources.remove(&index) {
            place.bind(source.as_fd(), target, options)?;
            continue;
        }
        match mount.typ().as_deref().unwrap_or_default() {
            "cgroup" | "cgroup2" => place.cgroup(options, namespaces, &mut pending)?,
            "tmpfs" => place.tmpfs(options, &mut pending)?,
            kind @ ("proc" | "sysfs" | "devpts" | "mqueue" | "ramfs") => {
                let made = if kind == "sysfs" { sysfs.take() } else { None };
                let own = kind == "proc" || namespaces.is_new(LinuxNamespaceType::Network);
                place.file_system(kind, made, own, options, &mut pending)?;
            }
            kind => {
                return Err(MOUNT_TYPE.of(format_args!("{field}.type {kind:?}")));
            }
        }
    }
    Ok(pending)
}

/// Where an entry is mounted.
struct Place<'a> {
    mount: &'a Mount,
    rootfs: &'a Rootfs,
}

impl Place<'_> {
    fn destination(&self) -> &Path {
        self.mount.destination()
    }

    fn step(&self) -> String {
        let kind = self.mount.typ().as_deref().unwrap_or("bind");
        format!("mount {kind} on {}", self.destination().display())
    }

    /// Finds the file or directory to mount on, and makes it if it isn't there.
    fn target(&self, target: Target) -> Result<OwnedFd> {
        self.rootfs
            .ensure(self.destination(), target)
            .step(|| format!("{}: make the mount point", self.step()))
    }

    /// Refuses mounts over /proc, except over the files that lxcfs replaces. (A tmpfs only hides
    /// what is there.) We judge by path, because programs look there whatever is mounted.
    fn check_procfs(&self, target: BorrowedFd<'_>) -> Result<()> {
        let path = self.rootfs.path_of(target)?;
        let inside = path.strip_prefix("/proc");
        let system = rustix::fs::fstatfs(target).step(|| self.step())?;
        if inside.is_err() && system.f_type != libc::PROC_SUPER_MAGIC {
            return Ok(());
        }
        match inside {
            Ok(file)
                if REPLACEABLE_IN_PROC
                    .iter()
                    .any(|&known| Path::new(known) == file) =>
            {
                Ok(())
            }
            _ => Err(Failure::new(
                Kind::Failed,
                format!(
                    "{:?} cannot be mounted because it is inside /proc",
                    self.destination()
                ),
            )),
        }
    }

    fn file_system(
        &self,
        kind: &str,
        made: Option<OwnedFd>,
        own: bool,
        options: &Options,
        pending: &mut Pending,
    ) -> Result<()> {
        if matches!(kind, "proc" | "sysfs") {
            self.check_ordinary_directory(kind)?;
        }
        let target = self.target(Target::Directory)?;
        if kind != "proc" {
            self.check_procfs(target.as_fd())?;
        }
        let mount = match made {
            Some(made) => made,
            // The file system itself as well, as mount(2) does it, if it is the container's own.
            None if own
                && matches!(kind, "proc" | "sysfs")
                && options.attributes.set & READ_ONLY != 0 =>
            {
                let mut parameters = options.parameters.clone();
                parameters.push(("ro".to_owned(), None));
                self.make(kind, &parameters)?
            }
            None => self.make(kind, &options.parameters)?,
        };
        self.finish(mount, target.as_fd(), options, pending)
    }

    /// Programs find procfs and sysfs by their path, so no symlink may lead away from it.
    fn check_ordinary_directory(&self, kind: &str) -> Result<()> {
        match self.rootfs.resolve_nofollow(self.destination()) {
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error).step(|| self.step()),
            Ok(found) => {
                let status = rustix::fs::fstat(&found).step(|| self.step())?;
                let kind_found = FileType::from_raw_mode(status.st_mode);
                let same = self.rootfs.path_of(found.as_fd())? == self.clean_destination();
                if kind_found == FileType::Directory && same {
                    return Ok(());
                }
                Err(Failure::new(
                    Kind::Failed,
                    format!("filesystem {kind:?} must be mounted on ordinary directory"),
                ))
            }
        }
    }

    fn clean_destination(&self) -> PathBuf {
        Path::new("/")
            .join(self.destination())
            .components()
            .collect()
    }

    fn tmpfs(&self, options: &Options, pending: &mut Pending) -> Result<()> {
        // The mode of the directory that it covers, unless the spec gives one or nothing is there.
        let covered = match self.rootfs.resolve(self.destination()) {
            Ok(found) if options.parameter("mode").is_none() => {
                Some(rustix::fs::fstat(&found).step(|| self.step())?.st_mode & 0o7777)
            }
            _ => None,
        };
        let target = self.target(Target::Directory)?;
        let mount = self.make("tmpfs", &options.parameters)?;
        if let Some(mode) = covered {
            let mode = Mode::from_raw_mode(mode);
            rustix::fs::chmodat(&mount, ".", mode, AtFlags::empty()).step(|| self.step())?;
        }
        if options.copy_up {
            copy_up::copy(target.as_fd(), mount.as_fd())
                .step(|| format!("{}: copy up what it covers", self.step()))?;
        }
        self.finish(mount, target.as_fd(), options, pending)
    }

    fn cgroup(
        &self,
        options: &Options,
        namespaces: &Namespaces,
        pending: &mut Pending,
    ) -> Result<()> {
        let target = self.target(Target::Directory)?;
        self.check_procfs(target.as_fd())?;
        let mount = if namespaces.is_new(LinuxNamespaceType::Cgroup) {
            self.make("cgroup2", &[])?
        } else {
            // A new mount would change the options of the guest's own.
            let own = rustix::fs::open(
                "/sys/fs/cgroup",
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .step(|| self.step())?;
            clone_mount(own.as_fd(), false).step(|| self.step())?
        };
        self.finish(mount, target.as_fd(), options, pending)
    }

    /// Makes a new file system, detached.
    fn make(&self, kind: &str, parameters: &[(String, Option<String>)]) -> Result<OwnedFd> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
            .step(|| format!("{}: fsopen", self.step()))?;
        let result = (|| {
            if let Some(source) = self.mount.source() {
                fsconfig_set_string(context.as_fd(), "source", source.as_path())?;
            }
            for (key, value) in parameters {
                match value {
                    Some(value) => {
                        fsconfig_set_string(context.as_fd(), key.as_str(), value.as_str())
                    }
                    None => fsconfig_set_flag(context.as_fd(), key.as_str()),
                }?;
            }
            fsconfig_create(context.as_fd())?;
            fsmount(
                context.as_fd(),
                FsMountFlags::FSMOUNT_CLOEXEC,
                MountAttrFlags::empty(),
            )
        })();
        result.step(|| format!("{}{}", self.step(), complaint(context.as_fd())))
    }

    /// Sets the attributes, the place and the propagation. Read-only comes later where files are
    /// still to be made.
    fn finish(
        &self,
        mount: OwnedFd,
        target: BorrowedFd<'_>,
        options: &Options,
        pending: &mut Pending,
    ) -> Result<()> {
        let mut attributes = options.attributes;
        let kind = self.mount.typ().as_deref();
        let later = kind == Some("tmpfs") || self.clean_destination() == Path::new("/dev");
        let read_only = attributes.set & READ_ONLY != 0;
        if later {
            attributes.set &= !READ_ONLY;
        }
        self.change(mount.as_fd(), &attributes, &options.below)?;
        attach(mount.as_fd(), target).step(|| self.step())?;
        self.propagate(mount.as_fd(), options)?;
        if later && read_only {
            pending.0.push((self.destination().to_owned(), mount));
        }
        Ok(())
    }

    fn bind(&self, source: BorrowedFd<'_>, target: Target, options: &Options) -> Result<()> {
        let target = self.target(target)?;
        self.check_procfs(target.as_fd())?;
        self.change(source, &options.attributes, &options.below)?;
        attach(source, target.as_fd()).step(|| self.step())?;
        self.propagate(source, options)
    }

    fn change(
        &self,
        mount: BorrowedFd<'_>,
        own: &MountAttributes,
        below: &MountAttributes,
    ) -> Result<()> {
        for (attributes, recursive) in [(below, true), (own, false)] {
            if *attributes != MountAttributes::default() {
                set_attributes(mount, recursive, attributes)
                    .step(|| format!("{}: set its options", self.step()))?;
            }
        }
        Ok(())
    }

    fn propagate(&self, mount: BorrowedFd<'_>, options: &Options) -> Result<()> {
        for &(propagation, recursive) in &options.propagation {
            let attributes = MountAttributes {
                propagation,
                ..MountAttributes::default()
            };
            set_attributes(mount, recursive, &attributes)
                .step(|| format!("{}: set its propagation", self.step()))?;
        }
        Ok(())
    }
}

/// Opens a volume and finds what it is. Its name is one component and no symlink, so it can't lead
/// elsewhere.
fn open_volume(volumes: BorrowedFd<'_>, name: &str) -> std::io::Result<(OwnedFd, Target)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Opened as a directory, so that a mount of the host's below the share becomes a mount in here.
    match rustix::fs::openat(volumes, name, flags | OFlags::DIRECTORY, Mode::empty()) {
        Err(Errno::NOTDIR) => {}
        result => return Ok((result?, Target::Directory)),
    }
    let file = rustix::fs::openat(volumes, name, flags, Mode::empty())?;
    let status = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Symlink {
        return Err(std::io::Error::other("it is a symlink"));
    }
    Ok((file, Target::File))
}

/// What the file system itself says about its parameters.
fn complaint(context: BorrowedFd<'_>) -> String {
    let mut text = [0u8; 512];
    match rustix::io::read(context, &mut text) {
        Ok(length) => format!(
            " ({})",
            String::from_utf8_lossy(text.get(2..length).unwrap_or_default()).trim()
        ),
        Err(_) => String::new(),
    }
}
