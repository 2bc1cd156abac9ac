//! The guest part of an OCI spec: parsed, checked as far as the agent itself uses it.
//!
//! Called by `pod.rs`, before anything of a container exists. The rest of the spec is the
//! runner's, which refuses in its turn what it can't apply. Facts: `agent.proto`, OCI runtime spec.

use kata_like_agent_protocol::is_name;
use kata_like_failure::{Failure, Step};
use oci_spec::runtime::{
    LinuxNamespace, LinuxNamespaceType, PosixRlimitBuilder, PosixRlimitType, Process, Spec,
};
use serde_json::{Map, Value};

use crate::cgroup::Limits;
use crate::runner;

/// The limit of open files where a spec names none: that of services under systemd. What a process
/// would inherit otherwise is the agent's own, which is large.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// How a mount names a volume, and a namespace another container or the guest itself.
const VOLUME: &str = "volume:";
const MEMORY: &str = "memory:";
const CONTAINER: &str = "container:";
const POD: &str = "pod";

/// A container's spec, and what the agent needs to know of it.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// For the runner.
    pub spec: Spec,
    /// For its cgroup.
    pub limits: Limits,
    /// The `linux.resources` that these come from.
    pub resources: Value,
    /// The namespaces that are another container's.
    pub joins: Vec<(LinuxNamespaceType, String)>,
    /// The volume that is its rootfs, if it is one.
    pub root_volume: Option<String>,
    /// The volumes it mounts, and those of them that are in memory.
    pub volumes: Vec<String>,
    pub memory_volumes: Vec<String>,
}

impl GuestSpec {
    /// Parses the JSON of a `CreateContainerRequest`.
    pub fn parse(json: &[u8]) -> Result<Self, Failure> {
        let mut spec: Spec = serde_json::from_slice(json)
            .map_err(|error| Failure::bad("spec", format!("not an OCI spec: {error}")))?;
        match spec.process_mut() {
            Some(process) => limit_open_files(process)?,
            None => return Err(Failure::bad("process", "missing")),
        }
        let mut joins = Vec::new();
        let mut limits = Limits::default();
        let mut kept = Value::Object(Map::new());
        if let Some(linux) = spec.linux_mut() {
            if let Some(resources) = linux.resources() {
                limits = Limits::of(resources)?;
                kept = serde_json::to_value(resources).step(|| "keep the resources of the spec")?;
            }
            joins = joined(linux.namespaces().as_deref().unwrap_or_default())?;
        }
        Ok(Self {
            limits,
            resources: kept,
            joins,
            root_volume: None,
            volumes: volumes(&spec, VOLUME)?,
            memory_volumes: volumes(&spec, MEMORY)?,
            spec,
        })
    }

    /// Takes the mappings of the user namespace of `container`, which is joined. Those that this spec has must
    /// be the same.
    pub fn take_users(&mut self, container: &str, of: &Self) -> Result<(), Failure> {
        if !runner::has_users(&of.spec) {
            let why = format!("container {container} has no user namespace of its own");
            return Err(Failure::bad("linux.namespaces[user].path", why));
        }
        let (Some(linux), Some(other)) = (self.spec.linux_mut(), of.spec.linux()) else {
            return Ok(());
        };
        for (field, own, other) in [
            ("uidMappings", linux.uid_mappings(), other.uid_mappings()),
            ("gidMappings", linux.gid_mappings(), other.gid_mappings()),
        ] {
            if own.as_ref().is_some_and(|own| !own.is_empty()) && own != other {
                let why = format!(
                    "not those of the user namespace that is joined, container {container}'s"
                );
                return Err(Failure::bad(format!("linux.{field}"), why));
            }
        }
        linux.set_uid_mappings(other.uid_mappings().clone());
        linux.set_gid_mappings(other.gid_mappings().clone());
        Ok(())
    }
}

/// Parses the JSON of an `ExecRequest`.
pub fn parse_process(json: &[u8]) -> Result<Process, Failure> {
    let mut process: Process = serde_json::from_slice(json)
        .map_err(|error| Failure::bad("process", format!("not an OCI process: {error}")))?;
    limit_open_files(&mut process)?;
    Ok(process)
}

