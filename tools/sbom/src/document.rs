//! The two documents, as values.
//!
//! CycloneDX 1.6 (ECMA-424): `components` has each installed file, each crate and library once;
//! `dependencies` says which of them are in which file.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::crates::Crate;
use crate::input::SbomError;

/// What is installed: the path below the prefix, and the package that it is built from.
pub const FILES: [(&str, Option<&str>); 8] = [
    (
        "bin/containerd-shim-kata-like-v2",
        Some("containerd-shim-kata-like-v2"),
    ),
    ("bin/kata-like", Some("kata-like")),
    ("libexec/kata-like/kata-like-fsd", Some("kata-like-fsd")),
    ("libexec/kata-like/kata-like-proxy", Some("kata-like-proxy")),
    ("libexec/kata-like/kata-like-vmm", Some("kata-like-vmm")),
    ("share/kata-like/initrd.img", Some("kata-like-agent")),
    ("share/kata-like/printk.json", None),
    (KERNEL, None),
];
/// The kernel among them.
pub const KERNEL: &str = "share/kata-like/vmlinux";

/// An installed file.
pub struct Part {
    /// Below the prefix.
    pub path: &'static str,
    /// SHA-256 in hexadecimal digits.
    pub hash: String,
    /// What is linked into it, or into the program that it holds.
    pub crates: Vec<Crate>,
}

/// How the programs were made.
pub struct Made {
    /// SHA-256 of the agent.
    pub agent: String,
    /// SHA-256 of Cargo.lock.
    pub lock: String,
    pub compiler: String,
    pub profile: String,
    /// Linked into the agent: Debian's packages and their versions.
    pub libraries: Vec<(String, String)>,
}

impl Made {
    /// The provenance of the image.
    pub fn image(&self, parts: &[Part]) -> Value {
        let image = parts.iter().find(|part| part.path.ends_with("initrd.img"));
        let libraries = self
            .libraries
            .iter()
            .map(|(name, version)| json!({ "package": name, "version": version }));
        json!({
            "sha256": image.map(|image| &image.hash),
            "init": { "package": "kata-like-agent", "version": VERSION, "sha256": self.agent },
            "cargo_lock_sha256": self.lock,
            "compiler": self.compiler,
            "profile": self.profile,
            "static_libraries": libraries.collect::<Vec<_>>(),
        })
    }
}

/// All crates of the workspace have the same.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The bill of materials. `kernel` is the provenance of the kernel.
pub fn bill(parts: &[Part], kernel: &Value, made: &Made, date: Option<&str>) -> Value {
    let mut components: Vec<Value> = parts.iter().map(file).collect();
    let crates: BTreeSet<&Crate> = parts.iter().flat_map(|part| &part.crates).collect();
    components.extend(crates.into_iter().map(library));
    components.extend(made.libraries.iter().map(|(name, version)| {
        let reference = debian(name, version);
        json!({
            "type": "library", "bom-ref": reference, "name": name, "version": version, "purl": reference,
        })
    }));
    let source = &kernel["source"];
    let kernel_source = match (source["package"].as_str(), source["version"].as_str()) {
        (Some(name), Some(version)) => debian(name, version),
        _ => "kernel-source".to_owned(),
    };
    let mut kernel_component = json!({
        "type": "operating-system", "bom-ref": kernel_source, "name": "linux",
        "version": source["version"].as_str().unwrap_or("of another source tree"),
        "licenses": [{ "expression": "GPL-2.0-only WITH Linux-syscall-note" }],
    });
    if let Some(hash) = source["sha256"].as_str() {
        kernel_component["purl"] = json!(kernel_source);
        kernel_component["hashes"] = hashes(hash);
    }
    components.push(kernel_component);

    let mut dependencies: Vec<Value> = parts
        .iter()
        .map(|part| {
            let mut on: Vec<String> = part.crates.iter().map(purl).collect();
            if part.path.ends_with("initrd.img") {
                on.extend(
                    made.libraries
                        .iter()
                        .map(|(name, version)| debian(name, version)),
                );
            }
            if part.path == KERNEL {
                on.push(kernel_source.clone());
            }
            json!({ "ref": part.path, "dependsOn": on })
        })
        .collect();
    let files: Vec<&str> = FILES.iter().map(|(path, _)| *path).collect();
    dependencies.push(json!({ "ref": "kata-like", "dependsOn": files }));

    let mut metadata = json!({
        "component": {
            "type": "application", "bom-ref": "kata-like", "name": "kata-like", "version": VERSION,
            "licenses": [{ "expression": "Apache-2.0" }],
        },
        "properties": [
            { "name": "kata-like:compiler", "value": made.compiler },
            { "name": "kata-like:profile", "value": made.profile },
        ],
    });
    if let Some(date) = date {
        metadata["timestamp"] = json!(date);
    }
    json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": metadata,
        "components": components,
        "dependencies": dependencies,
    })
}

fn file(part: &Part) -> Value {
    json!({
        "type": "file", "bom-ref": part.path, "name": part.path, "version": VERSION,
        "hashes": hashes(&part.hash),
    })
}

fn library(of: &Crate) -> Value {
    json!({
        "type": "library", "bom-ref": purl(of), "name": of.name, "version": of.version,
        "purl": purl(of), "hashes": hashes(&of.checksum),
        "licenses": [{ "expression": of.licence }],
    })
}

fn hashes(sha256: &str) -> Value {
    json!([{ "alg": "SHA-256", "content": sha256 }])
}

fn purl(of: &Crate) -> String {
    // A plus, as in a build's number, would be read as a space.
    format!("pkg:cargo/{}@{}", of.name, of.version.replace('+', "%2B"))
}

fn debian(name: &str, version: &str) -> String {
    let version = version.replace('+', "%2B").replace(':', "%3A");
    format!("pkg:deb/debian/{name}@{version}")
}

/// SHA-256 in hexadecimal digits.
pub fn hash(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The date of a reproducible build, which is in seconds since 1970, as ISO 8601 writes it.
pub fn date(epoch: Option<String>) -> Result<Option<String>, SbomError> {
    let Some(epoch) = epoch else { return Ok(None) };
    let seconds = epoch.parse::<u64>().ok();
    // The last second of 9999.
    let Some(seconds) = seconds.filter(|seconds| *seconds <= 253_402_300_799) else {
        return Err(SbomError::Date(epoch));
    };
    let (mut day, second) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let length = |year| 365 + u64::from(leap(year));
    while day >= length(year) {
        day -= length(year);
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    Ok(Some(format!(
        "{year}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z",
        day + 1
    )))
}
