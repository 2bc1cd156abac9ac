//! The rules of the house, as a test: headers, lengths, who imports whom, words.
//!
//! `docs/architecture.md` says why the imports are as they are. Nothing here needs a host.

use std::fs;
use std::path::{Path, PathBuf};

use kata_like_tests::{TestResult, failure};

/// No source file is longer.
const MOST_LINES: usize = 500;

/// A crate's folder, and those of ours that it may name in its `[dependencies]`.
const CRATES: [(&str, &[&str]); 20] = [
    ("failure", &[]),
    ("linux", &[]),
    ("spec", &["kata-like-failure"]),
    (
        "shim-v2",
        &[
            "kata-like-config",
            "kata-like-boot",
            "kata-like-agent-protocol",
            "kata-like-failure",
            "kata-like-linux",
            "kata-like-netlink",
            "kata-like-relay",
            "kata-like-spec",
        ],
    ),
    ("shim-v2/config", &[]),
    (
        "vmm",
        &[
            "kata-like-boot",
            "kata-like-failure",
            "kata-like-jail",
            "kata-like-linux",
        ],
    ),
    ("vmm/boot", &["kata-like-failure"]),
    ("vmm/jail", &["kata-like-linux"]),
    (
        "vmm/fsd",
        &[
            "kata-like-boot",
            "kata-like-failure",
            "kata-like-jail",
            "kata-like-linux",
        ],
    ),
    (
        "agent",
        &[
            "kata-like-agent-protocol",
            "kata-like-failure",
            "kata-like-linux",
            "kata-like-netlink",
            "kata-like-relay",
            "kata-like-spec",
        ],
    ),
    ("agent/netlink", &["kata-like-linux"]),
    ("agent/protocol", &["kata-like-failure"]),
    ("agent/relay", &["kata-like-linux"]),
    ("guest-image", &[]),
    (
        "tools/cli",
        &[
            "kata-like-config",
            "kata-like-boot",
            "kata-like-agent-protocol",
            "kata-like-failure",
            "kata-like-linux",
        ],
    ),
    ("tools/test-host", &["kata-like-limits"]),
    ("tests", &["kata-like-cri-client", "kata-like-limits"]),
    ("tests/cri", &[]),
    ("tests/limits", &[]),
    ("tests/probe", &[]),
];

/// A file or folder, and the modules of its own crate that it must not name: no import points up,
/// a device knows neither transport nor KVM, the transport knows no device.
const NEVER: [(&str, &[&str]); 15] = [
    ("shim-v2/src/vm.rs", &["containerd", "pod"]),
    ("shim-v2/src/pod.rs", &["containerd"]),
    ("shim-v2/src/vm", &["containerd", "pod", "network"]),
    ("shim-v2/src/network", &["containerd", "pod"]),
    ("shim-v2/src/share.rs", &["containerd", "pod"]),
    ("shim-v2/src/spec.rs", &["containerd", "pod"]),
    ("shim-v2/src/cgroup.rs", &["containerd", "pod"]),
    ("vmm/src/virtio", &["kvm", "machine", "vcpu", "bus"]),
    (
        "vmm/src/virtio/mmio.rs",
        &["virtio::rng", "virtio::fs", "virtio::vsock", "virtio::net"],
    ),
    (
        "vmm/src/virtio/queue.rs",
        &["virtio::mmio", "virtio::rng", "virtio::fs", "virtio::vsock"],
    ),
    (
        "vmm/src/virtio/chain.rs",
        &["virtio::mmio", "virtio::rng", "virtio::fs", "virtio::vsock"],
    ),
    ("vmm/src/virtio/rng.rs", &["virtio::mmio"]),
    ("vmm/src/virtio/fs.rs", &["virtio::mmio"]),
    ("vmm/src/virtio/vsock", &["virtio::mmio"]),
    (
        "agent/src/runner",
        &["service", "container", "dial", "sandbox"],
    ),
];

fn repository() -> TestResult<PathBuf> {
    Ok(Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?)
}

