//! A process's standard streams: three open files, or a terminal of the container's own devpts, so
//! that it exists in there.
//!
//! Called by `init` and `exec` in the container's process. The master goes to the agent over the
//! channel. By the time of an exec the container may have put anything at /dev/pts/ptmx, so we
//! check that what we open there is the multiplexer of a devpts.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use kata_like_failure::{Failure, Kind, Step};
use oci_spec::runtime::Process;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::error::Result;
use super::request::Size;
use super::rootfs::{Rootfs, attach, clone_mount, split};

/// The type of a devpts (linux/magic.h).
const DEVPTS_MAGIC: rustix::fs::FsWord = 0x1cd1;

/// Both ends of a terminal.
struct Terminal {
    /// The agent's end.
    master: OwnedFd,
    slave: OwnedFd,
}

/// Gives the process its standard streams: the three `streams`, or a terminal of the size
/// `terminal`, whose master it returns. Without a `rootfs` the terminal is of the root that the
/// process has joined.
pub(super) fn give(
    process: &Process,
    streams: Vec<OwnedFd>,
    terminal: Option<Size>,
    rootfs: Option<&Rootfs>,
) -> Result<Option<OwnedFd>> {
    let Some(size) = terminal else {
        take_streams(streams)?;
        return Ok(None);
    };
    let terminal = match rootfs {
        None => Terminal::of_root()?,
        Some(rootfs) => {
            let terminal = Terminal::of_rootfs(rootfs)?;
            terminal.bind_console(rootfs)?;
            terminal
        }
    };
    terminal.take(process, size)?;
    Ok(Some(terminal.master))
}

fn take_streams(streams: Vec<OwnedFd>) -> Result<()> {
    let step = || "take over the standard streams";
    let Ok([stdin, stdout, stderr]) = <[OwnedFd; 3]>::try_from(streams) else {
        return Err(Failure::failed(step(), "there must be three"));
    };
    rustix::stdio::dup2_stdin(&stdin).step(step)?;
    rustix::stdio::dup2_stdout(&stdout).step(step)?;
    rustix::stdio::dup2_stderr(&stderr).step(step)
}

impl Terminal {
    /// Opens a terminal of the devpts in `rootfs`.
    fn of_rootfs(rootfs: &Rootfs) -> Result<Self> {
        let multiplexer = rootfs
            .resolve_nofollow(Path::new("/dev/pts/ptmx"))
            .step(|| "open /dev/pts/ptmx for the terminal")?;
        Self::open(multiplexer)
    }

    /// Opens a terminal of the devpts in the root that the process has joined.
    fn of_root() -> Result<Self> {
        let multiplexer = rustix::fs::openat2(
            rustix::fs::CWD,
            "/dev/pts/ptmx",
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            rustix::fs::ResolveFlags::NO_MAGICLINKS,
        )
        .step(|| "open /dev/pts/ptmx for the terminal")?;
        Self::open(multiplexer)
    }

    fn open(multiplexer: OwnedFd) -> Result<Self> {
        let step = || "open a terminal of the container's devpts";
        let status = rustix::fs::fstat(&multiplexer).step(step)?;
        let system = rustix::fs::fstatfs(&multiplexer).step(step)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::CharacterDevice
            || status.st_rdev != rustix::fs::makedev(5, 2)
            || system.f_type != DEVPTS_MAGIC
        {
            return Err(Failure::failed(
                step(),
                "/dev/pts/ptmx is not that of a devpts",
            ));
        }
        // Through a procfs of the library's own, whatever the container has made of its one.
        let flags = pathrs::flags::OpenFlags::O_RDWR
            | pathrs::flags::OpenFlags::O_NOCTTY
            | pathrs::flags::OpenFlags::O_CLOEXEC;
        let master = pathrs::Handle::from_fd(multiplexer)
            .reopen(flags)
            .step(step)?;
        rustix::pty::unlockpt(&master).step(step)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).step(step)?;
        Ok(Self {
            master: master.into(),
            slave,
        })
    }

    /// Binds the terminal onto the container's /dev/console.
    fn bind_console(&self, rootfs: &Rootfs) -> Result<()> {
        let step = || "mount the terminal on /dev/console";
        let path = Path::new("/dev/console");
        let (parent, name) = split(path).ok_or_else(|| Failure::new(Kind::Failed, step()))?;
        let directory = rootfs.resolve(parent).step(step)?;
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let create = flags | OFlags::CREATE | OFlags::WRONLY | OFlags::EXCL;
        match rustix::fs::openat(&directory, name, create, Mode::from(0o666)) {
            Ok(_) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).step(step),
        }
        let target =
            rustix::fs::openat(&directory, name, flags | OFlags::PATH, Mode::empty()).step(step)?;
        let status = rustix::fs::fstat(&target).step(step)?;
        if FileType::from_raw_mode(status.st_mode) == FileType::Symlink {
            return Err(Failure::failed(step(), "it is a symlink"));
        }
        let mount = clone_mount(self.slave.as_fd(), false).step(step)?;
        attach(mount.as_fd(), target.as_fd()).step(step)
    }

    /// Sets the size, and makes the terminal the process's controlling one and its three streams.
    fn take(&self, process: &Process, asked: Size) -> Result<()> {
        if let Some(size) = first_size(process, asked) {
            rustix::termios::tcsetwinsize(&self.slave, size)
                .step(|| "set the terminal's first size")?;
        }
        let step = || "make the terminal the process's own";
        rustix::stdio::dup2_stdin(&self.slave).step(step)?;
        rustix::stdio::dup2_stdout(&self.slave).step(step)?;
        rustix::stdio::dup2_stderr(&self.slave).step(step)?;
        rustix::process::ioctl_tiocsctty(&self.slave).step(step)
    }
}

/// The size that is asked for, or else the spec's, if it fits a terminal.
fn first_size(process: &Process, asked: Size) -> Option<Winsize> {
    let (width, height) = match (asked.width, asked.height) {
        (0, 0) => {
            let size = process.console_size()?;
            (
                u16::try_from(size.width()).ok()?,
                u16::try_from(size.height()).ok()?,
            )
        }
        size => size,
    };
    Some(Winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_asked_for_comes_before_the_specs() {
        let process: Process = serde_json::from_str(
            r#"{"cwd": "/", "user": {"uid": 0, "gid": 0}, "consoleSize": {"width": 100, "height": 40}}"#,
        )
        .unwrap();
        let size = |width, height| {
            let size = first_size(&process, Size { width, height }).unwrap();
            (size.ws_col, size.ws_row)
        };
        assert_eq!(size(80, 25), (80, 25));
        assert_eq!(size(0, 0), (100, 40));
    }
}
