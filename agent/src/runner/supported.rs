//! What the spec must have, before any step, and what of it has no effect.
//!
//! Called by `init`, `exec` and `placeholder` first of all. The shim has refused every field that
//! no container gets (the crate `kata-like-spec`). The labels of AppArmor and SELinux are accepted
//! although the guest's kernel has neither: containerd sends them by default on hosts that have
//! one. A note in the log says that nothing enforces them.

use kata_like_failure::Failure;
use oci_spec::runtime::{Process, Spec};

use super::error::Result;
use super::namespaces;

/// Refuses a container without what it needs. Returns what has no effect, for the log.
pub(super) fn check_container(spec: &Spec) -> Result<Vec<String>> {
    if spec.linux().is_none() {
        return Err(Failure::bad("linux", "is missing"));
    }
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
    Ok(notes)
}

/// The same for a process.
pub(super) fn check_process(field: &str, process: &Process) -> Result<Vec<String>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::error::refused;

    fn spec(json: &str) -> Spec {
        let json = json.replace(r#""cwd""#, r#""user": {"uid": 0, "gid": 0}, "cwd""#);
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn a_process_that_can_t_run_is_refused_by_its_field() {
        for (json, field) in [
            (r#""process": {"cwd": "/", "args": []}"#, "process.args"),
            (r#""process": {"cwd": "x", "args": ["a"]}"#, "process.cwd"),
        ] {
            let spec = spec(&format!(
                r#"{{"ociVersion": "1.2.0", "linux": {{}}, {json}}}"#
            ));
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
