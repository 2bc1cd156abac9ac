//! The configuration: `/etc/kata-like/config.toml`, its drop-ins, and the defaults of an installed
//! tree.
//!
//! Read once by the shim for each pod and by `kata-like check`. The defaults are relative to the
//! running binary: one in `PREFIX/bin` finds its parts under `PREFIX/libexec/kata-like` and
//! `PREFIX/share/kata-like`, so an installed tree works with no file at all. A key that is not
//! known, or a value out of its range, is an error that names file, line and key: a mistyped limit
//! must not silently be no limit. `state` is the pod's folder on the host.

mod file;
pub mod state;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use file::ConfigError;

/// Where the configuration is looked for: `config.toml` here, then `config.d/*.toml` in the order
/// of their names.
pub const DIRECTORY: &str = "/etc/kata-like";

/// The prefix of a binary that does not lie in a `bin` directory.
const DEFAULT_PREFIX: &str = "/usr/local";

/// What guest memory is made of on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// 2 MiB pages where the host's transparent huge pages allow them, else 4 KiB.
    Transparent,
    /// 2 MiB pages of the host's hugetlb pool; a pod that does not fit it fails to start.
    Hugetlb,
}

/// How much is written to the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What ended a task or a pod against its will.
    Error,
    /// What the operator should look into.
    Warn,
    /// Each pod's start and end.
    Info,
    /// What each call did.
    Debug,
    /// Whatever any library has to say.
    Trace,
}

impl LogLevel {
    /// The name as it is written in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Everything that an operator can set, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The program `kata-like-vmm`.
    pub vmm: PathBuf,
    /// The program `kata-like-fsd`.
    pub fsd: PathBuf,
    /// The program `kata-like-proxy`.
    pub proxy: PathBuf,
    /// The guest kernel, an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's initrd.
    pub initrd: PathBuf,
    /// The layout of the guest kernel's log, recorded when that kernel was built.
    pub printk: PathBuf,
    /// Memory of a pod without a memory limit, in MiB; even, since guest memory is made of 2 MiB
    /// pages. A host that has less refuses the pod.
    pub memory_mib: u32,
    /// The vCPUs of a pod without a CPU limit; one with a limit gets as many as it can keep busy.
    pub max_vcpus: u8,
    /// What guest memory is made of.
    pub hugepages: HugePages,
    /// How much is written to the log.
    pub log_level: LogLevel,
    /// Whether VMM, fs server and proxy run under the SELinux label that the pod's spec gives.
    pub selinux: bool,
    /// How long a guest may show no progress between its first instruction and the agent's dial.
    pub boot_deadline: Duration,
}

impl Config {
    /// What holds without any file, for programs installed under `prefix`.
    pub fn defaults(prefix: &Path) -> Self {
        let libexec = prefix.join("libexec/kata-like");
        let share = prefix.join("share/kata-like");
        Self {
            vmm: libexec.join("kata-like-vmm"),
            fsd: libexec.join("kata-like-fsd"),
            proxy: libexec.join("kata-like-proxy"),
            kernel: share.join("vmlinux"),
            initrd: share.join("initrd.img"),
            printk: share.join("printk.json"),
            memory_mib: 2048,
            max_vcpus: online_cpus().min(4),
            hugepages: HugePages::Transparent,
            log_level: LogLevel::Info,
            selinux: true,
            boot_deadline: Duration::from_secs(30),
        }
    }
}

/// The directory above the `bin` that the running program lies in.
pub fn prefix_of_running_program() -> PathBuf {
    // A program replaced while it runs has " (deleted)" after its name, not after its directory's.
    std::env::current_exe()
        .ok()
        .and_then(|program| prefix_of(&program))
        .unwrap_or_else(|| DEFAULT_PREFIX.into())
}

fn prefix_of(program: &Path) -> Option<PathBuf> {
    let directory = program.parent()?;
    if directory.file_name()? != "bin" {
        return None;
    }
    directory.parent().map(Path::to_path_buf)
}

/// Host CPUs that are online, whatever the caller itself is bound to; 255 where there are more.
pub fn online_cpus() -> u8 {
    let count = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
    count
        .ok()
        .flatten()
        .and_then(|count| u8::try_from(count).ok())
        .unwrap_or(u8::MAX)
        .max(1)
}

#[cfg(test)]
mod tests;
