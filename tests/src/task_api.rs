//! A task's shim, spoken to as containerd does it: ttrpc on the socket that its bundle names.
//!
//! For what `ctr` can't ask (both versions of the API, methods out of turn) and for times, since
//! `ctr` itself takes a third of a second under emulation.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc;
use serde_json::Value;

use crate::host::NAMESPACE;
use crate::{TestResult, failure, scaled};

/// The two versions of the task API; messages and methods are the same.
pub const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// Under this name a request says which namespace of containerd it is about.
const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// A connection to a shim.
pub struct TaskApi {
    client: ttrpc::Client,
    service: &'static str,
}

/// What an error answer says.
#[derive(Debug)]
pub struct Refusal {
    /// The status code.
    pub code: ttrpc::Code,
    /// The text.
    pub text: String,
}

/// What a call was answered, or that it was refused and why.
pub type Answer<T> = Result<T, Refusal>;

/// The answer; a refusal is a failure of the test.
pub fn done<T>(answer: Answer<T>) -> TestResult<T> {
    answer.map_err(|refusal| failure(format!("refused: {refusal:?}")))
}

/// The refusal; an answer is a failure of the test.
pub fn refused<T: std::fmt::Debug>(answer: Answer<T>) -> TestResult<Refusal> {
    match answer {
        Ok(answer) => Err(failure(format!("it was done: {answer:?}"))),
        Err(refusal) => Ok(refusal),
    }
}

impl TaskApi {
    /// Connects to the shim that the bundle names, and speaks one version of the API.
    pub fn connect(bundle: &Path, service: &'static str) -> TestResult<Self> {
        let address = address(bundle)?;
        let client = ttrpc::Client::connect(&address)
            .map_err(|error| failure(format!("connect to {address}: {error}")))?;
        Ok(Self { client, service })
    }

    /// The same in the version that the host's containerd speaks with this shim.
    pub fn connect_as_containerd(bundle: &Path) -> TestResult<Self> {
        // containerd 2 keeps which version that is; 1.7 knows only the older one.
        let service = SERVICES[usize::from(bundle.join("bootstrap.json").exists())];
        Self::connect(bundle, service)
    }

    /// Calls a method. The outer error is of the transport or the deadline, the inner the shim's.
    pub fn call<T: Message>(
        &self,
        method: &str,
        request: &impl Message,
        deadline: Duration,
    ) -> TestResult<(Answer<T>, Duration)> {
        let mut wire = ttrpc::Request::new();
        wire.service = self.service.into();
        wire.method = method.into();
        wire.timeout_nano = i64::try_from(scaled(deadline).as_nanos())?;
        // As containerd does, and runc's shim asks for it.
        let namespace = HashMap::from([(NAMESPACE_KEY.into(), vec![NAMESPACE.into()])]);
        wire.metadata = ttrpc::context::to_pb(namespace);
        wire.payload = request.write_to_bytes()?;
        let started = Instant::now();
        let answer = match self.client.request(wire) {
            Ok(response) => Ok(T::parse_from_bytes(&response.payload)?),
            Err(ttrpc::Error::RpcStatus(status)) => Err(Refusal {
                code: status.code(),
                text: status.message().into(),
            }),
            Err(error) => return Err(failure(format!("{method}: {error}"))),
        };
        Ok((answer, started.elapsed()))
    }
}

/// The shim's address: containerd 2 keeps it as JSON, the shim itself as text.
pub fn address(bundle: &Path) -> TestResult<String> {
    if let Ok(text) = fs::read(bundle.join("bootstrap.json")) {
        let json: Value = serde_json::from_slice(&text)?;
        if let Some(address) = json["address"].as_str() {
            return Ok(address.to_owned());
        }
    }
    let path = bundle.join("address");
    fs::read_to_string(&path).map_err(|error| failure(format!("read {}: {error}", path.display())))
}