fn limit_open_files(process: &mut Process) -> Result<(), Failure> {
    let mut limits = process.rlimits().clone().unwrap_or_default();
    if !limits
        .iter()
        .any(|limit| limit.typ() == PosixRlimitType::RlimitNofile)
    {
        let (soft, hard) = OPEN_FILES;
        let limit = PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(soft)
            .hard(hard)
            .build()
            .step(|| "limit the open files of the process")?;
        limits.push(limit);
        process.set_rlimits(Some(limits));
    }
    Ok(())
}

/// Which namespaces are other containers'.
fn joined(namespaces: &[LinuxNamespace]) -> Result<Vec<(LinuxNamespaceType, String)>, Failure> {
    use LinuxNamespaceType::{Ipc, Network, Pid, Uts};

    let mut seen = Vec::new();
    let mut joins = Vec::new();
    for namespace in namespaces {
        let kind = namespace.typ();
        let field = format!("linux.namespaces[{kind}]");
        if seen.contains(&kind) {
            return Err(Failure::bad(field, "given twice"));
        }
        seen.push(kind);
        let Some(path) = namespace.path() else {
            continue;
        };
        let path = path.to_str().unwrap_or_default();
        let field = format!("{field}.path");
        match path.strip_prefix(CONTAINER) {
            Some(name) if is_name(name) => joins.push((kind, name.into())),
            None if path == POD && matches!(kind, Ipc | Network | Pid | Uts) => {}
            _ => {
                let why = format!("{path:?} is neither {POD:?} nor \"{CONTAINER}NAME\"");
                return Err(Failure::bad(field, why));
            }
        }
    }
    Ok(joins)
}

