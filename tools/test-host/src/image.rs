//! OCI images with busybox in them, each as one archive for `ctr image import`.
//!
//! Where tests run there may be no registry, so the images are made from the busybox of the
//! machine's own suite. Layout: OCI image-spec 1.1, "image-layout.md". An annotation in the index
//! is the name under which containerd imports it.

use std::fs;
use std::path::Path;
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::archive::{Entry, Tar};
use crate::error::HostError;
use crate::packages::output;

/// An image: its name, and the command of a container that has none of its own.
pub struct Image {
    /// The name under which containerd imports it.
    pub name: &'static str,
    pub command: &'static str,
}

/// The image that the tests run.
pub const BUSYBOX: Image = Image {
    name: "localhost/busybox:latest",
    command: r#"["sh"]"#,
};

/// The image of a Kubernetes pod's first container, which only waits.
pub const PAUSE: Image = Image {
    name: "localhost/pause:latest",
    command: r#"["sleep","2147483647"]"#,
};

const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
daemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
app:x:1000:1000:app:/home/app:/bin/sh\n\
nobody:x:65534:65534:nobody:/:/bin/false\n";

const GROUP: &[u8] = b"root:x:0:\ndaemon:x:1:\nextra:x:900:app\napp:x:1000:\nnogroup:x:65534:\n";

/// Writes an image's archive to `target`.
pub fn write(image: &Image, busybox: &Path, target: &Path) -> Result<(), HostError> {
    let applets = output(
        "list busybox's commands",
        Command::new(busybox).arg("--list"),
    )?;
    let program = fs::read(busybox).map_err(HostError::file("read", busybox))?;
    let archive = layer(&program, &applets)
        .and_then(|layer| layout(image, &layer))
        .map_err(HostError::system("put an image together"))?;
    fs::write(target, archive).map_err(HostError::file("write", target))
}

fn layer(busybox: &[u8], applets: &str) -> std::io::Result<Vec<u8>> {
    let mut tar = Tar::new(Vec::new());
    for name in [
        "bin", "dev", "etc", "home", "proc", "root", "run", "sys", "usr", "var",
    ] {
        tar.add(name, 0o755, Entry::Directory)?;
    }
    tar.add("tmp", 0o1777, Entry::Directory)?;
    tar.add("bin/busybox", 0o755, Entry::File(busybox))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        tar.add(&format!("bin/{applet}"), 0o777, Entry::Link("busybox"))?;
    }
    tar.add("etc/passwd", 0o644, Entry::File(PASSWD))?;
    tar.add("etc/group", 0o644, Entry::File(GROUP))?;
    tar.add("etc/not-executable", 0o644, Entry::File(b"not a program\n"))?;
    tar.finish()
}

fn layout(image: &Image, layer: &[u8]) -> std::io::Result<Vec<u8>> {
    let Image { name, command } = image;
    let layer_digest = digest(layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"Cmd":{command}}},"rootfs":{{"type":"layers","diff_ids":["sha256:{layer_digest}"]}}}}"#
    );
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:{layer_digest}","size":{}}}]}}"#,
        digest(config.as_bytes()),
        config.len(),
        layer.len()
    );
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{}","size":{},"annotations":{{"io.containerd.image.name":"{name}","org.opencontainers.image.ref.name":"latest"}}}}]}}"#,
        digest(manifest.as_bytes()),
        manifest.len()
    );
    let mut tar = Tar::new(Vec::new());
    tar.add(
        "oci-layout",
        0o644,
        Entry::File(br#"{"imageLayoutVersion":"1.0.0"}"#),
    )?;
    tar.add("index.json", 0o644, Entry::File(index.as_bytes()))?;
    tar.add("blobs", 0o755, Entry::Directory)?;
    tar.add("blobs/sha256", 0o755, Entry::Directory)?;
    for blob in [config.as_bytes(), manifest.as_bytes(), layer] {
        tar.add(
            &format!("blobs/sha256/{}", digest(blob)),
            0o644,
            Entry::File(blob),
        )?;
    }
    tar.finish()
}

/// sha256 in lower-case hex.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
