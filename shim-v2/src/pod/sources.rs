//! What lies at the source of each bind mount: memory of the host, a file system of its kernel, or
//! files.
//!
//! Called by `bring_up` and `host_side` between the two steps of `spec`.

use kata_like_agent_protocol::agent::MemoryVolume;
use kata_like_failure::Failure;

use crate::file_systems;
use crate::share::volumes;
use crate::spec::{Bind, Source};
use crate::vm::memory::{self, HostMemory};

/// Looks up the sources of `binds`, in their order. `name` gives each memory of the host its name
/// in the pod.
pub(super) fn look_up(
    binds: &[Bind],
    mut name: impl FnMut(HostMemory) -> MemoryVolume,
) -> Result<Vec<Source>, Failure> {
    let look = |bind: &Bind| {
        let volume = &bind.volume;
        if bind.shared_memory {
            let found = memory::look(&volume.source);
            let found = found.map_err(|error| error.during(volume.field.clone()))?;
            if let Some(found) = found {
                return Ok(Source::Memory(name(found)));
            }
        }
        let found = file_systems::of_path(&volume.source).map_err(|cause| {
            let step = format!("{}: open source {}", volume.field, volume.source.display());
            Failure::failed(step, cause)
        })?;
        match found {
            Some(found) => Ok(Source::Kernel(found)),
            None => volumes::name(volume).map(Source::Volume),
        }
    };
    binds.iter().map(look).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::spec;

    fn found(destination: &str, source: &str) -> Result<Vec<Source>, Failure> {
        let spec = serde_json::json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
            "mounts": [{"destination": destination, "source": source, "options": ["bind"]}],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
                                     {"type": "mount"}, {"type": "network"}]},
        });
        let spec = serde_json::from_value(spec).unwrap();
        let halves = spec::split(spec, Path::new("/bundle"), &spec::Owners::default()).unwrap();
        let mut names = memory::MemoryNames::default();
        look_up(&halves.binds, |found| names.volume(found))
    }

    #[test]
    fn a_source_is_files_or_the_kernel_s() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        let files = found("/a", path).unwrap();
        let [Source::Volume(name)] = files.as_slice() else {
            panic!("{files:?}");
        };
        assert!(kata_like_agent_protocol::is_name(name), "{name}");
        let status = found("/a", "/proc/self/status").unwrap();
        assert!(
            matches!(status.as_slice(), [Source::Kernel(_)]),
            "{status:?}"
        );
        let line = found("/x", "/proc/none").unwrap_err().one_line();
        let wanted = "mounts[0] (/x): open source /proc/none: No such";
        assert!(line.starts_with(wanted), "{line}");
        let line = found("/dev/shm", "/no/where").unwrap_err().one_line();
        let wanted = "mounts[0] (/dev/shm): look at source /no/where: No such";
        assert!(line.starts_with(wanted), "{line}");
    }
}
