//! What `test-host` is asked for on its command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Runs a command on a host with a working KVM.
#[derive(Debug, Parser)]
#[command(name = "test-host", version)]
pub struct Args {
    /// Directory that the command may write to for good; everything else it writes is forgotten.
    #[arg(long, value_name = "DIR")]
    pub share: Vec<PathBuf>,
    /// Memory of the host in MiB.
    #[arg(long, default_value_t = 8192, value_name = "MIB")]
    pub memory: u32,
    /// CPUs of the host. With more than one that really run side by side, the emulated host's own
    /// kernel breaks within minutes of virtual machines coming and going beside other work.
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// Seconds until the host and the command are stopped.
    #[arg(long, default_value = "2700", value_parser = seconds)]
    pub deadline: Duration,
    /// Where the kernel log of the host is kept.
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,
    /// Don't try this machine's own KVM.
    #[arg(long)]
    pub emulate: bool,
    /// The host's kernel has SELinux, with no policy loaded, in the place of AppArmor; this is
    /// always an emulated host.
    #[arg(long)]
    pub selinux: bool,
    /// The command gets the standard input, and a terminal if that is one.
    #[arg(long)]
    pub interactive: bool,
    /// Only fetch and unpack what the host needs, and print where it is.
    #[arg(long)]
    pub prepare: bool,
    /// The command and its arguments.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub command: Vec<OsString>,
}

fn seconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_secs)
}
