//! The test image as a directory on the host, for tests with a spec of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::ctr::Call;
use crate::ctr_container::CtrContainer;
use crate::host::{Host, NAMESPACE};
use crate::{IMAGE, TestResult, runtime};

/// The mounted image, unmounted with the value.
pub struct Rootfs<'host> {
    host: &'host Host,
    path: PathBuf,
}

impl<'host> Rootfs<'host> {
    /// Mounts it writable.
    pub fn mount(host: &'host Host) -> TestResult<Self> {
        let path = PathBuf::from(format!("/run/{}", host.name("rootfs")));
        fs::create_dir(&path)?;
        let target = path.display().to_string();
        host.ctr(["images", "mount", "--rw", IMAGE, &target]).ok()?;
        Ok(Self { host, path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// containerd's default spec with this root, for this command.
    pub fn spec(&self, command: &[&str]) -> TestResult<Value> {
        let mut spec: Value = serde_json::from_str(&self.host.ctr(["oci", "spec"]).ok()?.text())?;
        spec["process"]["args"] = command.into();
        spec["process"]["env"] = json!(["PATH=/bin"]);
        spec["process"]["cwd"] = "/".into();
        spec["root"] = json!({"path": self.path});
        Ok(spec)
    }

    /// A pod in the background with this spec.
    pub fn start(&self, id: &str, spec: &Value) -> TestResult<CtrContainer<'host>> {
        // First, so that a failed start is cleaned up, too.
        let pod = CtrContainer::new(self.host, id.to_owned());
        self.run(&["-d"], id, spec)?.ok()?;
        Ok(pod)
    }

    /// `ctr run` of a spec, with further options; the container has this id.
    pub fn run(&self, how: &[&str], id: &str, spec: &Value) -> TestResult<Call> {
        let path = self.path.with_extension("json");
        let mut spec = spec.clone();
        spec["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        fs::write(&path, spec.to_string())?;
        let (path, runtime) = (path.display().to_string(), runtime());
        let mut arguments = vec!["run", "--runtime", &runtime, "--config", &path];
        arguments.extend(how);
        arguments.push(id);
        Ok(self.host.ctr(arguments))
    }
}

impl Drop for Rootfs<'_> {
    fn drop(&mut self) {
        let target = self.path.display().to_string();
        let _ = self
            .host
            .ctr(["images", "unmount", "--rm", &target])
            .output();
        let _ = Command::new("umount").arg("-l").arg(&self.path).output();
        let _ = fs::remove_dir(&self.path);
        let _ = fs::remove_file(self.path.with_extension("json"));
    }
}

/// Gives a spec's namespace of this kind a path, if it has none.
pub fn join_namespace(spec: &mut Value, kind: &str, path: &str) {
    for namespace in spec["linux"]["namespaces"]
        .as_array_mut()
        .into_iter()
        .flatten()
    {
        if namespace["type"] == kind && namespace["path"].is_null() {
            namespace["path"] = path.into();
        }
    }
}
