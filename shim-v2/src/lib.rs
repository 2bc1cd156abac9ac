//! containerd's shim for kata-like: the host side of one pod.
//!
//! Started by containerd as `start`, `delete` or `-info`, each of which answers and ends; by
//! `start`, without an action, as the process that serves the pod; and by that process as a task's
//! stand-in. What a person or containerd reads of a failure is one line on stderr, without a
//! newline, for containerd puts it into a sentence of its own.

mod bundle;
mod cgroup;
mod containerd;
mod file_systems;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod hooks;
mod log;
mod logger;
mod network;
mod pod;
mod selinux;
mod share;
mod spawn;
mod spec;
mod stand_in;
mod stdio;
mod steps;
mod uri;
mod vm;

use std::error::Error;
use std::process::ExitCode;

use containerd::{Flags, bootstrap, info, serve};

/// Does what the arguments of this process say.
pub fn main() -> ExitCode {
    // Before anything else: a stand-in must hold nothing, not even what a runtime leaves.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == stand_in::ARGUMENT)
    {
        stand_in::main();
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("{}", kata_like_failure::one_line(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let flags = Flags::parse(std::env::args_os().skip(1))?;
    if flags.version {
        println!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return Ok(info::info()?);
    }
    match flags.action.as_str() {
        "start" => Ok(bootstrap::start(&flags)?),
        "delete" => Ok(info::delete(&flags)?),
        "" => {
            log::start(flags.debug);
            Ok(serve::run(&flags)?)
        }
        other => Err(format!("run the shim: action {other:?} is neither start nor delete").into()),
    }
}
