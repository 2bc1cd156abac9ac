//! Which crates are linked into a program, by what cargo itself says.

use std::collections::BTreeMap;
use std::env;
use std::path::Path;

use crate::input::{SbomError, read, told};

/// A crate of others that is linked into a program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Crate {
    pub name: String,
    pub version: String,
    /// An expression of SPDX's.
    pub licence: String,
    /// Of its package, by Cargo.lock: SHA-256 in hexadecimal digits.
    pub checksum: String,
}

/// The crates of others that are linked into a package's program: no macros, nothing of builds and
/// tests.
pub fn linked(repository: &Path, package: &str) -> Result<Vec<Crate>, SbomError> {
    let checksums = checksums(repository)?;
    let manifest = repository.join("Cargo.toml").display().to_string();
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let tree = [
        "tree",
        "--locked",
        "--quiet",
        "--manifest-path",
        &manifest,
        "--package",
        package,
        "--target",
        "x86_64-unknown-linux-gnu",
        "--edges",
        "normal,no-proc-macro",
        "--prefix",
        "none",
        "--no-dedupe",
        "--format",
        "{p}|{l}",
    ];
    let mut crates = Vec::new();
    for line in told(&cargo, &tree)?.lines() {
        let (described, licence) = line.split_once('|').unwrap_or((line, ""));
        let mut words = described.split(' ');
        let (Some(name), Some(version)) = (words.next(), words.next()) else {
            continue;
        };
        // Our own have a path behind them.
        if words.next().is_some() {
            continue;
        }
        let version = version.trim_start_matches('v');
        let checksum = checksums.get(&(name.to_owned(), version.to_owned()));
        crates.push(Crate {
            name: name.to_owned(),
            version: version.to_owned(),
            // As it was written before SPDX had a word for it.
            licence: licence.replace('/', " OR "),
            checksum: checksum.cloned().ok_or_else(|| SbomError::Unlocked {
                name: name.to_owned(),
                version: version.to_owned(),
            })?,
        });
    }
    crates.sort();
    crates.dedup();
    Ok(crates)
}

/// The checksum of each package of Cargo.lock that has one, by name and version.
pub fn checksums(repository: &Path) -> Result<BTreeMap<(String, String), String>, SbomError> {
    let path = repository.join("Cargo.lock");
    let text = String::from_utf8_lossy(&read(&path)?).into_owned();
    let field = |package: &str, key: &str| {
        let rest = package.lines().find_map(|line| line.strip_prefix(key))?;
        let value = rest.strip_prefix(" = \"")?.strip_suffix('"')?;
        Some(value.to_owned())
    };
    let packages = text.split("[[package]]").skip(1);
    let all = packages.filter_map(|package| {
        let name = field(package, "name")?;
        Some((
            (name, field(package, "version")?),
            field(package, "checksum")?,
        ))
    });
    Ok(all.collect())
}
