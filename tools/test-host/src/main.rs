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
mod arguments;
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

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::Args;
use crate::error::{HOST_FAILED, HostError};

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