/// The names behind `prefix` among the sources of mounts.
fn volumes(spec: &Spec, prefix: &str) -> Result<Vec<String>, Failure> {
    let mounts = spec.mounts().iter().flatten();
    let sources = mounts.filter_map(|mount| mount.source().as_deref()?.to_str());
    sources
        .filter_map(|source| source.strip_prefix(prefix))
        .map(|name| match is_name(name) {
            true => Ok(name.to_owned()),
            false => Err(Failure::bad(
                "mounts[].source",
                format!("no volume's name: {name:?}"),
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(mut change: impl FnMut(&mut Value)) -> Result<GuestSpec, Failure> {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}},
            "mounts": [],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        change(&mut spec);
        GuestSpec::parse(spec.to_string().as_bytes())
    }

    fn namespaces(value: Value) -> Result<GuestSpec, Failure> {
        parse(|spec| spec["linux"]["namespaces"] = value.clone())
    }

    #[test]
    fn namespaces_are_new_the_pods_or_another_containers() {
        let spec = namespaces(json!([
            {"type": "mount"},
            {"type": "uts", "path": "pod"},
            {"type": "ipc", "path": "container:pause"},
            {"type": "network", "path": "container:pause"},
        ]))
        .unwrap();
        let pause = |kind| (kind, "pause".to_owned());
        let joins = [LinuxNamespaceType::Ipc, LinuxNamespaceType::Network].map(pause);
        assert_eq!(spec.joins, joins);
    }

    #[test]
    fn whoever_joins_users_has_their_mappings() {
        let users = |path: Value, from: u32| {
            parse(|spec| {
                spec["linux"]["namespaces"] =
                    json!([{"type": "mount"}, {"type": "user", "path": path}]);
                if from > 0 {
                    let mapping = json!([{"containerID": 0, "hostID": from, "size": 10}]);
                    spec["linux"]["uidMappings"] = mapping.clone();
                    spec["linux"]["gidMappings"] = mapping;
                }
            })
            .unwrap()
        };
        let owner = users(Value::Null, 1000);
        for from in [0, 1000] {
            let mut joining = users(json!("container:a"), from);
            joining.take_users("a", &owner).unwrap();
            let linux = joining.spec.linux().as_ref().unwrap();
            let mappings = linux.uid_mappings().as_deref().unwrap();
            assert_eq!(mappings[0].host_id(), 1000);
        }
        let mut other = users(json!("container:a"), 2000);
        let error = other.take_users("a", &owner).unwrap_err().to_string();
        assert!(error.starts_with("linux.uidMappings: "), "{error}");
        let none = parse(|_| {}).unwrap();
        let error = other.take_users("b", &none).unwrap_err().to_string();
        assert!(
            error.starts_with("linux.namespaces[user].path: container b "),
            "{error}"
        );
    }

    #[test]
    fn a_namespace_that_is_none_of_these_is_refused_by_name() {
        for (namespace, text) in [
            (
                json!([{"type": "ipc", "path": "/proc/1/ns/ipc"}]),
                "linux.namespaces[ipc].path: ",
            ),
            (
                json!([{"type": "ipc", "path": "container:../x"}]),
                "linux.namespaces[ipc].path: ",
            ),
            (
                json!([{"type": "uts"}, {"type": "uts"}]),
                "linux.namespaces[uts]: given twice",
            ),
            (
                json!([{"type": "user", "path": "pod"}]),
                "linux.namespaces[user].path: \"pod\"",
            ),
            (
                json!([{"type": "cgroup", "path": "pod"}]),
                "linux.namespaces[cgroup].path: \"pod\"",
            ),
        ] {
            let error = namespaces(namespace).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }

    #[test]
    fn volumes_are_names_never_paths() {
        let mounts = |source: &str| {
            let mounts = json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": source},
            ]);
            parse(|spec| spec["mounts"] = mounts.clone())
        };
        assert_eq!(mounts("volume:c1-0").unwrap().volumes, ["c1-0"]);
        let memory = mounts("memory:shm").unwrap();
        assert_eq!(memory.memory_volumes, ["shm"]);
        assert_eq!(memory.volumes, [""; 0]);
        for source in [
            "volume:",
            "volume:../x",
            "volume:a/b",
            "memory:..",
            "memory:",
        ] {
            let error = mounts(source).unwrap_err().to_string();
            assert!(error.starts_with("mounts[].source: "), "{error}");
        }
    }

    #[test]
    fn a_resource_that_is_not_supported_is_refused_before_anything_is_made() {
        let error = parse(|spec| spec["linux"]["resources"] = json!({"rdma": {"a": {}}}));
        assert!(
            error
                .unwrap_err()
                .to_string()
                .starts_with("linux.resources.rdma ")
        );
    }

    #[test]
    fn the_agents_own_limit_of_open_files_is_not_inherited() {
        let limits = |spec: GuestSpec| {
            let process = spec.spec.process().clone().unwrap();
            let limits = process.rlimits().clone().unwrap();
            let limit = |limit: &oci_spec::runtime::PosixRlimit| (limit.typ(), limit.soft());
            limits.iter().map(limit).collect::<Vec<_>>()
        };
        let nofile = PosixRlimitType::RlimitNofile;
        assert_eq!(limits(parse(|_| {}).unwrap()), [(nofile, 1024)]);
        let own = json!([{"type": "RLIMIT_NOFILE", "hard": 7, "soft": 7}]);
        let spec = parse(|spec| spec["process"]["rlimits"] = own.clone());
        assert_eq!(limits(spec.unwrap()), [(nofile, 7)]);
        let exec = parse_process(br#"{"cwd": "/", "user": {"uid": 0, "gid": 0}}"#).unwrap();
        assert_eq!(exec.rlimits().as_ref().map(Vec::len), Some(1));
    }

    #[test]
    fn what_is_no_spec_is_refused() {
        for json in ["", "{", "[]", "{\"ociVersion\": 1}", "\0"] {
            assert!(GuestSpec::parse(json.as_bytes()).is_err(), "{json}");
        }
        let error = parse(|spec| drop(spec.as_object_mut().unwrap().remove("process")));
        assert_eq!(error.unwrap_err().to_string(), "process: missing");
        // Deeper than any spec: an error, not a stack that overflows.
        let deep = "[".repeat(1 << 20);
        assert!(GuestSpec::parse(deep.as_bytes()).is_err());
    }
}
