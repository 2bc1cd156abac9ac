//! What CRI finds on a host: containerd's configuration, two networks with their plugins, the
//! kubelet's cgroup.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::{CGROUPS, HANDLER, LARGE, PAUSE, delegate};
use crate::ctr::Call;
use crate::manifest::deploy;
use crate::{KATA_LIKE, TestResult, Version, runtime};

/// A bridge between the pods of one handler, and its plugins' configuration.
struct Network {
    handler: &'static str,
    bridge: &'static str,
    subnets: [&'static str; 2],
    mtu: u32,
    /// Whether ports of the host lead to pods.
    host_ports: bool,
}

const NETWORKS: [Network; 2] = [
    Network {
        handler: HANDLER,
        bridge: "tests0",
        subnets: ["10.88.0.0/24", "fd88::/64"],
        mtu: 1400,
        host_ports: false,
    },
    Network {
        handler: LARGE,
        bridge: "tests1",
        subnets: ["10.89.0.0/24", "fd89::/64"],
        mtu: 9000,
        host_ports: true,
    },
];

/// Exists if the host has SELinux. CRI gives labels only if the configuration says so.
const SELINUX: &str = "/sys/fs/selinux/enforce";

/// The plugin for an interface on a bridge. Before it removes a pod's interface it notes what the
/// pod still has.
const WATCHED: &str = "watched-bridge";

/// The folder of these notes below containerd's directory, a file for each pod.
const SEEN: &str = "seen-at-del";

/// What a pod still had when CNI was told to remove its interface.
pub(super) fn seen_at_del(here: &Path, pod: &str) -> PathBuf {
    here.join(SEEN).join(pod)
}

/// Makes what CRI expects of a host below `here`, and returns its part of containerd's
/// configuration.
pub(crate) fn set_up(version: Version, here: &Path, tools: &Path) -> TestResult<String> {
    fs::create_dir_all(CGROUPS)?;
    delegate(Path::new(CGROUPS))?;
    let plugins = plugins(here, tools)?;
    let selinux = Path::new(SELINUX).exists();
    let (runtimes, mut config) = match version {
        Version::V1_7 | Version::V1_7Cri => {
            let cri = r#"plugins."io.containerd.grpc.v1.cri""#;
            let config = format!(
                "[{cri}]\nenable_selinux = {selinux}\nsandbox_image = \"{PAUSE}\"\n[{cri}.cni]\nbin_dir = \"{}\"\nconf_dir = \"{}\"\n\
                 [{cri}.containerd]\ndefault_runtime_name = \"{HANDLER}\"\n",
                plugins.display(),
                conf(here, HANDLER).display(),
            );
            (format!("{cri}.containerd.runtimes"), config)
        }
        Version::V2_1 | Version::V2_1Cri => {
            let cri = r#"plugins."io.containerd.cri.v1.runtime""#;
            let config = format!(
                "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{PAUSE}\"\n\
                 [{cri}]\nenable_selinux = {selinux}\n[{cri}.cni]\nbin_dirs = [\"{}\"]\nconf_dir = \"{}\"\n",
                plugins.display(),
                conf(here, HANDLER).display(),
            );
            (format!("{cri}.containerd.runtimes"), config)
        }
    };
    for network in &NETWORKS {
        network.make(here)?;
    }
    config += &format!(
        "[{runtimes}.{LARGE}]\nruntime_type = \"{runtime}\"\nprivileged_without_host_devices = true\n\
         cni_conf_dir = \"{conf}\"\n",
        runtime = runtime(),
        conf = conf(here, LARGE).display(),
    );
    if version == Version::V1_7Cri {
        config += &of_deploy("kata-like-1.7.toml")?;
    }
    Ok(config)
}

/// The file of the handler, which containerd's configuration imports. For 1.7 it is a table in the
/// configuration.
pub(crate) fn imports(version: Version, here: &Path) -> TestResult<Vec<PathBuf>> {
    if version != Version::V2_1Cri {
        return Ok(Vec::new());
    }
    let file = here.join("kata-like.toml");
    fs::write(&file, of_deploy("kata-like.toml")?)?;
    Ok(vec![file])
}

/// A file of `deploy/containerd`, for the runtime under test.
fn of_deploy(name: &str) -> TestResult<String> {
    let text = fs::read_to_string(deploy().join("containerd").join(name))?;
    Ok(text.replace(KATA_LIKE, &runtime()))
}

fn conf(here: &Path, handler: &str) -> PathBuf {
    here.join("net.d").join(handler)
}

/// Debian's plugins, and the one that watches.
fn plugins(here: &Path, tools: &Path) -> TestResult<PathBuf> {
    let (plugins, seen) = (here.join("cni"), here.join(SEEN));
    fs::create_dir_all(&plugins)?;
    fs::create_dir_all(&seen)?;
    let debians = tools.join("cni");
    for name in ["bridge", "host-local", "loopback", "portmap"] {
        symlink(debians.join(name), plugins.join(name))?;
    }
    let script = format!(
        r#"#!/bin/sh
seen={seen}/$CNI_CONTAINERID
if [ "$CNI_COMMAND" = DEL ] && [ -n "$CNI_NETNS" ] && [ ! -e "$seen" ]; then
    {{
        nsenter --net="$CNI_NETNS" ip -o link
        grep -l kata-like-vmm /proc/[0-9]*/comm
    }} >"$seen" 2>&1
fi
exec {bridge}
"#,
        seen = seen.display(),
        bridge = debians.join("bridge").display(),
    );
    let path = plugins.join(WATCHED);
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(plugins)
}

impl Network {
    fn make(&self, here: &Path) -> TestResult {
        let conf = conf(here, self.handler);
        fs::create_dir_all(&conf)?;
        fs::write(conf.join("tests.conflist"), self.conflist(here))?;
        // Otherwise the plugin would make it with the first pod, and leave it.
        if Path::new("/sys/class/net").join(self.bridge).exists() {
            return Ok(());
        }
        let mut add = Command::new("ip");
        add.args(["link", "add", self.bridge, "mtu", &self.mtu.to_string()]);
        add.args(["type", "bridge"]);
        Call::new(add).ok().map(drop)
    }

    /// The host is the pods' gateway; CRI adds the loopback by itself.
    fn conflist(&self, here: &Path) -> String {
        let ranges = self.subnets.map(|subnet| json!([{ "subnet": subnet }]));
        let mut plugins = vec![json!({
            "type": WATCHED,
            "bridge": self.bridge,
            "isGateway": true,
            "mtu": self.mtu,
            "ipam": {
                "type": "host-local",
                "dataDir": here.join("addresses"),
                "ranges": ranges,
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        })];
        if self.host_ports {
            plugins.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
        }
        json!({ "cniVersion": "1.0.0", "name": self.bridge, "plugins": plugins }).to_string()
    }
}
