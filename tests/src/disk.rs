//! A small file system of the host, in memory or on a loop device, below containers; and loop
//! devices without one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::ctr::Call;
use crate::host::Host;
use crate::{TestResult, failure};

/// The size of a file that [`Disk::fill`] makes.
const PIECE: u64 = 1 << 20;

/// The directory of [`Disk::fill`]'s files.
const FILLER: &str = "filler";

/// The project that [`Disk::limit`] limits.
const PROJECT: &str = "42";

/// A mounted file system, gone with the value.
pub struct Disk {
    path: PathBuf,
    image: Option<PathBuf>,
}

impl Disk {
    /// Makes a file system of this kind, such as `ext4`, and mounts it with these options.
    pub fn new(
        host: &Host,
        kind: &str,
        mib: u64,
        make: &[&str],
        options: &str,
    ) -> TestResult<Self> {
        let path = PathBuf::from(format!("/run/{}", host.name(kind)));
        fs::create_dir(&path)?;
        let mut disk = Self { path, image: None };
        if kind == "tmpfs" {
            let size = format!("size={mib}m");
            run("mount", &["-t", kind, "-o", &size, kind, &disk.text()])?;
            return Ok(disk);
        }
        let image = disk.path.with_extension("image");
        File::create(&image)?.set_len(mib << 20)?;
        let name = image.display().to_string();
        disk.image = Some(image);
        let mut arguments = make.to_vec();
        arguments.push(&name);
        run(&format!("mkfs.{kind}"), &arguments)?;
        let options = format!("loop,{options}");
        run("mount", &["-t", kind, "-o", &options, &name, &disk.text()])?;
        Ok(disk)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn text(&self) -> String {
        self.path.display().to_string()
    }

    /// Fills it, except for `left` MiB.
    pub fn fill(&self, left: usize) -> TestResult {
        let filler = self.path.join(FILLER);
        fs::create_dir(&filler)?;
        let mut pieces = Vec::new();
        loop {
            let piece = filler.join(pieces.len().to_string());
            let file = File::create(&piece)?;
            pieces.push(piece);
            let flags = rustix::fs::FallocateFlags::empty();
            match rustix::fs::fallocate(&file, flags, 0, PIECE) {
                Ok(()) => {}
                Err(rustix::io::Errno::NOSPC) => break,
                Err(errno) => return Err(failure(format!("fill {}: {errno}", self.text()))),
            }
        }
        for piece in pieces.iter().rev().take(left + 1) {
            fs::remove_file(piece)?;
        }
        self.sync()
    }

    /// Removes what [`Disk::fill`] made.
    pub fn make_room(&self) -> TestResult {
        let filler = self.path.join(FILLER);
        if filler.exists() {
            fs::remove_dir_all(filler)?;
        }
        self.sync()
    }

    /// Allows `mib` MiB for the content of a directory; 0 is no limit.
    pub fn limit(&self, directory: &Path, mib: u64) -> TestResult {
        let directory = directory.display().to_string();
        run("chattr", &["-p", PROJECT, "+P", &directory])?;
        let blocks = (mib << 10).to_string();
        let rest = ["0", "0", &self.text()];
        let mut arguments = vec!["-P", PROJECT, "0", &blocks];
        arguments.extend(rest);
        run("setquota", &arguments)
    }

    fn sync(&self) -> TestResult {
        Ok(rustix::fs::syncfs(File::open(&self.path)?)?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", &self.text()]);
        let _ = fs::remove_dir(&self.path);
        if let Some(image) = &self.image {
            let _ = fs::remove_file(image);
        }
    }
}

/// A loop device of the host's, detached with the value.
pub struct LoopDevice(String);

impl LoopDevice {
    /// Attaches a loop device to a file.
    pub fn attach(image: &Path) -> TestResult<Self> {
        let mut attach = Command::new("losetup");
        attach
            .args(["--find", "--show"])
            .arg(image)
            .stdin(Stdio::null());
        Ok(Self(Call::new(attach).ok()?.text().trim().into()))
    }

    /// The path of its node.
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = run("losetup", &["-d", &self.0]);
    }
}

fn run(program: &str, arguments: &[&str]) -> TestResult {
    let mut command = Command::new(program);
    command.args(arguments);
    Call::new(command).ok().map(drop)
}
