//! Says what an installed tree is made of: a bill of materials (CycloneDX 1.6) and the provenance
//! of the guest's kernel and image.
//!
//! Called by `make install`, at its end. `crates` asks cargo what is linked into each program, and
//! `document` writes it down. The same tree gives the same bytes: there is no date in them unless
//! SOURCE_DATE_EPOCH gives one.

mod crates;
mod document;
mod input;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

use document::{FILES, Made, Part};
use input::{SbomError, read, told};

/// Debian's packages with the libraries that are linked into the agent, which is static.
const STATIC: [&str; 2] = ["libc6-dev", "libseccomp-dev"];

/// Says what an installed tree is made of.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The installed tree.
    #[arg(long)]
    prefix: PathBuf,
    /// What the kernel's build says of itself.
    #[arg(long)]
    kernel: PathBuf,
    /// The program in the image.
    #[arg(long)]
    agent: PathBuf,
    /// The cargo profile of the programs.
    #[arg(long)]
    profile: String,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = error
                .source()
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            eprintln!("sbom: {error}{cause}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), SbomError> {
    let kernel = read(&arguments.kernel)?;
    let kernel: Value = serde_json::from_slice(&kernel).map_err(|source| SbomError::Json {
        path: arguments.kernel.clone(),
        source,
    })?;
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let lock = repository.join("Cargo.lock");
    let made = Made {
        agent: document::hash(&read(&arguments.agent)?),
        lock: document::hash(&read(&lock)?),
        compiler: told("rustc", &["--version"])?,
        profile: arguments.profile.clone(),
        libraries: libraries(),
    };
    let mut parts = Vec::new();
    for (path, package) in FILES {
        let crates = match package {
            Some(package) => crates::linked(&repository, package)?,
            None => Vec::new(),
        };
        parts.push(Part {
            path,
            hash: document::hash(&read(&arguments.prefix.join(path))?),
            crates,
        });
    }
    let share = arguments.prefix.join("share/kata-like");
    let date = document::date(std::env::var("SOURCE_DATE_EPOCH").ok())?;
    write(
        &share.join("provenance.json"),
        &json!({ "kernel": kernel, "image": made.image(&parts) }),
    )?;
    write(
        &share.join("sbom.json"),
        &document::bill(&parts, &kernel, &made, date.as_deref()),
    )
}

/// The libraries in the agent with their versions, where Debian's packages tell them.
fn libraries() -> Vec<(String, String)> {
    let version = |name: &str| {
        let format = ["-W", "-f", "${Version}", name];
        told("dpkg-query", &format).ok().filter(|it| !it.is_empty())
    };
    let known = |name: &&str| version(name).map(|version| ((*name).to_owned(), version));
    STATIC.iter().filter_map(known).collect()
}

/// Whoever reads the file sees the old one or the new one, whole.
fn write(path: &Path, document: &Value) -> Result<(), SbomError> {
    let failed = |source| SbomError::Write {
        path: path.to_owned(),
        source,
    };
    let new = path.with_extension("json.new");
    fs::write(&new, format!("{document:#}\n")).map_err(failed)?;
    fs::rename(&new, path).map_err(failed)
}

#[cfg(test)]
mod tests;
