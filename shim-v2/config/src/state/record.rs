//! What a pod consists of, as `shim.json` keeps it for the one who cleans up after a dead shim.
//!
//! Written by the shim as soon as it has made what it names. What is made in between ends by itself
//! if the shim is killed there: a child when its socket or pipe closes, a cgroup by the mark that
//! it carries (`cgroup` in the shim).

use std::io::{self, Read, Write};
use std::path::PathBuf;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::{NetworkId, Process, StateError, StateFolder, name};

/// The version of the state folder's format: its names and its record.
pub const RECORD_VERSION: u32 = 1;

/// No record is longer.
const MAX_RECORD: u64 = 1024 * 1024;

/// The processes and cgroups of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`RECORD_VERSION`] of the writer.
    pub version: u32,
    /// A namespace of containerd's, not of Linux.
    pub namespace: String,
    /// The sandbox: containerd's id of the task that the shim was started for.
    pub sandbox: String,
    /// Written by the shim as it begins to serve.
    pub shim: Option<Process>,
    /// The VMM, and the user id that it runs under.
    pub vmm: Option<Process>,
    /// The user id of the VMM.
    pub uid: Option<u32>,
    /// The fs server.
    pub fsd: Option<Process>,
    /// The proxy.
    #[serde(default)]
    pub proxy: Option<Process>,
    /// A stand-in for each task.
    pub stand_ins: Vec<StandIn>,
    /// The pod's network namespace, from just before it is taken (`NetworkLock`).
    #[serde(default)]
    pub network_id: Option<NetworkId>,
    /// What was changed in a network namespace that outlives the pod.
    #[serde(default)]
    pub network: Option<Network>,
    /// The cgroups that were made for the pod, a child before its parent: the order in which they
    /// can be removed.
    pub cgroups: Vec<PathBuf>,
}

/// A network namespace that is joined to the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Where it is on the host.
    pub path: PathBuf,
    /// The numbers of its interfaces that have got a queueing discipline for it.
    pub qdiscs: Vec<u32>,
}

/// The host process that stands in for a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StandIn {
    /// containerd's id of the task.
    pub task: String,
    /// The process that stands for the task on the host.
    pub process: Process,
}

impl Record {
    /// The record of a pod that has nothing yet.
    pub fn new(namespace: &str, sandbox: &str) -> Self {
        Self {
            version: RECORD_VERSION,
            namespace: namespace.into(),
            sandbox: sandbox.into(),
            shim: None,
            vmm: None,
            uid: None,
            fsd: None,
            proxy: None,
            stand_ins: Vec::new(),
            network_id: None,
            network: None,
            cgroups: Vec::new(),
        }
    }

    /// Reads a record; the error is what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        /// The one field that every version has.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let broken = |error: serde_json::Error| format!("not a record of a pod: {error}");
        let Versioned { version } = serde_json::from_slice(bytes).map_err(broken)?;
        if version != RECORD_VERSION {
            return Err(format!(
                "its format is version {version}, this program's {RECORD_VERSION}: the pod was started by another version of kata-like"
            ));
        }
        serde_json::from_slice(bytes).map_err(broken)
    }
}

impl StateFolder {
    /// Writes the record. Whoever reads sees the old one or the new one, whole.
    pub fn write_record(&self, record: &Record) -> Result<(), StateError> {
        const NEW: &str = "shim.json.new";
        let path = self.path.join(NEW);
        let bytes = serde_json::to_vec_pretty(record).map_err(|error| StateError::Record {
            path: path.clone(),
            why: error.to_string(),
        })?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        self.open_file(NEW, flags, "make")?
            .write_all(&bytes)
            .map_err(|source| StateError::io("write", &path, source))?;
        rustix::fs::renameat(&self.folder, NEW, &self.folder, name::RECORD)
            .map_err(|errno| StateError::io("rename", &path, errno))
    }

    /// Reads the record back; `None` if none was written yet.
    pub fn read_record(&self) -> Result<Option<Record>, StateError> {
        let path = self.path.join(name::RECORD);
        let file = match self.open_file(name::RECORD, OFlags::RDONLY, "open") {
            Ok(file) => file,
            Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(MAX_RECORD)
            .read_to_end(&mut bytes)
            .map_err(|source| StateError::io("read", &path, source))?;
        Record::parse(&bytes)
            .map(Some)
            .map_err(|why| StateError::Record { path, why })
    }
}
