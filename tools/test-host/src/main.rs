//! `test-host`: runs a command on a host that has a working KVM, whatever this machine is.
//!
//! Called by `make test` and by hand. If the machine's own KVM boots a kernel (`direct` tries it),
//! the command runs here in namespaces of its own. Otherwise QEMU emulates an AMD machine with SVM
//! and nested paging (`machine`), which boots on this machine's root file system and runs the
//! command; `inside` is that host's PID 1. `prepare` fetches what both need, once.
//!
//! For the caller, output streams are live and the exit code is the command's. A failure of the
//! host itself has its own exit code, 70.

mod archive;
mod counter;
mod direct;
mod emulator;
mod error;
mod image;
mod inside;
mod keeper;
mod machine;
mod packages;
mod prepare;
mod setup;
mod terminal;
mod userland;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::error::HostError;

/// The host failed, not the command. (EX_SOFTWARE of sysexits.h)
const HOST_FAILED: u8 = 70;

/// Runs a command on a host with a working KVM.
#[derive(Debug, Parser)]
#[command(name = "test-host", version)]
pub struct Args {
    /// Directory that the command may write to for good; everything else it writes is forgotten.
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,
    /// Memory of the host in MiB.
    #[arg(long, default_value_t = 8192, value_name = "MIB")]
    memory: u32,
    /// CPUs of the host. With more than one that really run side by side, the emulated host's own
    /// kernel breaks within minutes of virtual machines coming and going beside other work.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Seconds until the host and the command are stopped.
    #[arg(long, default_value = "2700", value_parser = seconds)]
    deadline: Duration,
    /// Where the kernel log of the host is kept.
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Don't try this machine's own KVM.
    #[arg(long)]
    emulate: bool,
    /// The host's kernel has SELinux, with no policy loaded, in the place of AppArmor; this is
    /// always an emulated host.
    #[arg(long)]
    selinux: bool,
    /// The command gets the standard input, and a terminal if that is one.
    #[arg(long)]
    interactive: bool,
    /// Only fetch and unpack what the host needs, and print where it is.
    #[arg(long)]
    prepare: bool,
    /// The command and its arguments.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

fn seconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_secs)
}

fn main() -> ExitCode {
    let mut raw = std::env::args_os().skip(1);
    match raw.next().as_deref().and_then(|first| first.to_str()) {
        Some(inside::ROLE) => return inside::main(raw.next()),
        Some(keeper::ROLE) => return keeper::main(),
        Some(direct::ROLE) => return direct::main(raw.collect()),
        _ => {}
    }
    let args = Args::parse();
    match run(&args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("test-host: {}", error.one_line());
            ExitCode::from(HOST_FAILED)
        }
    }
}

fn run(args: &Args) -> Result<u8, HostError> {
    let prepared = prepare::prepare()?;
    if args.prepare {
        println!("{}", prepared.root.display());
        return Ok(0);
    }
    if args.command.is_empty() {
        return Err(HostError::Usage("no command given".into()));
    }
    if !args.emulate && !args.selinux {
        match direct::usable(&prepared) {
            Ok(()) => {
                eprintln!("test-host: this machine's own KVM boots a kernel; running here");
                return direct::run(args, &prepared);
            }
            Err(reason) => eprintln!("test-host: emulating a host with KVM: {reason}"),
        }
    }
    machine::run(args, &prepared)
}
