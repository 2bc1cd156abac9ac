//! The manifests in `deploy/kubernetes/`, read as the kubelet reads them: pods in YAML become
//! requests to CRI.
//!
//! Only the fields of those files are known. Any other field, or a misspelt one, is an error.

#![allow(
    missing_docs,
    reason = "the fields are those of Kubernetes, whose documentation has them"
)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::cri::{self, HANDLER};
use crate::{TestResult, failure};

/// The period of CPU quotas, in microseconds.
const CPU_PERIOD: i64 = 100_000;

/// The folder of the files for a cluster and its nodes.
pub fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Reads a YAML file.
pub fn read<T: DeserializeOwned>(path: &Path) -> TestResult<T> {
    let text = fs::read_to_string(path)
        .map_err(|error| failure(format!("read {}: {error}", path.display())))?;
    serde_norway::from_str(&text)
        .map_err(|error| failure(format!("read {}: {error}", path.display())))
}

/// A RuntimeClass.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuntimeClass {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    pub handler: String,
    pub overhead: Overhead,
}

/// What a pod costs beside its containers.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Overhead {
    pub pod_fixed: BTreeMap<String, String>,
}

/// An object's name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    pub name: String,
}

/// A pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pod {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    pub spec: PodSpec,
}

/// What a pod consists of.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodSpec {
    pub runtime_class_name: String,
    #[serde(default = "always")]
    pub restart_policy: String,
    #[serde(default)]
    pub init_containers: Vec<Container>,
    pub containers: Vec<Container>,
    #[serde(default)]
    pub volumes: Vec<Volume>,
    #[serde(default)]
    pub security_context: PodSecurity,
}

fn always() -> String {
    "Always".into()
}

/// The settings for all containers of a pod.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodSecurity {
    pub fs_group: Option<u32>,
}

/// A container. Its image does not matter: the host has only one.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Container {
    pub name: String,
    pub image: String,
    pub command: Vec<String>,
    pub restart_policy: Option<String>,
    #[serde(default)]
    pub ports: Vec<Port>,
    pub readiness_probe: Option<Probe>,
    pub liveness_probe: Option<Probe>,
    #[serde(default)]
    pub resources: Resources,
    #[serde(default)]
    pub security_context: Security,
    #[serde(default)]
    pub volume_mounts: Vec<VolumeMount>,
}

/// A port that is served.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Port {
    pub container_port: u16,
}

/// The kubelet's question whether a container is well.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Probe {
    pub exec: Option<Exec>,
    pub http_get: Option<HttpGet>,
    #[serde(default)]
    pub timeout_seconds: u32,
}

/// A probe by a command in the container.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    pub command: Vec<String>,
}

/// A probe by a request to the pod's address.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpGet {
    pub path: String,
    pub port: u16,
}

/// The most that a container may take.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    #[serde(default)]
    pub limits: BTreeMap<String, String>,
}

/// What a container may do.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Security {
    pub run_as_user: Option<u32>,
    pub run_as_group: Option<u32>,
    pub run_as_non_root: bool,
    pub allow_privilege_escalation: Option<bool>,
    pub read_only_root_filesystem: bool,
    pub capabilities: Capabilities,
    pub seccomp_profile: Option<SeccompProfile>,
}

/// The capabilities that it loses.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capabilities {
    pub drop: Vec<String>,
}

/// The system calls that it may make.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeccompProfile {
    #[serde(rename = "type")]
    pub kind: String,
}

/// Where a container has a volume.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VolumeMount {
    pub name: String,
    pub mount_path: String,
}

/// A volume that is empty at first.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Volume {
    pub name: String,
    pub empty_dir: EmptyDir,
}

/// What the volume is made of.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EmptyDir {
    pub medium: Option<String>,
    pub size_limit: Option<String>,
}

/// A quantity of Kubernetes: bytes with a binary suffix, or processors.
pub fn quantity(text: &str) -> TestResult<i64> {
    let (digits, unit) = match text.strip_suffix("Mi") {
        Some(digits) => (digits, 1 << 20),
        None => (text, 1),
    };
    let number: i64 = digits
        .parse()
        .map_err(|error| failure(format!("quantity {text}: {error}")))?;
    Ok(number * unit)
}

impl RuntimeClass {
    /// The memory that a pod costs beside its containers, in bytes.
    pub fn memory(&self) -> TestResult<i64> {
        let memory = self.overhead.pod_fixed.get("memory");
        quantity(memory.ok_or_else(|| failure("no overhead of memory"))?)
    }
}

impl Pod {
    /// Reads one of the examples, which must be a pod for this handler.
    pub fn read(name: &str) -> TestResult<Self> {
        let path = deploy().join("kubernetes/pods").join(name);
        let pod: Self = read(&path)?;
        let head = (pod.api_version.as_str(), pod.kind.as_str());
        if head != ("v1", "Pod") || pod.spec.runtime_class_name != HANDLER {
            return Err(failure(format!("{}: {pod:?}", path.display())));
        }
        Ok(pod)
    }

