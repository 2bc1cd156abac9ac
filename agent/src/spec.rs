//! What a container is made of: the guest's part of an OCI spec, and what the host says beside it,
//! checked.
//!
//! `convert.rs` makes a [`Creation`] of the host's request before anything of a container exists;
//! `pod.rs` completes it. The shim has refused what no container gets; the runner checks what it
//! applies. Facts: `agent.proto`, OCI runtime spec.

use std::collections::BTreeMap;

use kata_like_agent_protocol::agent::{self, bind::Source, join::Whose};
use kata_like_agent_protocol::is_name;
use kata_like_failure::{Failure, Step};
use oci_spec::runtime::{
    LinuxNamespaceType, Mount, PosixRlimitBuilder, PosixRlimitType, Process, Spec,
};
use serde_json::{Map, Value};

use crate::cgroup::Limits;
use crate::disks::Disk;
use crate::runner::{self, Bind};
use crate::stdio::Wanted;
use crate::storage::MemoryVolume;

/// The limit of open files where a spec names none: that of services under systemd. What a process
/// would inherit otherwise is the agent's own, which is large.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// The mode bits of a directory.
const MODE_BITS: u32 = 0o7777;

/// What a container is made of.
#[derive(Clone, Debug)]
pub struct Creation {
    /// For the runner.
    pub spec: Spec,
    /// For its cgroup.
    pub limits: Limits,
    /// The `linux.resources` that these come from.
    pub resources: Value,
    /// The namespaces that are another container's.
    pub joins: Vec<(LinuxNamespaceType, String)>,
    /// The namespaces that are the guest's own.
    pub guest_namespaces: Vec<LinuxNamespaceType>,
    /// Where its bind mounts are from, by their index in the spec.
    pub binds: BTreeMap<usize, Bind>,
    /// The volumes in memory among these.
    pub memory_volumes: Vec<MemoryVolume>,
    /// The volume that is its rootfs; none: the directory that the share of roots has for it.
    pub root_volume: Option<String>,
    /// The streams of its init.
    pub wanted: Wanted,
    /// It holds the pod's namespaces, and runs nothing.
    pub placeholder: bool,
    /// The host's disks that the spec names.
    pub disks: Vec<Disk>,
}

impl Creation {
    /// Parses the JSON of a spec. All that is said beside it is still to come.
    pub fn parse(json: &[u8]) -> Result<Self, Failure> {
        let mut spec: Spec = serde_json::from_slice(json)
            .map_err(|error| Failure::bad("spec", format!("not an OCI spec: {error}")))?;
        match spec.process_mut() {
            Some(process) => limit_open_files(process)?,
            None => return Err(Failure::bad("process", "missing")),
        }
        let mut limits = Limits::default();
        let mut kept = Value::Object(Map::new());
        let linux = spec.linux().as_ref();
        if let Some(resources) = linux.and_then(|linux| linux.resources().as_ref()) {
            limits = Limits::of(resources)?;
            kept = serde_json::to_value(resources).step(|| "keep the resources of the spec")?;
        }
        let listed = kinds(&spec);
        for (index, kind) in listed.iter().enumerate() {
            if listed.iter().take(index).any(|earlier| earlier == kind) {
                let field = format!("linux.namespaces[{kind}]");
                return Err(Failure::bad(field, "given twice"));
            }
        }
        Ok(Self {
            limits,
            resources: kept,
            joins: Vec::new(),
            guest_namespaces: Vec::new(),
            binds: BTreeMap::new(),
            memory_volumes: Vec::new(),
            root_volume: None,
            wanted: Wanted::default(),
            placeholder: false,
            disks: Vec::new(),
            spec,
        })
    }

    /// Takes what the host says of namespaces.
    pub fn join(&mut self, joins: Vec<agent::Join>) -> Result<(), Failure> {
        use LinuxNamespaceType::{Ipc, Network, Pid, Uts};

        let listed = kinds(&self.spec);
        for join in joins {
            let index = join.namespace;
            let bad = |why: &str| {
                let field = format!("joins of linux.namespaces[{index}]");
                Err(Failure::bad(field, why))
            };
            let Some(&kind) = listed.get(index as usize) else {
                return bad("the spec has no such entry");
            };
            let joined = self.joins.iter().any(|(earlier, _)| *earlier == kind);
            if joined || self.guest_namespaces.contains(&kind) {
                return bad("given twice");
            }
            match join.whose {
                Some(Whose::Guest(_)) if matches!(kind, Ipc | Network | Pid | Uts) => {
                    self.guest_namespaces.push(kind);
                }
                Some(Whose::Guest(_)) => return bad("of this type it is never the guest's own"),
                Some(Whose::Container(name)) if is_name(&name) => self.joins.push((kind, name)),
                Some(Whose::Container(name)) => return bad(&format!("not a name: {name:?}")),
                _ => return bad("whose it is is missing"),
            }
        }
        Ok(())
    }

