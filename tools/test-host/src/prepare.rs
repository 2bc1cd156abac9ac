//! Fetches and unpacks, once, everything that a test host is made of; `main` calls it before every
//! run.
//!
//! The result is a directory under `~/.cache/kata-like/test-host`. A hash of the recipe names it,
//! so another recipe never meets an old result. It appears whole, by a rename, or not at all; a
//! lock lets several callers wait for one. Its content:
//!
//! | path | what |
//! |---|---|
//! | `vmlinuz`, `initrd.img`, `lib/modules/RELEASE` | Debian's kernel, and our first root |
//! | `qemu/` | only if the machine's own QEMU is too old: see `emulator` |
//! | `containerd-2.1/`, `containerd-1.7/` | `containerd`, `ctr` and runc's shim of each |
//! | `docker/` | `dockerd`, its helpers and `docker`, which run on the newer containerd |
//! | `runc/runc` | from the machine's own suite: newer ones need a newer libc |
//! | `cni/` | the CNI plugins of the machine's own suite |
//! | `busybox.tar` | the image that tests run |
//! | `pause.tar` | the image of a Kubernetes pod's first container |
//! | `userland/` | a `/usr` with systemd, databases and others: see `userland` |
//! | `versions` | what was taken, for people |

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::archive::{Cpio, Entry};
use crate::emulator;
use crate::error::HostError;
use crate::image;
use crate::packages::{self, Beside, output};
use crate::userland;

pub struct Prepared {
    /// The directory that holds everything.
    pub root: PathBuf,
}

impl Prepared {
    /// A file or directory in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// Change this when this file, `archive` or `image` make something else of the same packages.
const RECIPE: &str = "6";

/// The suites that are unpacked beside the system, and what each is for.
const KERNEL_SUITE: &str = "bookworm-backports";
const CONTAINERD_1_7_SUITE: &str = "trixie";
const CONTAINERD_2_1_SUITE: &str = "sid";
const DOCKER_SUITE: &str = CONTAINERD_2_1_SUITE;

/// Docker's packages, the files taken from each, and the name by which each file is looked up.
const DOCKER: [(&str, &[(&str, &str)]); 3] = [
    (
        "docker.io",
        &[
            ("usr/sbin/dockerd", "dockerd"),
            ("usr/sbin/docker-proxy", "docker-proxy"),
        ],
    ),
    ("docker-cli", &[("usr/bin/docker", "docker")]),
    ("tini-static", &[("usr/bin/tini-static", "docker-init")]),
];

/// What is unpacked of the machine's own suite.
const BUSYBOX: &str = "busybox-static";
const RUNC: &str = "runc";
const CNI: &str = "containernetworking-plugins";

/// The modules that the first root needs before this machine's root can be mounted.
const FIRST_MODULES: [&str; 3] = ["9pnet_virtio", "9p", "overlay"];

/// The first root's init: mounts this machine's root under a tmpfs, and goes on there.
const INIT: &str = r#"#!/bin/busybox sh
# PID 1 until this machine's root is mounted; test-host goes on from there.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
program= run=
for word in $($b cat /proc/cmdline); do
    case $word in
    host.program=*) program=${word#*=} ;;
    host.run=*) run=${word#*=} ;;
    host.probe) echo "test-host: the kernel is up" >/dev/ttyS0; $b reboot -f ;;
    esac
done
fail() { echo "test-host: $1 failed" >/dev/ttyS0; $b poweroff -f; }
while read -r module; do
    $b insmod "/modules/$module" || fail "insmod $module"
done </modules/order
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /lower || fail 'mount of the root'
$b mount -t tmpfs -o mode=755 rw /rw || fail 'mount of a tmpfs'
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work root /root || fail 'mount of the overlay'
$b umount /dev /proc
exec $b switch_root /root "$program" inside "$run"
"#;