/// All files of ours with this extension, by their path from the top.
fn files(extension: &str) -> TestResult<Vec<(String, String)>> {
    let top = repository()?;
    let mut open = vec![top.clone()];
    let mut found = Vec::new();
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory)?.flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if entry.file_type()?.is_dir() {
                if name != "target" && name != ".git" {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|found| found == extension) {
                let text = fs::read_to_string(&path)?;
                found.push((path.strip_prefix(&top)?.display().to_string(), text));
            }
        }
    }
    if found.is_empty() {
        return Err(failure(format!(
            "no .{extension} file below {}",
            top.display()
        )));
    }
    Ok(found)
}

fn none(what: &str, wrong: Vec<String>) -> TestResult {
    if wrong.is_empty() {
        return Ok(());
    }
    Err(failure(format!("{what}:\n  {}", wrong.join("\n  "))))
}

#[test]
fn each_file_says_what_it_is() -> TestResult {
    let wrong = files("rs")?
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//! "))
        .map(|(path, _)| path)
        .collect();
    none("without a `//!` header", wrong)
}

#[test]
fn no_file_is_too_long() -> TestResult {
    let wrong = files("rs")?
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .map(|(path, lines)| format!("{path}: {lines} lines"))
        .collect();
    none("too long", wrong)
}

#[test]
fn crates_import_those_they_may() -> TestResult {
    let top = repository()?;
    let mut wrong = Vec::new();
    for (path, _) in files("toml")?
        .into_iter()
        .filter(|(path, _)| path.ends_with("/Cargo.toml"))
    {
        let folder = path.trim_end_matches("/Cargo.toml");
        if !CRATES.iter().any(|(known, _)| *known == folder) {
            wrong.push(format!("{folder} is not in the table of this test"));
        }
    }
    for (folder, allowed) in CRATES {
        let manifest = fs::read_to_string(top.join(folder).join("Cargo.toml"))?;
        let own = manifest.split("[dependencies]").nth(1).unwrap_or_default();
        let own = own.split("\n[").next().unwrap_or_default();
        for line in own.lines().filter(|line| line.starts_with("kata-like-")) {
            let name = line.split([' ', '=', '.']).next().unwrap_or_default();
            if !allowed.contains(&name) {
                wrong.push(format!("{folder} imports {name}"));
            }
        }
    }
    none("imports", wrong)
}

#[test]
fn no_import_points_up() -> TestResult {
    let sources = files("rs")?;
    let mut wrong = Vec::new();
    for (place, never) in NEVER {
        for (path, text) in &sources {
            let inside = path == place || path.starts_with(&format!("{place}/"));
            if !inside || path.ends_with("tests.rs") {
                continue;
            }
            let product = text.split("#[cfg(test)]").next().unwrap_or_default();
            for line in product
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
            {
                for module in never {
                    let used = ["crate::", "super::super::"].iter().any(|prefix| {
                        line.match_indices(&format!("{prefix}{module}"))
                            .any(|(at, text)| {
                                let next = line[at + text.len()..].chars().next();
                                !next.is_some_and(|next| next.is_alphanumeric() || next == '_')
                            })
                    });
                    if used {
                        wrong.push(format!("{path}: {}", line.trim()));
                    }
                }
            }
        }
    }
    none("imports that point up", wrong)
}

/// Names that say nothing, notes to oneself, and hosts that packages come from.
#[test]
fn words() -> TestResult {
    let mut wrong = Vec::new();
    for (path, text) in files("rs")?
        .iter()
        .chain(&files("md")?)
        .chain(&files("toml")?)
    {
        let name = Path::new(path)
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if ["common", "util", "utils", "core", "helpers", "misc"].contains(&name.as_str()) {
            wrong.push(format!("{path}: a name that says nothing"));
        }
        if path.ends_with("house.rs") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let note = ["TODO", "FIXME", "XXX", "HACK", "unimplemented!(", "todo!("];
            let host = [
                "://deb.debian",
                "://pypi",
                "://crates.io",
                "://static.crates",
                "://registry.",
            ];
            if note.iter().chain(&host).any(|word| line.contains(word)) {
                wrong.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    none("words", wrong)
}
