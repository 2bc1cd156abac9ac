//! What is read and asked, and what can go wrong with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The step that failed; the source is the cause.
#[derive(Debug, thiserror::Error)]
pub enum SbomError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("read {}: it is no JSON", path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("take SOURCE_DATE_EPOCH={0}: it is no number of seconds from 1970 to 9999")]
    Date(String),
    #[error("ask {program} what is linked: {why}")]
    Asked { program: String, why: String },
    #[error("find crate {name} {version} in Cargo.lock: not there")]
    Unlocked { name: String, version: String },
}

/// What a program says, without its last newline.
pub fn told(program: &str, arguments: &[&str]) -> Result<String, SbomError> {
    let failed = |why: String| SbomError::Asked {
        program: program.to_owned(),
        why,
    };
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{}: {}", output.status, said.trim())));
    }
    let text = String::from_utf8(output.stdout).map_err(|error| failed(error.to_string()))?;
    Ok(text.trim_end().to_owned())
}

/// A file's bytes.
pub fn read(path: &Path) -> Result<Vec<u8>, SbomError> {
    fs::read(path).map_err(|source| SbomError::Read {
        path: path.to_owned(),
        source,
    })
}
