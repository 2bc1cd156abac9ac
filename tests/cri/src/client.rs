//! Unary gRPC calls over HTTP/2 on a UNIX socket.
//!
//! From gRPC's "PROTOCOL-HTTP2.md": a call is a POST to `/SERVICE/METHOD`. Before a message on the
//! wire come a byte that says whether it is compressed, and four bytes of length. The status comes
//! in the trailers, or in the headers if there is no answer.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::HeaderMap;
use protobuf::{Message, MessageFull};
use tokio::net::UnixStream;

use crate::messages::*;

/// In bytes; no message of a test is longer.
const MAX_MESSAGE: usize = 16 << 20;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(30);

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server refused the call.
    #[error("{method}: {text} (code {code})")]
    Refused {
        /// The call's name.
        method: &'static str,
        /// gRPC's status code.
        code: u32,
        /// The server's explanation.
        text: String,
    },
    /// No answer within the deadline.
    #[error("{method}: no answer after {deadline:?}")]
    Late {
        /// The call's name.
        method: &'static str,
        /// How long the call had.
        deadline: Duration,
    },
    /// The connection failed, or the bytes that came over it make no sense.
    #[error("{method}: {text}")]
    Wire {
        /// The call's name.
        method: &'static str,
        /// What is wrong.
        text: String,
    },
}

/// A message that is a call's request.
pub trait Request: MessageFull {
    /// The call's name.
    const METHOD: &'static str;
    /// The service of the call.
    const SERVICE: &'static str;
    /// The message that comes back.
    type Answer: MessageFull;
}

macro_rules! calls {
    ($service:literal: $($method:literal $request:ident $answer:ident,)+) => {
        $(impl Request for $request {
            const METHOD: &'static str = $method;
            const SERVICE: &'static str = $service;
            type Answer = $answer;
        })+
    };
}

calls! { "runtime.v1.ImageService":
    "ImageStatus" ImageStatusRequest ImageStatusResponse,
}

calls! { "runtime.v1.RuntimeService":
    "Version" VersionRequest VersionResponse,
    "Status" StatusRequest StatusResponse,
    "RunPodSandbox" RunPodSandboxRequest RunPodSandboxResponse,
    "StopPodSandbox" StopPodSandboxRequest StopPodSandboxResponse,
    "RemovePodSandbox" RemovePodSandboxRequest RemovePodSandboxResponse,
    "PodSandboxStatus" PodSandboxStatusRequest PodSandboxStatusResponse,
    "ListPodSandbox" ListPodSandboxRequest ListPodSandboxResponse,
    "PodSandboxStats" PodSandboxStatsRequest PodSandboxStatsResponse,
    "ListPodSandboxStats" ListPodSandboxStatsRequest ListPodSandboxStatsResponse,
    "CreateContainer" CreateContainerRequest CreateContainerResponse,
    "StartContainer" StartContainerRequest StartContainerResponse,
    "StopContainer" StopContainerRequest StopContainerResponse,
    "RemoveContainer" RemoveContainerRequest RemoveContainerResponse,
    "ListContainers" ListContainersRequest ListContainersResponse,
    "ContainerStatus" ContainerStatusRequest ContainerStatusResponse,
    "UpdateContainerResources" UpdateContainerResourcesRequest UpdateContainerResourcesResponse,
    "ReopenContainerLog" ReopenContainerLogRequest ReopenContainerLogResponse,
    "ExecSync" ExecSyncRequest ExecSyncResponse,
    "Exec" ExecRequest ExecResponse,
    "Attach" AttachRequest AttachResponse,
    "PortForward" PortForwardRequest PortForwardResponse,
    "ContainerStats" ContainerStatsRequest ContainerStatsResponse,
    "ListContainerStats" ListContainerStatsRequest ListContainerStatsResponse,
    "ListMetricDescriptors" ListMetricDescriptorsRequest ListMetricDescriptorsResponse,
}

/// A connection to a CRI server. Any number of threads can use it.
pub struct Client {
    runtime: tokio::runtime::Runtime,
    connection: SendRequest<Bytes>,
}

impl Client {
    /// Connects to a UNIX socket.
    pub fn connect(socket: &Path) -> Result<Self, Error> {
        let wire = |text: String| Error::Wire {
            method: "connect",
            text,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| wire(error.to_string()))?;
        let connecting = async {
            let stream = UnixStream::connect(socket)
                .await
                .map_err(|error| wire(format!("{}: {error}", socket.display())))?;
            h2::client::handshake(stream)
                .await
                .map_err(|error| wire(error.to_string()))
        };
        let (connection, driver) = runtime.block_on(async {
            tokio::time::timeout(CONNECT, connecting)
                .await
                .map_err(|_| wire(format!("{}: no answer", socket.display())))?
        })?;
        // The task ends with the connection; each call sees its error.
        runtime.spawn(async { drop(driver.await) });
        Ok(Self {
            runtime,
            connection,
        })
    }

