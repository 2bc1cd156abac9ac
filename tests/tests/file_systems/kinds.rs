//! How to make one file system of each kind on the host.

use std::fs::{self, File};
use std::io::pipe;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kata_like_tests::host::spawn_bound;
use kata_like_tests::process::until;
use kata_like_tests::{Directory, TestResult, failure};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use super::run;

/// How one is made.
#[derive(Clone, Copy)]
pub(super) enum Recipe {
    /// An image of this many MiB, made by this program with these arguments before the image's
    /// name.
    Image(u64, &'static str, &'static [&'static str]),
    /// An image of a directory, made by this program; `TREE` and `IMAGE` stand for the two.
    Tree(&'static str, &'static [&'static str]),
    /// Only a mount, with these options.
    Plain(&'static str),
    /// A path that every host has.
    There(&'static str),
    /// One over two directories.
    Overlay,
    /// An ext4 image that a program serves by FUSE.
    Fuse,
    /// A mount point that waits until a program mounts something there.
    Automount,
    /// The file of a namespace.
    Namespace,
}

/// A kind.
pub(super) struct Kind {
    /// Its name on the page.
    pub(super) name: &'static str,
    recipe: Recipe,
}

const fn kind(name: &'static str, recipe: Recipe) -> Kind {
    Kind { name, recipe }
}

/// All kinds that are tried.
pub(super) const KINDS: &[Kind] = &[
    kind(
        "ext4",
        Recipe::Image(64, "mkfs.ext4", &["-q", "-O", "project"]),
    ),
    kind("xfs", Recipe::Image(320, "mkfs.xfs", &["-q"])),
    kind(
        "btrfs",
        Recipe::Image(128, "mkfs.btrfs", &["-q", "--mixed"]),
    ),
    kind("f2fs", Recipe::Image(64, "mkfs.f2fs", &["-q"])),
    kind("vfat", Recipe::Image(32, "mkfs.vfat", &[])),
    kind("exfat", Recipe::Image(32, "mkfs.exfat", &[])),
    kind("udf", Recipe::Image(32, "mkfs.udf", &[])),
    kind(
        "squashfs",
        Recipe::Tree("mksquashfs", &["TREE", "IMAGE", "-quiet", "-no-progress"]),
    ),
    kind("erofs", Recipe::Tree("mkfs.erofs", &["IMAGE", "TREE"])),
    kind(
        "iso9660",
        Recipe::Tree("genisoimage", &["-quiet", "-R", "-o", "IMAGE", "TREE"]),
    ),
    kind("overlay", Recipe::Overlay),
    kind("tmpfs", Recipe::Plain("")),
    kind("ramfs", Recipe::Plain("")),
    kind("fuse.*", Recipe::Fuse),
    kind("cgroup2", Recipe::There("/sys/fs/cgroup")),
    kind("mqueue", Recipe::There("/dev/mqueue")),
    kind("proc", Recipe::There("/proc")),
    kind("sysfs", Recipe::There("/sys")),
    kind("devtmpfs", Recipe::There("/dev")),
    kind("devpts", Recipe::There("/dev/pts")),
    kind("cgroup", Recipe::Plain("none,name=a-test")),
    kind("hugetlbfs", Recipe::Plain("")),
    kind("autofs", Recipe::Automount),
    kind("nsfs", Recipe::Namespace),
    kind("debugfs", Recipe::Plain("")),
    kind("tracefs", Recipe::Plain("")),
    kind("securityfs", Recipe::Plain("")),
    kind("configfs", Recipe::Plain("")),
    kind("pstore", Recipe::Plain("")),
    kind("bpf", Recipe::Plain("")),
    kind("binfmt_misc", Recipe::Plain("")),
    kind("fusectl", Recipe::Plain("")),
    kind("rpc_pipefs", Recipe::Plain("")),
    kind("nfsd", Recipe::Plain("")),
];

/// A mounted file system. Dropped, it is unmounted.
pub(super) struct Mounted {
    path: PathBuf,
    is_there: bool,
    held: Vec<File>,
    program: Option<Child>,
}

impl Mounted {
    /// Mounts one of this kind below a directory.
    pub(super) fn new(place: &Directory, name: &str) -> TestResult<Self> {
        let file = name.replace(['*', '.'], "_");
        Self::make(&place.join(&file), name)
            .map_err(|error| failure(format!("mount one of type {name}: {error}")))
    }

    /// Mounts one that needs no image on a path.
    pub(super) fn at(path: &Path, name: &str) -> TestResult<Self> {
        Self::make(path, name)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn make(path: &Path, name: &str) -> TestResult<Self> {
        let kind = KINDS.iter().find(|kind| kind.name == name);
        let kind = kind.ok_or_else(|| failure("not known"))?;
        let mut one = Self {
            path: path.into(),
            is_there: false,
            held: Vec::new(),
            program: None,
        };
        if let Recipe::There(path) = kind.recipe {
            (one.path, one.is_there) = (path.into(), true);
            return Ok(one);
        }
        fs::create_dir_all(path)?;
        let image = path.with_extension("image");
        match kind.recipe {
            Recipe::Image(size, program, arguments) => {
                make_image(&image, size, program, arguments)?;
                one.loop_mount(&image, name, "loop")?;
            }
            Recipe::Tree(program, arguments) => {
                let tree = path.with_extension("tree");
                fs::create_dir(&tree)?;
                fs::write(tree.join("kept"), "of the host\n")?;
                let [tree, image_name] = [&tree, &image].map(|path| path.display().to_string());
                let word = |word: &&'static str| match *word {
                    "TREE" => tree.clone(),
                    "IMAGE" => image_name.clone(),
                    word => word.to_owned(),
                };
                let words: Vec<String> = arguments.iter().map(word).collect();
                run(
                    program,
                    &words.iter().map(String::as_str).collect::<Vec<_>>(),
                )?;
                one.loop_mount(&image, name, "loop,ro")?;
                return Ok(one);
            }
            Recipe::Plain(options) => {
                let _ = run("modprobe", &["-q", module(name)]); // built in, as most are
                let options = std::ffi::CString::new(options)?;
                mount(name, path, name, MountFlags::empty(), options.as_c_str())?;
            }
            Recipe::Overlay => one.overlay()?,
            Recipe::Fuse => one.serve(&image)?,
            Recipe::Automount => one.automount()?,
            Recipe::Namespace => {
                one.path = path.join("file");
                fs::write(&one.path, "")?;
                mount_bind("/proc/self/ns/net", &one.path)?;
            }
            Recipe::There(_) => {}
        }
        // Not if nothing can be written.
        let _ = fs::write(one.path.join("kept"), "of the host\n");
        Ok(one)
    }

    fn loop_mount(&self, image: &Path, name: &str, options: &str) -> TestResult {
        let [image, path] = [image, &self.path].map(|path| path.display().to_string());
        run("mount", &["-t", name, "-o", options, &image, &path]).map(drop)
    }

    fn overlay(&self) -> TestResult {
        let beside = self.path.with_extension("beside");
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| beside.join(name));
        for directory in [&lower, &upper, &work] {
            fs::create_dir_all(directory)?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options)?;
        mount(
            "overlay",
            &self.path,
            "overlay",
            MountFlags::empty(),
            options.as_c_str(),
        )?;
        Ok(())
    }

    /// A program in the foreground serves it, and ends when it is unmounted.
    fn serve(&mut self, image: &Path) -> TestResult {
        make_image(image, 64, "mkfs.ext4", &["-q"])?;
        let mut command = Command::new("fuse2fs");
        command
            .arg(image)
            .arg(&self.path)
            .args(["-f", "-o", "rw,allow_other"]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.program = Some(spawn_bound(command)?);
        let below = self.path.clone();
        until("fuse2fs has mounted it", Duration::from_secs(20), || {
            below.join("lost+found").exists()
        })
    }

    /// This process would be the one to mount something, and never does.
    fn automount(&mut self) -> TestResult {
        run("modprobe", &["autofs4"])?;
        let (read, write) = pipe()?;
        rustix::process::setpgid(None, None)?; // PID 1 and its children may have none
        let options = format!(
            "fd={},pgrp={},minproto=5,maxproto=5,indirect",
            write.as_raw_fd(),
            rustix::process::getpgrp().as_raw_nonzero()
        );
        let options = std::ffi::CString::new(options)?;
        mount(
            "autofs",
            &self.path,
            "autofs",
            MountFlags::empty(),
            options.as_c_str(),
        )?;
        for end in [std::os::fd::OwnedFd::from(read), write.into()] {
            self.held.push(File::from(end));
        }
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.is_there {
            let _ = unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
        if let Some(program) = &mut self.program {
            let _ = program.wait();
        }
    }
}

/// The module of a file system with another name.
fn module(name: &str) -> &str {
    match name {
        "rpc_pipefs" => "sunrpc",
        "fusectl" => "fuse",
        name => name,
    }
}

fn make_image(image: &Path, size: u64, program: &str, arguments: &[&str]) -> TestResult {
    File::create(image)?.set_len(size << 20)?;
    let image = image.display().to_string();
    let mut all = arguments.to_vec();
    all.push(&image);
    run(program, &all).map(drop)
}
