//! What the runner applies of the OCI spec. Anything else is refused by the field's name, before
//! any step.
//!
//! Called by `init`, `exec` and `placeholder` first of all. The limits in `linux.resources` belong
//! to `cgroup.rs`, which refuses its own. The labels of AppArmor and SELinux are accepted although
//! the guest's kernel has neither: containerd sends them by default on hosts that have one. A note
//! in the log says that nothing enforces them.

use kata_like_failure::Failure;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Process, Spec};

use super::error::{Result, unsupported};
use super::namespaces;

/// Refuses what is not supported of a container. Returns what has no effect, for the log.
pub(super) fn check_container(spec: &Spec) -> Result<Vec<String>> {
    for (field, present) in [
        ("windows", spec.windows().is_some()),
        ("solaris", spec.solaris().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ] {
        if present {
            return Err(unsupported(field, "this is a Linux container"));
        }
    }
    check_linux(spec)?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Failure::bad("process", "is missing"))?;
    let mut notes = check_process("process", process)?;
    let linux = spec.linux().as_ref();
    let maps = linux.is_some_and(|it| it.uid_mappings().is_some() || it.gid_mappings().is_some());
    if maps && !namespaces::has_users(spec) {
        // As under runc.
        notes.push(
            "linux.uidMappings and gidMappings have no effect without a user namespace".into(),
        );
    }
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    let joins = |it: &LinuxNamespace| it.typ() == LinuxNamespaceType::Mount && it.path().is_some();
    if namespaces.unwrap_or_default().iter().any(joins) {
        notes.push(
            "root, mounts, devices and hidden paths are those of the mount namespace that is joined".into(),
        );
    }
    Ok(notes)
}

/// The same for a process.
pub(super) fn check_process(field: &str, process: &Process) -> Result<Vec<String>> {
    for (name, present) in [
        ("execCPUAffinity", process.exec_cpu_affinity().is_some()),
        ("commandLine", process.command_line().is_some()),
    ] {
        if present {
            return Err(unsupported(format!("{field}.{name}"), "is not supported"));
        }
    }
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure::bad(format!("{field}.args"), "must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Failure::bad(
            format!("{field}.cwd"),
            format!("{:?} is not an absolute path", process.cwd()),
        ));
    }
    let mut notes = Vec::new();
    for (name, label) in [
        ("apparmorProfile", process.apparmor_profile()),
        ("selinuxLabel", process.selinux_label()),
    ] {
        match label.as_deref() {
            None | Some("" | "unconfined") => {}
            Some(label) => notes.push(format!(
                "{field}.{name} {label:?} has no effect: the guest's kernel has no such security module"
            )),
        }
    }
    Ok(notes)
}

fn check_linux(spec: &Spec) -> Result<()> {
    let Some(linux) = spec.linux() else {
        return Err(Failure::bad("linux", "is missing"));
    };
    let label = linux
        .mount_label()
        .as_deref()
        .is_some_and(|label| !label.is_empty());
    let devices = linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty());
    for (field, present, reason) in [
        (
            "linux.mountLabel",
            label,
            "the guest's kernel has no SELinux",
        ),
        (
            "linux.intelRdt",
            linux.intel_rdt().is_some(),
            "is not supported",
        ),
        (
            "linux.memoryPolicy",
            linux.memory_policy().is_some(),
            "is not supported",
        ),
        ("linux.netDevices", devices, "is not supported"),
    ] {
        if present {
            return Err(unsupported(field, reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::error::refused;

    fn spec(json: &str) -> Spec {
        let json = json.replace(r#""cwd""#, r#""user": {"uid": 0, "gid": 0}, "cwd""#);
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn unsupported_fields_are_refused_by_name() {
        for (json, field) in [
            (
                r#""process": {"cwd": "/", "args": ["a"], "execCPUAffinity": {"initial": "0"}}"#,
                "process.execCPUAffinity",
            ),
            (r#""process": {"cwd": "/", "args": []}"#, "process.args"),
            (r#""process": {"cwd": "x", "args": ["a"]}"#, "process.cwd"),
            (r#""linux": {"mountLabel": "a"}"#, "linux.mountLabel"),
        ] {
            let linux = if json.contains("linux") {
                ""
            } else {
                r#""linux": {},"#
            };
            let spec = spec(&format!(r#"{{"ociVersion": "1.2.0", {linux} {json}}}"#));
            let error = check_container(&spec).unwrap_err();
            assert_eq!(refused(&error), field);
        }
    }

    #[test]
    fn labels_of_absent_security_modules_are_noted() {
        let spec = spec(
            r#"{"ociVersion": "1.2.0", "linux": {},
                "process": {"cwd": "/", "args": ["a"], "apparmorProfile": "cri-containerd.apparmor.d"}}"#,
        );
        let notes = check_container(&spec).unwrap();
        assert_eq!(notes.len(), 1);
        assert!(notes[0].starts_with("process.apparmorProfile \"cri-containerd"));
    }
}