    /// Takes what the host says of bind mounts, which must be all of them.
    pub fn bind(&mut self, binds: Vec<agent::Bind>) -> Result<(), Failure> {
        let mounts: Vec<&Mount> = self.spec.mounts().iter().flatten().collect();
        for bind in binds {
            let field = format!("binds of mounts[{}]", bind.mount);
            let index = bind.mount as usize;
            if !mounts
                .get(index)
                .is_some_and(|mount| kata_like_spec::is_bind(mount))
            {
                return Err(Failure::bad(field, "the spec has no such bind mount"));
            }
            let named = |name: String| match is_name(&name) {
                true => Ok(name),
                false => Err(Failure::bad(&field, format!("not a name: {name:?}"))),
            };
            let source = match bind.source {
                Some(Source::Volume(name)) => Bind::Volume(named(name)?),
                Some(Source::Memory(volume)) => {
                    let (size, mode) = (volume.size_bytes, volume.mode);
                    if mode & !MODE_BITS != 0 {
                        let why = format!("{mode:o} is no mode of a directory");
                        return Err(Failure::bad(field, why));
                    }
                    let name = named(volume.name)?;
                    let volume = MemoryVolume {
                        name: name.clone(),
                        size,
                        mode,
                    };
                    self.memory_volumes.push(volume);
                    Bind::Memory(name)
                }
                _ => return Err(Failure::bad(field, "its source is missing")),
            };
            if self.binds.insert(index, source).is_some() {
                return Err(Failure::bad(field, "given twice"));
            }
        }
        for (index, mount) in mounts.into_iter().enumerate() {
            if kata_like_spec::is_bind(mount) && !self.binds.contains_key(&index) {
                let field = format!("binds of mounts[{index}]");
                return Err(Failure::bad(field, "missing"));
            }
        }
        Ok(())
    }

    /// The volumes of the host that it mounts.
    pub fn volumes(&self) -> Vec<String> {
        let binds = self.binds.values();
        let names = binds.filter_map(|bind| match bind {
            Bind::Volume(name) => Some(name.clone()),
            Bind::Memory(_) => None,
        });
        names.collect()
    }