/// Returns the directory, made now if it isn't there.
pub fn prepare() -> Result<Prepared, HostError> {
    packages::install(&[
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("depmod", "kmod"),
        ("xz", "xz-utils"),
        ("ip", "iproute2"),
        ("iptables", "iptables"), // which CNI's portmap runs
        ("secilc", "secilc"),     // which makes a policy for SELinux
        // File systems of which the tests make images.
        ("mkfs.ext4", "e2fsprogs"),
        ("mkfs.xfs", "xfsprogs"),
        ("mkfs.btrfs", "btrfs-progs"),
        ("mkfs.f2fs", "f2fs-tools"),
        ("mkfs.vfat", "dosfstools"),
        ("mkfs.exfat", "exfatprogs"),
        ("mkfs.udf", "udftools"),
        ("mksquashfs", "squashfs-tools"),
        ("mkfs.erofs", "erofs-utils"),
        ("genisoimage", "genisoimage"),
        ("fuse2fs", "fuse2fs"),
        ("setquota", "quota"),
    ])?;
    let home = std::env::var_os("HOME").unwrap_or_else(|| "/root".into());
    let cache = Path::new(&home).join(".cache/kata-like/test-host");
    fs::create_dir_all(&cache).map_err(HostError::file("create", &cache))?;
    let recipe = [
        RECIPE,
        KERNEL_SUITE,
        CONTAINERD_1_7_SUITE,
        CONTAINERD_2_1_SUITE,
        BUSYBOX,
        RUNC,
        CNI,
        INIT,
        &format!("{DOCKER:?}"),
        &userland::PACKAGES.join(" "),
        &userland::ALONE.join(" "),
    ]
    .join("\n");
    let key = image::digest(recipe.as_bytes())[..16].to_owned();
    let root = cache.join(&key);

    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(HostError::file("create", &lock_path))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(
        HostError::system("wait for another test-host that prepares"),
    )?;
    if !root.is_dir() {
        eprintln!("test-host: fetching a kernel and containerd, once");
        let staging = cache.join(format!("{key}.new"));
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(HostError::file("remove", &staging))?;
        }
        fs::create_dir_all(&staging).map_err(HostError::file("create", &staging))?;
        build(&staging)?;
        fs::rename(&staging, &root).map_err(HostError::file("rename into place", &root))?;
    }
    Ok(Prepared { root })
}

/// Fetches everything into `root`, part by part.
fn build(root: &Path) -> Result<(), HostError> {
    let work = tempfile::Builder::new()
        .prefix("test-host-packages.")
        .tempdir()
        .map_err(HostError::system("make a working directory"))?;
    let apt = Beside::update(
        work.path(),
        &[KERNEL_SUITE, CONTAINERD_1_7_SUITE, CONTAINERD_2_1_SUITE],
    )?;
    let busybox = work.path().join("busybox");
    apt.unpack_own(BUSYBOX, &busybox)?;
    let busybox = busybox.join("bin/busybox");
    let kernel = kernel(&apt, work.path(), &busybox, root)?;
    if emulator::is_too_old()? {
        for package in emulator::PACKAGES {
            let package = format!("{package}/{KERNEL_SUITE}");
            apt.unpack(&package, &root.join(emulator::BESIDE))?;
        }
    }
    daemons(&apt, work.path(), root)?;
    own_programs(&apt, work.path(), root)?;
    for (image, name) in [(image::BUSYBOX, "busybox.tar"), (image::PAUSE, "pause.tar")] {
        image::write(&image, &busybox, &root.join(name))?;
    }
    let unpacked = work.path().join("userland");
    userland::build(&apt, &unpacked, &root.join("userland"))?;
    versions(&kernel, root)
}

/// The kernel, its modules and our first root for it; gives the package's name and version.
fn kernel(apt: &Beside, work: &Path, busybox: &Path, root: &Path) -> Result<String, HostError> {
    let kernel = apt.kernel(KERNEL_SUITE)?;
    let unpacked = work.join("kernel");
    apt.unpack(&kernel, &unpacked)?;
    let release = kernel
        .strip_prefix("linux-image-")
        .and_then(|rest| rest.split('=').next())
        .unwrap_or_default();
    copy(
        &unpacked.join("boot").join(format!("vmlinuz-{release}")),
        &root.join("vmlinuz"),
    )?;
    output(
        "list module dependencies",
        Command::new("depmod").arg("-b").arg(&unpacked).arg(release),
    )?;
    write_initrd(&unpacked, release, busybox, &root.join("initrd.img"))?;
    let modules = root.join("lib/modules");
    fs::create_dir_all(&modules).map_err(HostError::file("create", &modules))?;
    output(
        "copy the kernel's modules",
        Command::new("cp")
            .arg("-a")
            .arg(unpacked.join("lib/modules").join(release))
            .arg(&modules),
    )?;
    Ok(kernel)
}

