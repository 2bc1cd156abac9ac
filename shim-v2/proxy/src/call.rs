//! One call of the agent's, and what is taken of its answer.

use std::time::Duration;

use kata_like_agent_protocol::agent::{
    ShutdownResponse, StartPodResponse, StatsResponse, Unwritten,
};
use kata_like_agent_protocol::status as codes;
use protobuf::Message;
use ttrpc::asynchronous::Client;

use crate::event::clean;
use crate::figures::Stats;
use crate::gate::Offence;
use crate::wire::{Answer, Method};

/// The service's name in `agent.proto`.
const SERVICE: &str = "katalike.agent.v1.Agent";

/// Makes a call, with a request in protobuf's form.
pub(crate) async fn call(
    client: &Client,
    offence: &Offence,
    method: Method,
    limit: Duration,
    request: Vec<u8>,
) -> Answer {
    let request = ttrpc::proto::Request {
        service: SERVICE.to_owned(),
        method: format!("{method:?}"), // as the service has it
        timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
        payload: request,
        ..Default::default()
    };
    let answer = client.request(request).await;
    let answer = answer.and_then(|answer| {
        let read = read(method, &answer.payload);
        read.map_err(|error| ttrpc::Error::Others(error.to_string()))
    });
    answer.unwrap_or_else(|error| failed(error, offence))
}

/// What is taken of an answer.
pub(crate) fn read(method: Method, bytes: &[u8]) -> protobuf::Result<Answer> {
    Ok(match method {
        Method::StartPod => {
            let answer = StartPodResponse::parse_from_bytes(bytes)?;
            Answer::PodStarted {
                kernel_release: clean(&answer.kernel_release),
                agent_version: clean(&answer.agent_version),
            }
        }
        Method::Stats => {
            let stats = Stats::from(StatsResponse::parse_from_bytes(bytes)?);
            Answer::Stats(Box::new(stats.bounded()))
        }
        Method::Shutdown => {
            let answer = ShutdownResponse::parse_from_bytes(bytes)?;
            unwritten(answer.done, &answer.left.unwrap_or_default())
        }
        Method::GetUnwritten => unwritten(false, &Unwritten::parse_from_bytes(bytes)?),
        // Their answers are empty, or a number that nobody asks for.
        Method::CreateContainer
        | Method::StartContainer
        | Method::Exec
        | Method::Signal
        | Method::Pause
        | Method::Resume
        | Method::Update
        | Method::SetTime
        | Method::ResizeTerminal
        | Method::DeleteContainer
        | Method::BindDevice
        | Method::UnbindDevice
        | Method::ConfigureNetwork
        | Method::Connect
        | Method::ServeNames => Answer::Done,
    })
}

fn unwritten(done: bool, left: &Unwritten) -> Answer {
    Answer::Unwritten {
        done,
        dirty_bytes: left.dirty_bytes,
        containers: left.containers,
    }
}

fn failed(error: ttrpc::Error, offence: &Offence) -> Answer {
    match error {
        ttrpc::Error::RpcStatus(status) => Answer::Refused {
            kind: codes::kind(status.code.enum_value_or_default()),
            why: clean(&status.message),
        },
        other => match offence.get() {
            Some(why) => Answer::Offence { why: why.clone() },
            None => Answer::Broken {
                why: clean(&other.to_string()),
            },
        },
    }
}