    /// Takes the mappings of the user namespace of `container`, which is joined. Those that this
    /// spec has must be the same.
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

/// The types of the namespaces that the spec lists.
fn kinds(spec: &Spec) -> Vec<LinuxNamespaceType> {
    let listed = spec.linux().as_ref();
    let listed = listed.and_then(|linux| linux.namespaces().as_deref());
    listed
        .unwrap_or_default()
        .iter()
        .map(|it| it.typ())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(mut change: impl FnMut(&mut Value)) -> Result<Creation, Failure> {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}},
            "mounts": [],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        change(&mut spec);
        Creation::parse(spec.to_string().as_bytes())
    }

    fn join(namespace: u32, whose: Whose) -> agent::Join {
        agent::Join {
            namespace,
            whose: Some(whose),
            ..Default::default()
        }
    }

    fn of(container: &str) -> Whose {
        Whose::Container(container.into())
    }

    fn guest() -> Whose {
        Whose::Guest(agent::Empty::new())
    }

    fn joined(kinds: &[&str], joins: Vec<agent::Join>) -> Result<Creation, Failure> {
        let list = kinds.iter().map(|kind| json!({"type": kind}));
        let list: Value = list.collect();
        let mut creation = parse(|spec| spec["linux"]["namespaces"] = list.clone())?;
        creation.join(joins).map(|()| creation)
    }

    #[test]
    fn namespaces_are_new_the_guests_or_another_containers() {
        let joins = vec![join(3, of("pause")), join(1, guest()), join(2, of("pause"))];
        let creation = joined(&["mount", "uts", "ipc", "network"], joins).unwrap();
        let pause = |kind| (kind, "pause".to_owned());
        let joins = [LinuxNamespaceType::Network, LinuxNamespaceType::Ipc].map(pause);
        assert_eq!(creation.joins, joins);
        assert_eq!(creation.guest_namespaces, [LinuxNamespaceType::Uts]);
    }

    #[test]
    fn whoever_joins_users_has_their_mappings() {
        let users = |from: u32| {
            parse(|spec| {
                spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "user"}]);
                if from > 0 {
                    let mapping = json!([{"containerID": 0, "hostID": from, "size": 10}]);
                    spec["linux"]["uidMappings"] = mapping.clone();
                    spec["linux"]["gidMappings"] = mapping;
                }
            })
            .unwrap()
        };
        let owner = users(1000);
        for from in [0, 1000] {
            let mut joining = users(from);
            joining.take_users("a", &owner).unwrap();
            let linux = joining.spec.linux().as_ref().unwrap();
            let mappings = linux.uid_mappings().as_deref().unwrap();
            assert_eq!(mappings[0].host_id(), 1000);
        }
        let mut other = users(2000);
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
    fn a_join_that_is_none_is_refused_by_its_entry() {
        let kinds = ["mount", "ipc", "user", "cgroup"];
        let missing = agent::Join {
            namespace: 1,
            ..Default::default()
        };
        for (joins, text) in [
            (vec![join(1, of("../x"))], "[1]: not a name: \"../x\""),
            (vec![join(1, of("a")), join(1, guest())], "[1]: given twice"),
            (vec![join(2, guest())], "[2]: of this type it is never"),
            (vec![join(3, guest())], "[3]: of this type it is never"),
            (vec![join(4, of("a"))], "[4]: the spec has no such entry"),
            (vec![missing], "[1]: whose it is is missing"),
        ] {
            let error = joined(&kinds, joins).unwrap_err().to_string();
            let text = format!("joins of linux.namespaces{text}");
            assert!(error.starts_with(&text), "{error}");
        }
        let error = joined(&["uts", "uts"], Vec::new()).unwrap_err().to_string();
        assert_eq!(error, "linux.namespaces[uts]: given twice");
    }

    fn bind(mount: u32, source: Source) -> agent::Bind {
        agent::Bind {
            mount,
            source: Some(source),
            ..Default::default()
        }
    }

    fn volume(name: &str) -> Source {
        Source::Volume(name.into())
    }

    fn memory(name: &str, mode: u32) -> Source {
        Source::Memory(agent::MemoryVolume {
            name: name.into(),
            mode,
            ..Default::default()
        })
    }

    fn bound(binds: Vec<agent::Bind>) -> Result<Creation, Failure> {
        let mut creation = parse(|spec| {
            spec["mounts"] = json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "none", "options": ["rbind"]},
                {"destination": "/dev/shm", "type": "bind"},
            ]);
        })?;
        creation.bind(binds).map(|()| creation)
    }

    #[test]
    fn each_bind_mount_is_from_a_volume() {
        let binds = vec![bind(2, memory("shm", 0o1777)), bind(1, volume("c1-0"))];
        let creation = bound(binds).unwrap();
        assert_eq!(creation.volumes(), ["c1-0"]);
        assert_eq!(creation.binds[&2], Bind::Memory("shm".into()));
        assert_eq!(creation.memory_volumes[0].mode, 0o1777);
    }

    #[test]
    fn a_bind_that_is_none_is_refused_by_its_mount() {
        let shm = || bind(2, memory("shm", 0o1777));
        let unsaid = agent::Bind {
            mount: 1,
            ..Default::default()
        };
        for (binds, text) in [
            (vec![shm()], "[1]: missing"),
            (
                vec![bind(0, volume("a"))],
                "[0]: the spec has no such bind mount",
            ),
            (
                vec![bind(3, volume("a"))],
                "[3]: the spec has no such bind mount",
            ),
            (vec![shm(), shm()], "[2]: given twice"),
            (vec![unsaid], "[1]: its source is missing"),
            (vec![bind(1, volume(""))], "[1]: not a name: \"\""),
            (vec![bind(1, volume("../x"))], "[1]: not a name: \"../x\""),
            (vec![bind(1, volume("a/b"))], "[1]: not a name: \"a/b\""),
            (
                vec![bind(1, memory("..", 0o755))],
                "[1]: not a name: \"..\"",
            ),
            (
                vec![bind(1, memory("a", 0o10_000))],
                "[1]: 10000 is no mode",
            ),
        ] {
            let error = bound(binds).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("binds of mounts{text}")),
                "{error}"
            );
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
        let limits = |spec: Creation| {
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
            assert!(Creation::parse(json.as_bytes()).is_err(), "{json}");
        }
        let error = parse(|spec| drop(spec.as_object_mut().unwrap().remove("process")));
        assert_eq!(error.unwrap_err().to_string(), "process: missing");
        // Deeper than any spec: an error, not a stack that overflows.
        let deep = "[".repeat(1 << 20);
        assert!(Creation::parse(deep.as_bytes()).is_err());
    }
}