/// Both versions of containerd, and Docker.
fn daemons(apt: &Beside, work: &Path, root: &Path) -> Result<(), HostError> {
    for (suite, name) in [
        (CONTAINERD_2_1_SUITE, "containerd-2.1"),
        (CONTAINERD_1_7_SUITE, "containerd-1.7"),
    ] {
        let unpacked = work.join(name);
        apt.unpack(&format!("containerd/{suite}"), &unpacked)?;
        for program in ["containerd", "ctr", "containerd-shim-runc-v2"] {
            copy(
                &unpacked.join("usr/bin").join(program),
                &root.join(name).join(program),
            )?;
        }
    }
    for (package, files) in DOCKER {
        let unpacked = work.join(package);
        apt.unpack(&format!("{package}/{DOCKER_SUITE}"), &unpacked)?;
        for (from, name) in files {
            copy(&unpacked.join(from), &root.join("docker").join(name))?;
        }
    }
    Ok(())
}

/// runc and the CNI plugins, of the machine's own suite.
fn own_programs(apt: &Beside, work: &Path, root: &Path) -> Result<(), HostError> {
    let runc = work.join("runc");
    apt.unpack_own(RUNC, &runc)?;
    copy(&find(&runc, "runc")?, &root.join("runc/runc"))?;
    let cni = work.join("cni");
    apt.unpack_own(CNI, &cni)?;
    output(
        "copy the CNI plugins",
        Command::new("cp")
            .arg("-a")
            .arg(cni.join("usr/lib/cni"))
            .arg(root.join("cni")),
    )?;
    Ok(())
}

/// Writes down, and says, what was taken.
fn versions(kernel: &str, root: &Path) -> Result<(), HostError> {
    let mut versions = format!("kernel {kernel}\n");
    versions.push_str(&emulator::version(emulator::program(root))?);
    versions.push('\n');
    for name in [
        "containerd-2.1/containerd",
        "containerd-1.7/containerd",
        "docker/dockerd",
        "runc/runc",
    ] {
        let text = output(
            "ask for a version",
            Command::new(root.join(name)).arg("--version"),
        )?;
        versions.push_str(text.lines().next().unwrap_or_default());
        versions.push('\n');
    }
    eprint!("{versions}");
    fs::write(root.join("versions"), versions).map_err(HostError::file("write", root))
}

/// Debian moved runc from /usr/sbin to /usr/bin between suites.
fn find(unpacked: &Path, program: &str) -> Result<PathBuf, HostError> {
    ["usr/sbin", "usr/bin"]
        .iter()
        .map(|directory| unpacked.join(directory).join(program))
        .find(|path| path.is_file())
        .ok_or_else(|| HostError::Missing {
            step: "unpack a package",
            why: format!("no {program} in it"),
        })
}

fn copy(from: &Path, to: &Path) -> Result<(), HostError> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(HostError::file("create", parent))?;
    }
    fs::copy(from, to).map_err(HostError::file("copy", from))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).map_err(HostError::file("chmod", to))
}

fn write_initrd(
    unpacked: &Path,
    release: &str,
    busybox: &Path,
    target: &Path,
) -> Result<(), HostError> {
    let mut modules: Vec<PathBuf> = Vec::new();
    for name in FIRST_MODULES {
        let mut modprobe = Command::new("modprobe");
        modprobe
            .arg("-d")
            .arg(unpacked)
            .args(["-S", release, "--show-depends", name]);
        for line in output("look up a module", &mut modprobe)?.lines() {
            if let Some(path) = line
                .strip_prefix("insmod ")
                .map(|path| PathBuf::from(path.trim()))
                && !modules.contains(&path)
            {
                modules.push(path);
            }
        }
    }
    let busybox = fs::read(busybox).map_err(HostError::file("read", busybox))?;
    let mut contents = Vec::new();
    for path in &modules {
        let plain = Command::new("xz")
            .arg("-dc")
            .arg(path)
            .output()
            .map_err(HostError::file("unpack the module", path))?;
        let name = path
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned());
        contents.push((name.unwrap_or_default(), plain.stdout));
    }
    let archive = (|| {
        let mut cpio = Cpio::new(Vec::new());
        for name in ["bin", "dev", "lower", "modules", "proc", "root", "rw"] {
            cpio.add(name, 0o755, Entry::Directory)?;
        }
        cpio.add("bin/busybox", 0o755, Entry::File(&busybox))?;
        cpio.add("init", 0o755, Entry::File(INIT.as_bytes()))?;
        let order: String = contents
            .iter()
            .map(|(name, _)| format!("{name}\n"))
            .collect();
        cpio.add("modules/order", 0o644, Entry::File(order.as_bytes()))?;
        for (name, content) in &contents {
            cpio.add(&format!("modules/{name}"), 0o644, Entry::File(content))?;
        }
        cpio.finish()
    })()
    .map_err(HostError::system("put the first root together"))?;
    fs::write(target, archive).map_err(HostError::file("write", target))
}
