//! containerd's messages, of task v2 and v3 alike, to the shim's own types and back; errors to
//! codes.
//!
//! Called by `service`, and by `events` and `info` for the small types. Nothing below imports a
//! message of containerd's.

use std::path::PathBuf;
use std::time::SystemTime;

use containerd_shim_protos::api::{CreateTaskRequest, Mount, ProcessInfo, Status as TaskStatus};
use containerd_shim_protos::shim::oci::{Options as RuncOptions, ProcessDetails};
use containerd_shim_protos::ttrpc;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{CodedInputStream, EnumOrUnknown, Message, MessageField};

use crate::pod::create::CreateRequest;
use crate::pod::process::{Exit, Status};
use crate::pod::{ExecRegistration, TaskProcess};
use crate::share::RootfsMount;
use crate::stdio::StdioPaths;
use kata_like_failure::{Failure, Kind};

/// CRI's and ctr's options for runtimes other than runc.
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";
/// The options of runc's shim, which containerd sends to any.
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
/// An exec's process, as JSON.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// An update's limits, as JSON.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// A time, or "no time".
pub fn timestamp_or_none(time: Option<SystemTime>) -> MessageField<Timestamp> {
    timestamp(time.unwrap_or(Exit::of_nothing().at))
}

pub fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    let (seconds, nanos) = match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => (
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            since.subsec_nanos(),
        ),
        // The only time before 1970 is "no time", a whole second.
        Err(before) => (0i64.saturating_sub_unsigned(before.duration().as_secs()), 0),
    };
    MessageField::some(Timestamp {
        seconds,
        nanos: i32::try_from(nanos).unwrap_or_default(),
        ..Timestamp::default()
    })
}

/// A mount, in the messages of events.
pub fn event_mount(mount: RootfsMount) -> containerd_shim_protos::types::mount::Mount {
    containerd_shim_protos::types::mount::Mount {
        type_: mount.kind,
        source: mount.source,
        target: mount.target,
        options: mount.options,
        ..Default::default()
    }
}

fn mount(mount: Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

/// A container to be made.
pub fn create(request: CreateTaskRequest) -> Result<CreateRequest, Failure> {
    if !request.checkpoint.is_empty() {
        return Err(Failure::new(
            Kind::Unsupported,
            "create a container from a checkpoint: not supported".to_owned(),
        ));
    }
    Ok(CreateRequest {
        config_path: config_path(request.options.as_ref())?,
        id: request.id,
        bundle: request.bundle.into(),
        rootfs: request.rootfs.into_iter().map(mount).collect(),
        stdio: StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
    })
}

/// The configuration file that the runtime's options name, if any.
fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>, Failure> {
    let Some(options) = options else {
        return Ok(None);
    };
    let bad = |why: String| {
        Failure::new(
            Kind::BadRequest,
            format!("read the runtime's options: {why}"),
        )
    };
    // Some encoders put a host before the name.
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    match name {
        "" if options.value.is_empty() => Ok(None),
        RUNTIME_OPTIONS => {
            let options =
                RuntimeOptions::parse(&options.value).map_err(|error| bad(error.to_string()))?;
            if options.config_path.is_empty() && !options.config_body.is_empty() {
                return Err(bad(
                    "only ConfigPath is supported, the name of a configuration file".to_owned(),
                ));
            }
            Ok(Some(options.config_path)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from))
        }
        RUNC_OPTIONS => RuncOptions::parse_from_bytes(&options.value)
            .map(|_| None)
            .map_err(|error| bad(error.to_string())),
        _ => Err(bad(format!("type {:?} is not known", options.type_url))),
    }
}

/// `runtimeoptions.v1.Options`, which no crate has.
#[derive(Debug, Default, PartialEq, Eq)]
struct RuntimeOptions {
    type_url: String,
    config_path: String,
    config_body: Vec<u8>,
}

impl RuntimeOptions {
    fn parse(bytes: &[u8]) -> Result<Self, protobuf::Error> {
        /// Field number and wire type 2, as they stand before a text.
        const fn text(field: u32) -> u32 {
            field << 3 | 2
        }
        const TYPE_URL: u32 = text(1);
        const CONFIG_PATH: u32 = text(2);
        const CONFIG_BODY: u32 = text(3);

        let mut options = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                TYPE_URL => options.type_url = input.read_string()?,
                CONFIG_PATH => options.config_path = input.read_string()?,
                CONFIG_BODY => options.config_body = input.read_bytes()?,
                other => protobuf::rt::skip_field_for_tag(other, &mut input)?,
            }
        }
        Ok(options)
    }
}

/// An exec's process as JSON; the request's word on its terminal wins.
pub fn exec(
    request: containerd_shim_protos::api::ExecProcessRequest,
) -> Result<ExecRegistration, Failure> {
    let bad = |why: String| {
        Failure::new(
            Kind::BadRequest,
            format!("read the process of exec {:?}: {why}", request.exec_id),
        )
    };
    let spec = request.spec.as_ref().cloned().unwrap_or_default();
    if !spec.type_url.ends_with("/Process") {
        return Err(bad(format!(
            "its type is {:?}, not {PROCESS:?}",
            spec.type_url
        )));
    }
    let mut process: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&spec.value).map_err(|error| bad(error.to_string()))?;
    process.insert("terminal".to_owned(), request.terminal.into());
    let process = serde_json::to_vec(&process).map_err(|error| bad(error.to_string()))?;
    Ok(ExecRegistration {
        process,
        stdio: StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
        container: request.id,
        exec: request.exec_id,
    })
}

/// An update's limits as JSON. Its annotations mean nothing here, as with runc.
pub fn resources(
    request: containerd_shim_protos::api::UpdateTaskRequest,
) -> Result<Vec<u8>, Failure> {
    let resources = request.resources.into_option().unwrap_or_default();
    if !resources.type_url.ends_with("/LinuxResources") {
        return Err(Failure::new(
            Kind::BadRequest,
            format!(
                "read the limits for container {:?}: their type is {:?}, not {RESOURCES:?}",
                request.id, resources.type_url
            ),
        ));
    }
    Ok(resources.value)
}

/// A process's state.
pub fn status(status: Status) -> EnumOrUnknown<TaskStatus> {
    match status {
        Status::Created => TaskStatus::CREATED,
        Status::Running => TaskStatus::RUNNING,
        Status::Pausing => TaskStatus::PAUSING,
        Status::Paused => TaskStatus::PAUSED,
        Status::Stopped => TaskStatus::STOPPED,
    }
    .into()
}

/// A process in the answer to `Pids`; an exec's name goes with it.
pub fn process(process: TaskProcess) -> Result<ProcessInfo, Failure> {
    let mut info = ProcessInfo {
        pid: process.pid,
        ..ProcessInfo::default()
    };
    if !process.exec.is_empty() {
        let details = ProcessDetails {
            exec_id: process.exec,
            ..ProcessDetails::default()
        };
        info.info = MessageField::some(any("containerd.runc.v1.ProcessDetails", &details)?);
    }
    Ok(info)
}

pub(super) fn any(name: &str, message: &impl Message) -> Result<Any, Failure> {
    let value = message
        .write_to_bytes()
        .map_err(|error| Failure::new(Kind::Failed, format!("encode {name}: {error}")))?;
    Ok(Any {
        type_url: name.to_owned(),
        value,
        ..Any::default()
    })
}

/// A failure with its status code, for containerd.
pub fn failure(error: Failure) -> ttrpc::Error {
    kata_like_agent_protocol::status::of(&error)
}

#[cfg(test)]
mod tests;
