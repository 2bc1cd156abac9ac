//! What a fuzzer may throw at the shim's readers of what users write: each function takes arbitrary
//! bytes and must return. The crate `kata-like-fuzz` runs them.

use std::collections::HashMap;
use std::path::Path;

use kata_like_agent_protocol::agent;
use oci_spec::runtime::{Process, Spec};
use serde_json::from_slice;

use crate::spec::{MemorySize, Owners, Source, guest_process, split};
use crate::uri;

/// A container's `config.json`, split. What goes to the guest can be read there, and names no
/// profile that is loaded on the host.
pub fn spec(data: &[u8]) {
    let Ok(spec) = from_slice::<Spec>(data) else {
        return;
    };
    let owners = Owners {
        tasks: HashMap::from([(42, "sandbox".to_owned())]),
        ..Owners::default()
    };
    let Ok(halves) = split(spec, Path::new("/bundle"), &owners) else {
        return;
    };
    let sources = (0..halves.binds.len()).map(|number| match number % 2 {
        0 => Source::Volume(format!("volume-{number}")),
        _ => Source::Memory(agent::MemoryVolume::new()),
    });
    let sources = sources.collect();
    let Ok(split) = halves.with(sources) else {
        return;
    };
    let guest: Spec = from_slice(&split.guest.spec).expect("the guest's part is a spec");
    let process = guest.process().as_ref().expect("it has a process");
    assert!(process.apparmor_profile().is_none() && process.selinux_label().is_none());
    assert!(
        split
            .host
            .volumes
            .iter()
            .all(|volume| volume.source.is_absolute())
    );
    if let Ok(MemorySize { bytes, .. }) = split.host.size.memory(2 << 30, 1 << 40) {
        assert!(
            bytes >= 256 << 20 && bytes.is_multiple_of(2 << 20),
            "{bytes} bytes"
        );
    }
    let vcpus = split.host.size.vcpus(4, 8);
    assert!((1..=8).contains(&vcpus), "{vcpus} vCPUs");
}

/// The process of an exec.
pub fn process(data: &[u8]) {
    if let Ok(json) = guest_process(data) {
        let process: Process = from_slice(&json).expect("the guest's part is a process");
        assert!(process.apparmor_profile().is_none() && process.selinux_label().is_none());
    }
}

/// Where output goes.
pub fn uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    for scheme in ["binary", "file"] {
        if let Some((path, words)) = uri::parse(text, scheme) {
            assert!(path.is_absolute() && words.iter().all(|word| !word.is_empty()));
        }
    }
}
