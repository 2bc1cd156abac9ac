//! Builds the guest's initrd: an uncompressed cpio whose `/init` is the agent, with only what a
//! boot needs.
//!
//! Called by `make image`. The same agent gives the same bytes. The archive has what the kernel
//! needs before the agent has mounted anything: the mount points, and `/dev/null` for the agent's
//! standard streams. The kernel has no console for them, and a Rust program that starts without
//! standard streams opens this file or aborts.

mod cpio;

use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use cpio::Entry;
use sha2::{Digest, Sha256};

/// What is shipped is no larger. Each MiB of the initrd costs a guest two MiB at its peak, and some
/// 500 page faults.
const LIMIT: usize = 4 << 20;

/// Builds the guest's initrd.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The agent: a static x86-64 program.
    #[arg(long)]
    agent: PathBuf,
    /// The initrd to write.
    #[arg(long)]
    output: PathBuf,
    /// How many bytes the initrd may have. An agent that was not built for its size needs more.
    #[arg(long, default_value_t = LIMIT)]
    limit: usize,
}

#[derive(Debug, thiserror::Error)]
enum ImageError {
    #[error("read the agent {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("use {} as the guest's /init: {why}", path.display())]
    Agent { path: PathBuf, why: &'static str },
    #[error(
        "build the initrd: {size} bytes are more than the {limit} allowed; the agent has grown"
    )]
    TooLarge { size: usize, limit: usize },
    #[error("write the initrd {}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let cause = error
                .source()
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            eprintln!("guest-image: {error}{cause}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<String, ImageError> {
    let path = &arguments.agent;
    let agent = fs::read(path).map_err(|source| ImageError::Read {
        path: path.clone(),
        source,
    })?;
    check_agent(&agent).map_err(|why| ImageError::Agent {
        path: path.clone(),
        why,
    })?;
    let image = image(agent, arguments.limit)?;
    replace(&arguments.output, &image).map_err(|source| ImageError::Write {
        path: arguments.output.clone(),
        source,
    })?;
    let digest: String = Sha256::digest(&image)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(format!(
        "{digest}  {} ({} bytes)",
        arguments.output.display(),
        image.len()
    ))
}

/// The whole image in memory: it is small, and its size is known before anything is written.
fn image(agent: Vec<u8>, limit: usize) -> Result<Vec<u8>, ImageError> {
    let directory = |mode| Entry::Directory { mode };
    let entries = [
        ("dev", directory(0o755)),
        (
            "dev/null",
            Entry::Device {
                mode: 0o666,
                number: (1, 3),
            },
        ),
        (
            "init",
            Entry::File {
                mode: 0o755,
                content: agent,
            },
        ),
        ("proc", directory(0o555)),
        ("run", directory(0o755)),
        ("sys", directory(0o555)),
    ];
    let mut image = Vec::new();
    if cpio::write(&mut image, &entries).is_err() || image.len() > limit {
        let size = image.len();
        return Err(ImageError::TooLarge { size, limit });
    }
    Ok(image)
}

/// Checks what the kernel needs of `/init`: x86-64, and no loader. A guest that can't run it only
/// panics.
fn check_agent(agent: &[u8]) -> Result<(), &'static str> {
    const ELF64_LITTLE: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
    const X86_64: u16 = 62;
    const PT_INTERP: u32 = 3;
    const CUT: &str = "it is cut off";
    let word = |at: usize| {
        agent
            .get(at..at + 2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
            .ok_or(CUT)
    };
    if !agent.starts_with(&ELF64_LITTLE) || word(18)? != X86_64 {
        return Err("not an x86-64 ELF program");
    }
    let headers = agent
        .get(32..40)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_le_bytes);
    let (size, count) = (usize::from(word(54)?), usize::from(word(56)?));
    let mut at = headers.and_then(|at| usize::try_from(at).ok()).ok_or(CUT)?;
    for _ in 0..count {
        let kind = at
            .checked_add(4)
            .and_then(|end| agent.get(at..end))
            .ok_or(CUT)?;
        if kind == PT_INTERP.to_le_bytes() {
            return Err("it is linked dynamically; the guest has no loader");
        }
        at = at.checked_add(size).ok_or(CUT)?;
    }
    Ok(())
}

/// Replaces the image by a rename: a VM that starts meanwhile reads the whole old one or the whole
/// new one.
fn replace(path: &Path, image: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    fs::write(&new, image)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header with one program header of the given type.
    fn program(kind: u32) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56];
        elf[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64..68].copy_from_slice(&kind.to_le_bytes());
        elf
    }

    #[test]
    fn the_same_agent_gives_the_same_image() {
        let directory = tempfile::tempdir().unwrap();
        let agent = directory.path().join("agent");
        fs::write(&agent, program(1)).unwrap();
        let build = |name: &str| {
            let output = directory.path().join(name);
            run(&Arguments {
                agent: agent.clone(),
                output: output.clone(),
                limit: LIMIT,
            })
            .unwrap();
            // Another time stamp on the input must not change the output.
            fs::File::open(&agent)
                .unwrap()
                .set_modified(std::time::UNIX_EPOCH)
                .unwrap();
            fs::read(output).unwrap()
        };
        assert_eq!(build("one"), build("two"));
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            3,
            "something was left behind"
        );
    }

    #[test]
    fn the_image_holds_what_a_boot_needs_and_no_more() {
        let found = cpio::reader::read(&image(b"agent".to_vec(), LIMIT).unwrap());
        let seen: Vec<_> = found
            .iter()
            .map(|entry| (entry.name.as_str(), entry.mode, entry.number))
            .collect();
        let expected = [
            ("dev", 0o040_755, (0, 0)),
            ("dev/null", 0o020_666, (1, 3)),
            ("init", 0o100_755, (0, 0)),
            ("proc", 0o040_555, (0, 0)),
            ("run", 0o040_755, (0, 0)),
            ("sys", 0o040_555, (0, 0)),
        ];
        assert_eq!(seen, expected);
        assert_eq!(found[2].content, b"agent");
    }

    #[test]
    fn an_agent_that_no_guest_can_run_is_refused() {
        let dynamic = program(3);
        let cut = &program(1)[..60];
        for (bytes, reason) in [
            (&dynamic[..], "linked dynamically"),
            (cut, "cut off"),
            (b"#!/bin/sh\n", "not an x86-64 ELF"),
            (b"", "not an x86-64 ELF"),
        ] {
            assert!(check_agent(bytes).unwrap_err().contains(reason), "{reason}");
        }
        assert!(check_agent(&program(1)).is_ok());
    }

    #[test]
    fn an_image_above_the_limit_is_refused() {
        assert!(matches!(
            image(vec![0; LIMIT], LIMIT),
            Err(ImageError::TooLarge { .. })
        ));
        assert!(image(vec![0; LIMIT], 2 * LIMIT).is_ok());
    }
}
