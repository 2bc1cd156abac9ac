//! The annotations by which containerd's CRI plugin marks the containers of a pod.

use serde_json::{Value, json};

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// The memory limit of the whole pod, in bytes.
pub const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// The CPU quota of the whole pod, in microseconds of a period.
pub const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// The period of that quota, in microseconds.
pub const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// What a container is to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The first container, which holds what the others share.
    Sandbox,
    /// One of the others.
    Container,
}

/// The annotations of a container of the pod whose first container has the id `sandbox`.
pub fn cri_annotations(role: Role, sandbox: &str) -> [(&'static str, String); 2] {
    let kind = match role {
        Role::Sandbox => "sandbox",
        Role::Container => "container",
    };
    [
        (CONTAINER_TYPE, kind.to_owned()),
        (SANDBOX_ID, sandbox.to_owned()),
    ]
}

/// Adds these annotations to a spec.
pub fn annotate(spec: &mut Value, role: Role, sandbox: &str) {
    if spec["annotations"].is_null() {
        spec["annotations"] = json!({});
    }
    for (name, value) in cri_annotations(role, sandbox) {
        spec["annotations"][name] = value.into();
    }
}

/// The options by which `ctr run` adds these annotations.
pub fn annotation_options(role: Role, sandbox: &str) -> Vec<String> {
    cri_annotations(role, sandbox)
        .into_iter()
        .flat_map(|(name, value)| ["--annotation".to_owned(), format!("{name}={value}")])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_keeps_its_other_annotations() {
        let mut spec = json!({"annotations": {"mine": "yes"}});
        annotate(&mut spec, Role::Container, "pod");
        let wanted = json!({"mine": "yes", CONTAINER_TYPE: "container", SANDBOX_ID: "pod"});
        assert_eq!(spec["annotations"], wanted);
    }

    #[test]
    fn ctr_gets_an_option_for_each() {
        let options = annotation_options(Role::Sandbox, "pod");
        let [first, second] = [
            "io.kubernetes.cri.container-type=sandbox",
            "io.kubernetes.cri.sandbox-id=pod",
        ];
        assert_eq!(options, ["--annotation", first, "--annotation", second]);
    }
}
