//! `kata-like`: the tool that an administrator types at a host.
//!
//! `check` is the first command on a strange host: it boots the real guest and says in one line how
//! long that took, or why it failed. `jail` says what a pod's processes may do. Everything else is
//! containerd's business. A mistaken `--runtime kata-like` makes containerd call this program as it
//! calls runc; then the answer names the right flag.

mod boot;
mod exposure;
mod host;
mod jail;
mod runc;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// kata-like gives every pod its own small virtual machine. It is used through containerd:
/// ctr run --runtime io.containerd.kata-like.v2 IMAGE ID COMMAND
#[derive(Parser)]
#[command(name = "kata-like", version, verbatim_doc_comment)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Boots a guest as a pod would, and says how long it took or why it failed
    Check,
    /// Prints the system calls that VMM and fs server may make, each with its reason
    Jail,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(call) = runc::Call::recognise(&arguments) {
        eprintln!("{}", call.answer());
        return ExitCode::FAILURE;
    }
    let verb = match Arguments::parse().verb {
        Verb::Check => check(),
        Verb::Jail => Ok(vec![jail::page().trim_end().to_owned()]),
    };
    match verb {
        Ok(lines) => {
            println!("{}", lines.join("\n"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kata-like: {}", kata_like_failure::one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// What there is to say about a host that can run pods.
fn check() -> Result<Vec<String>, Box<dyn Error>> {
    let config = kata_like_config::Config::load()?;
    host::require()?;
    let booted = boot::boot(&config)?;
    let mut lines = vec![booted.to_string()];
    lines.extend(host::notes(&config, booted.figures.huge_pages));
    Ok(lines)
}