    /// The pod's `PodSandboxConfig` for CRI, under this class.
    pub fn sandbox(&self, class: &RuntimeClass) -> TestResult<String> {
        let (mut memory, mut quota) = (0, 0);
        for container in &self.spec.containers {
            memory += container.limit("memory")?;
            quota += container.limit("cpu")? * CPU_PERIOD;
        }
        let (groups, overhead) = (self.groups(), class.memory()?);
        Ok(format!(
            "linux {{
                 resources {{
                     memory_limit_in_bytes: {memory} cpu_quota: {quota} cpu_period: {CPU_PERIOD}
                 }}
                 overhead {{ memory_limit_in_bytes: {overhead} }}
                 security_context {{ {groups} }}
             }}"
        ))
    }

    fn groups(&self) -> String {
        let group = self.spec.security_context.fs_group;
        group.map_or_else(String::new, |group| {
            format!("supplemental_groups: {group} ")
        })
    }

    /// The `ContainerConfig` for CRI of one of its containers.
    pub fn container(&self, container: &Container, volumes: &Volumes) -> TestResult<String> {
        let mut text = String::new();
        for mount in &container.volume_mounts {
            let host = volumes.path(&mount.name)?;
            write!(
                text,
                "mounts {{ host_path: {host:?} container_path: {:?} }} ",
                mount.mount_path
            )?;
        }
        let memory = container.limit("memory")?;
        let quota = container.limit("cpu")? * CPU_PERIOD;
        write!(
            text,
            "linux {{ resources {{ memory_limit_in_bytes: {memory} cpu_period: {CPU_PERIOD} cpu_quota: {quota} }} "
        )?;
        let security = &container.security_context;
        write!(text, "security_context {{ {}", self.groups())?;
        for (field, id) in [
            ("run_as_user", security.run_as_user),
            ("run_as_group", security.run_as_group),
        ] {
            if let Some(id) = id {
                write!(text, "{field} {{ value: {id} }} ")?;
            }
        }
        if security.run_as_non_root && security.run_as_user.is_none_or(|user| user == 0) {
            return Err(failure(format!("{}: runs as root", container.name)));
        }
        let no_new_privs = security.allow_privilege_escalation == Some(false);
        write!(
            text,
            "no_new_privs: {no_new_privs} readonly_rootfs: {} ",
            security.read_only_root_filesystem
        )?;
        for name in &security.capabilities.drop {
            write!(text, "capabilities {{ drop_capabilities: {name:?} }} ")?;
        }
        if let Some(profile) = &security.seccomp_profile {
            write!(text, "seccomp {{ profile_type: {} }} ", profile.kind)?;
        }
        text.push_str("} }");
        Ok(text)
    }
}

/// The kubelet's work for a pod's volumes: folders and tmpfs, with the group of the pod's files.
pub struct Volumes {
    paths: BTreeMap<String, PathBuf>,
    mounted: Vec<PathBuf>,
}

impl Volumes {
    /// Makes the volumes of a running pod.
    pub fn make(manifest: &Pod, pod: &cri::Pod<'_>) -> TestResult<Self> {
        let mut volumes = Self {
            paths: BTreeMap::new(),
            mounted: Vec::new(),
        };
        for volume in &manifest.spec.volumes {
            let path = pod.volume(&volume.name)?;
            let EmptyDir { medium, size_limit } = &volume.empty_dir;
            match (medium.as_deref(), size_limit) {
                (None, None) => {}
                (Some("Memory"), Some(limit)) => {
                    let size = CString::new(format!("size={}", quantity(limit)?))?;
                    mount(
                        "tmpfs",
                        &path,
                        "tmpfs",
                        MountFlags::empty(),
                        size.as_c_str(),
                    )?;
                    volumes.mounted.push(path.clone());
                }
                other => return Err(failure(format!("volume {}: {other:?}", volume.name))),
            }
            // Everybody may use it, and files made in it keep the group.
            chown(&path, None, manifest.spec.security_context.fs_group)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o2777))?;
            volumes.paths.insert(volume.name.clone(), path);
        }
        Ok(volumes)
    }

    fn path(&self, name: &str) -> TestResult<&Path> {
        let path = self.paths.get(name).map(PathBuf::as_path);
        path.ok_or_else(|| failure(format!("no volume {name}")))
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        for path in &self.mounted {
            let _ = unmount(path, UnmountFlags::DETACH);
        }
    }
}

impl Container {
    /// 0 if there is none.
    fn limit(&self, resource: &str) -> TestResult<i64> {
        let limit = self.resources.limits.get(resource);
        limit.map_or(Ok(0), |text| quantity(text))
    }

    /// Its command, as words.
    pub fn words(&self) -> Vec<&str> {
        self.command.iter().map(String::as_str).collect()
    }
}
