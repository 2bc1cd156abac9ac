//! The files that a VM is started from, opened or found missing before anything runs.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kata_like_boot::{KVM, PrintkLayout, open_kvm};
use kata_like_config::Config;
use kata_like_failure::{Failure, Kind};

/// Whatever a VM is started from, open.
#[derive(Debug)]
pub struct Parts {
    pub(super) vmm: PathBuf,
    pub(super) fsd: PathBuf,
    pub(super) proxy: PathBuf,
    pub(super) kvm: OwnedFd,
    pub(super) kernel: OwnedFd,
    pub(super) initrd: OwnedFd,
    pub(super) printk: Option<PrintkLayout>,
    pub(super) place: Place,
}

/// What VMM, fs server and proxy are born under.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The SELinux label, if the host has one for them.
    pub label: Option<String>,
    /// Their oom_score_adj.
    pub oom_score: i32,
}

impl Parts {
    /// Opens all of it, or tells what is missing.
    pub fn open(config: &Config, place: Place) -> Result<Self, Failure> {
        for (what, path) in [
            ("VMM", &config.vmm),
            ("fs server", &config.fsd),
            ("proxy", &config.proxy),
        ] {
            rustix::fs::access(path, rustix::fs::Access::EXEC_OK).map_err(|errno| {
                Failure::failed(
                    format!("find the {what} {}", path.display()),
                    io::Error::from(errno),
                )
            })?;
        }
        Ok(Self {
            vmm: config.vmm.clone(),
            fsd: config.fsd.clone(),
            proxy: config.proxy.clone(),
            kvm: open_kvm(Path::new(KVM))
                .map_err(|error| Failure::new(Kind::Failed, kata_like_failure::one_line(&error)))?,
            kernel: open("guest kernel", &config.kernel)?.into(),
            initrd: open("guest image", &config.initrd)?.into(),
            printk: read_printk(&config.printk)?,
            place,
        })
    }

    /// The layout of the guest's log, if this kernel's was recorded.
    pub fn printk(&self) -> Option<PrintkLayout> {
        self.printk.clone()
    }
}

pub(super) fn open(what: &str, path: &Path) -> Result<File, Failure> {
    let failed = |cause| Failure::failed(format!("open the {what} {}", path.display()), cause);
    let file = File::open(path).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    match about.is_file() {
        true => Ok(file),
        false => Err(failed(io::Error::other("it is not a file"))),
    }
}

/// A kernel without the record has no log, and runs.
pub(super) fn read_printk(path: &Path) -> Result<Option<PrintkLayout>, Failure> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            tracing::warn!("no {}: the guest's log can't be read", path.display());
            return Ok(None);
        }
        Err(cause) => {
            let step = format!("open the layout of the guest's log {}", path.display());
            return Err(Failure::failed(step, cause));
        }
    };
    serde_json::from_reader(io::BufReader::new(file))
        .map(Some)
        .map_err(|cause| {
            let step = format!("read the layout of the guest's log {}", path.display());
            Failure::failed(step, cause)
        })
}