    /// Makes a call and waits for its answer.
    pub fn call<R: Request>(&self, request: &R, deadline: Duration) -> Result<R::Answer, Error> {
        let method = R::METHOD;
        let wire = |text: String| Error::Wire { method, text };
        let message = request
            .write_to_bytes()
            .map_err(|error| wire(error.to_string()))?;
        let path = format!("/{}/{method}", R::SERVICE);
        let answer = self.runtime.block_on(async {
            let call = unary(self.connection.clone(), &path, &message);
            tokio::time::timeout(deadline, call)
                .await
                .map_err(|_| Error::Late { method, deadline })?
                .map_err(wire)
        })?;
        match answer {
            Ok(answer) => {
                R::Answer::parse_from_bytes(&answer).map_err(|error| wire(error.to_string()))
            }
            Err((code, text)) => Err(Error::Refused { method, code, text }),
        }
    }
}

/// The answer's message, or gRPC's status and its text. The outer error is the connection's.
async fn unary(
    connection: SendRequest<Bytes>,
    path: &str,
    message: &[u8],
) -> Result<Result<Vec<u8>, (u32, String)>, String> {
    let text = |error: h2::Error| error.to_string();
    let request = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(|error| error.to_string())?;
    let mut connection = connection.ready().await.map_err(text)?;
    let (response, mut body) = connection.send_request(request, false).map_err(text)?;
    body.send_data(frame(message)?, true).map_err(text)?;
    let (head, mut body) = response.await.map_err(text)?.into_parts();
    let mut answer = Vec::new();
    while let Some(part) = body.data().await {
        let part = part.map_err(text)?;
        body.flow_control()
            .release_capacity(part.len())
            .map_err(text)?;
        answer.extend_from_slice(&part);
        if answer.len() > MAX_MESSAGE {
            return Err(format!("the answer has more than {MAX_MESSAGE} bytes"));
        }
    }
    let trailers = body.trailers().await.map_err(text)?;
    match status(trailers.as_ref().unwrap_or(&head.headers))? {
        (0, _) => unframe(&answer).map(|message| Ok(message.to_vec())),
        refusal => Ok(Err(refusal)),
    }
}

/// A message as it is sent: its length, and not compressed.
fn frame(message: &[u8]) -> Result<Bytes, String> {
    let length = u32::try_from(message.len()).map_err(|_| "the request is too long".to_owned())?;
    let mut framed = vec![0];
    framed.extend(length.to_be_bytes());
    framed.extend(message);
    Ok(framed.into())
}

/// The one message of an answer.
fn unframe(answer: &[u8]) -> Result<&[u8], String> {
    let (head, message) = answer
        .split_first_chunk::<5>()
        .ok_or_else(|| format!("an answer of {} bytes", answer.len()))?;
    let [compressed, length @ ..] = head;
    let length = u32::from_be_bytes(*length) as usize;
    if *compressed != 0 || length != message.len() {
        return Err(format!("a message of {length} bytes in {}", message.len()));
    }
    Ok(message)
}

/// Code and text of `grpc-status` and `grpc-message`.
fn status(headers: &HeaderMap) -> Result<(u32, String), String> {
    let value = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let code = value("grpc-status")
        .and_then(|code| code.parse().ok())
        .ok_or("the answer has no grpc-status")?;
    Ok((code, decode(value("grpc-message").unwrap_or_default())))
}

/// Decodes the percent signs in a status message.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = match (first, tail) {
            (b'%', [high, low, ..]) => std::str::from_utf8(&[*high, *low])
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 16).ok()),
            _ => None,
        };
        bytes.push(code.unwrap_or(*first));
        rest = &tail[if code.is_some() { 2 } else { 0 }..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_its_length_before_it() {
        let framed = frame(b"abc").expect("it is short");
        assert_eq!(framed[..], [0, 0, 0, 0, 3, b'a', b'b', b'c']);
        assert_eq!(unframe(&framed), Ok(&b"abc"[..]));
        assert!(unframe(&framed[..7]).is_err());
        assert!(unframe(&[1, 0, 0, 0, 0]).is_err());
        assert!(unframe(&[0]).is_err());
    }

    #[test]
    fn a_status_is_told_as_it_was_meant() {
        let mut headers = HeaderMap::new();
        assert!(status(&headers).is_err());
        headers.insert("grpc-status", "5".parse().expect("a value"));
        headers.insert(
            "grpc-message",
            "100%25 \"%c3%a4\"%".parse().expect("a value"),
        );
        assert_eq!(status(&headers), Ok((5, "100% \"ä\"%".to_owned())));
    }
}
