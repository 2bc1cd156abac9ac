//! The agent's API: translates, delegates to the pod, translates back.
//!
//! Served on the one connection that `dial.rs` made, to the shim of the pod. Whatever a call does
//! runs in a task of its own, so it comes to its end although the caller has gone. Errors become
//! status codes here and nowhere else.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream;
use kata_like_agent_protocol::agent::{
    ContainerRequest, CreateContainerRequest, CreateContainerResponse, DeviceRequest, Empty,
    Event as EventMessage, EventsRequest, ExecRequest, ExecResponse, ListProcessesResponse,
    OutOfMemory, Process as ProcessMessage, ProcessExited, ResizeTerminalRequest, SignalRequest,
    StartContainerRequest, StartPodRequest, StartPodResponse, StatsResponse,
    Streams as StreamsMessage,
};
use kata_like_agent_protocol::agent_ttrpc::{Agent, create_agent};
use kata_like_agent_protocol::{PROTOCOL_VERSION, is_name};
use ttrpc::Code;
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};
use ttrpc::asynchronous::transport::Listener;

use crate::cgroup::Stats;
use crate::device;
use crate::dial::Connection;
use crate::error::{PodError, blocking, one_line};
use crate::events::Event;
use crate::init;
use crate::process::MAX_SIGNAL;
use crate::runner::RunnerError;
use crate::sandbox::Pod;
use crate::spec;
use crate::stdio::{Token, Wanted};

/// How long after its answer to Shutdown the machine waits for the host to hang up.
const FAREWELL: Duration = Duration::from_millis(500);

/// Answers the host until it hangs up.
pub async fn serve(connection: Connection, pod: Arc<Pod>) -> ttrpc::Result<()> {
    let ended = connection.ended();
    let one = stream::once(async { Ok(connection) }).chain(stream::pending());
    let service = create_agent(Arc::new(Service { pod }));
    let mut server = Server::new()
        .add_listener(Listener::new(one))
        .register_service(service);
    server.start().await?;
    ended.notified().await;
    Ok(())
}

struct Service {
    pod: Arc<Pod>,
}

/// Does `work` to its end, though the caller may stop waiting.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, PodError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(|error| status(&error)),
        Err(error) => Err(status(&PodError::failed("answer the call")(error))),
    }
}

#[async_trait]
impl Agent for Service {
    async fn start_pod(
        &self,
        _: &TtrpcContext,
        request: StartPodRequest,
    ) -> ttrpc::Result<StartPodResponse> {
        if request.version != PROTOCOL_VERSION {
            let why = format!(
                "the shim speaks {}, the agent {PROTOCOL_VERSION}",
                request.version
            );
            return Err(status(&PodError::bad("protocol version", why)));
        }
        let pod = self.pod.clone();
        let started = detached(async move { pod.start(request.host_time_ns).await }).await?;
        Ok(StartPodResponse {
            kernel_release: started.kernel_release,
            dialled_at_ns: started.dialled_at_ns,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: EventsRequest,
        host: ServerStreamSender<EventMessage>,
    ) -> ttrpc::Result<()> {
        self.pod.listen().map_err(|error| status(&error))?;
        loop {
            // A failure here is the end of the connection, and with it of the machine.
            host.send(&event_message(self.pod.next_event().await))
                .await?;
        }
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let name = name("container", request.container)?;
        let wanted = wanted(request.streams.into_option())?;
        let (pod, spec) = (self.pod.clone(), request.spec);
        let pid = detached(async move { pod.create(&name, &spec, wanted).await }).await?;
        Ok(CreateContainerResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(request.container)?;
        detached(async move { container.start().await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ExecResponse> {
        let container = self.container(request.container)?;
        let exec = name("exec", request.exec)?;
        let wanted = wanted(request.streams.into_option())?;
        let process = spec::parse_process(&request.process).map_err(|error| status(&error))?;
        let pid = detached(async move { container.exec(&exec, process, wanted).await }).await?;
        Ok(ExecResponse {
            pid,
            ..Default::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let container = self.container(request.container)?;
        let SignalRequest {
            exec, signal, all, ..
        } = request;
        let result = match (signal, all) {
            (0, _) | (MAX_SIGNAL.., _) if signal != MAX_SIGNAL => Err(PodError::bad(
                "signal",
                format!("{signal} is not 1 to {MAX_SIGNAL}"),
            )),
            (_, true) if !exec.is_empty() => {
                Err(PodError::bad("exec", "must be empty for a signal to all"))
            }
            (_, true) => container.signal_all(signal),
            (_, false) => container.signal(&exec, signal),
        };
        result.map_err(|error| status(&error))?;
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(request.container)?;
        let (width, height) =
            size(request.width, request.height).map_err(|error| status(&error))?;
        let result = container.resize(&request.exec, width, height);
        result.map_err(|error| status(&error))?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let container = self.container(request.container)?;
        let processes = container.processes().map_err(|error| status(&error))?;
        let message = |(pid, exec)| ProcessMessage {
            pid,
            exec,
            ..Default::default()
        };
        Ok(ListProcessesResponse {
            processes: processes.into_iter().map(message).collect(),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<StatsResponse> {
        let container = self.container(request.container)?;
        let stats = container.stats().await.map_err(|error| status(&error))?;
        Ok(stats_message(&stats))
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let name = name("container", request.container)?;
        let pod = self.pod.clone();
        detached(async move { pod.delete(&name).await }).await?;
        Ok(Empty::new())
    }

    async fn bind_device(&self, _: &TtrpcContext, request: DeviceRequest) -> ttrpc::Result<Empty> {
        let slot = request.slot;
        if slot > device::MAX_SLOT {
            let why = format!("{slot} is not 0 to {}", device::MAX_SLOT);
            return Err(status(&PodError::bad("slot", why)));
        }
        detached(blocking("add a device", move || device::bind(slot))).await?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            pod.end().await;
            Ok(())
        })
        .await?;
        // The host hangs up when it has the answer, which ends the machine too.
        tokio::spawn(async {
            tokio::time::sleep(FAREWELL).await;
            log::info!("the host has asked for the end");
            init::restart()
        });
        Ok(Empty::new())
    }
}

impl Service {
    fn container(&self, requested: String) -> ttrpc::Result<Arc<crate::container::Container>> {
        let name = name("container", requested)?;
        self.pod.container(&name).map_err(|error| status(&error))
    }
}

fn name(field: &str, name: String) -> ttrpc::Result<String> {
    if is_name(&name) {
        return Ok(name);
    }
    Err(status(&PodError::bad(
        field,
        format!("not a name: {name:?}"),
    )))
}

fn wanted(streams: Option<StreamsMessage>) -> ttrpc::Result<Wanted> {
    let streams = streams.unwrap_or_default();
    let convert = || {
        let StreamsMessage {
            stdin,
            stdout,
            stderr,
            terminal,
            width,
            height,
            ..
        } = &streams;
        if *terminal && !stderr.is_empty() {
            return Err(PodError::bad(
                "streams.stderr",
                "must be empty with a terminal",
            ));
        }
        let [stdin, stdout, stderr] = [stdin, stdout, stderr].map(|bytes| token(bytes));
        Ok(Wanted {
            tokens: [stdin?, stdout?, stderr?],
            terminal: terminal.then(|| size(*width, *height)).transpose()?,
        })
    };
    convert().map_err(|error| status(&error))
}

fn token(bytes: &[u8]) -> Result<Option<Token>, PodError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let token = Token::try_from(bytes);
    let wrong = |_| PodError::bad("streams", format!("a token of {} bytes", bytes.len()));
    token.map(Some).map_err(wrong)
}

fn size(width: u32, height: u32) -> Result<(u16, u16), PodError> {
    match (u16::try_from(width), u16::try_from(height)) {
        (Ok(width), Ok(height)) => Ok((width, height)),
        _ => Err(PodError::bad(
            "width and height",
            format!("{width} by {height} is too large"),
        )),
    }
}

fn event_message(event: Event) -> EventMessage {
    let mut message = EventMessage::new();
    match event {
        Event::Exited {
            container,
            exec,
            status,
            at,
            carried: [stdout_bytes, stderr_bytes],
        } => {
            message.set_process_exited(ProcessExited {
                container,
                exec,
                status,
                exited_at_ns: nanoseconds(at),
                stdout_bytes,
                stderr_bytes,
                ..Default::default()
            });
        }
        Event::OutOfMemory { container } => {
            message.set_out_of_memory(OutOfMemory {
                container,
                ..Default::default()
            });
        }
    }
    message
}

/// A time as the wire has it: nanoseconds since 1970, until 2262.
fn nanoseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn stats_message(stats: &Stats) -> StatsResponse {
    let [cpu_usage_us, cpu_user_us, cpu_system_us] = stats.cpu;
    let [cpu_periods, cpu_throttled_periods, cpu_throttled_us] = stats.throttling;
    StatsResponse {
        cpu_usage_us,
        cpu_user_us,
        cpu_system_us,
        cpu_periods,
        cpu_throttled_periods,
        cpu_throttled_us,
        memory_usage: stats.memory_usage,
        memory_limit: stats.memory_limit.unwrap_or(u64::MAX),
        memory_peak: stats.memory_peak,
        memory_anon: stats.anon,
        memory_file: stats.file,
        memory_inactive_file: stats.inactive_file,
        memory_active_file: stats.active_file,
        memory_kernel_stack: stats.kernel_stack,
        memory_slab: stats.slab,
        page_faults: stats.page_faults,
        page_major_faults: stats.major_faults,
        oom_kills: stats.oom_kills,
        swap_usage: stats.swap_usage,
        swap_limit: stats.swap_limit.unwrap_or(u64::MAX),
        pids_current: stats.pids,
        pids_limit: stats.pids_limit.unwrap_or(0),
        ..Default::default()
    }
}

/// The one place where our errors become status codes: the shim decides by them.
fn status(error: &PodError) -> ttrpc::Error {
    let code = match error {
        PodError::BadRequest { .. } => Code::INVALID_ARGUMENT,
        PodError::Unsupported { .. } => Code::UNIMPLEMENTED,
        PodError::NoSuchContainer { .. } | PodError::NoSuchProcess { .. } => Code::NOT_FOUND,
        PodError::AlreadyExists { .. } => Code::ALREADY_EXISTS,
        PodError::WrongState { .. } => Code::FAILED_PRECONDITION,
        PodError::Runner(RunnerError::Unsupported { .. }) => Code::UNIMPLEMENTED,
        PodError::Runner(RunnerError::InvalidSpec { .. }) => Code::INVALID_ARGUMENT,
        PodError::Runner(RunnerError::Failed { .. })
        | PodError::Failed { .. }
        | PodError::Timeout { .. } => Code::INTERNAL,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, one_line(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(error: ttrpc::Error) -> Code {
        match error {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("no status: {other}"),
        }
    }

    #[test]
    fn a_token_is_sixteen_bytes_or_none() {
        assert_eq!(token(b"").unwrap(), None);
        assert_eq!(token(&[7; 16]).unwrap(), Some([7; 16]));
        for length in [1, 15, 17, 4096] {
            assert!(token(&vec![0; length]).is_err(), "{length}");
        }
    }

    #[test]
    fn streams_that_contradict_themselves_are_refused() {
        let streams = |change: fn(&mut StreamsMessage)| {
            let mut streams = StreamsMessage::new();
            change(&mut streams);
            wanted(Some(streams))
        };
        assert_eq!(wanted(None).unwrap(), Wanted::default());
        let good = streams(|it| (it.terminal, it.width, it.height) = (true, 80, 24));
        assert_eq!(good.unwrap().terminal, Some((80, 24)));
        let stderr = streams(|it| (it.terminal, it.stderr) = (true, vec![1; 16]));
        assert_eq!(code(stderr.unwrap_err()), Code::INVALID_ARGUMENT);
        let wide = streams(|it| (it.terminal, it.width) = (true, 65536));
        assert_eq!(code(wide.unwrap_err()), Code::INVALID_ARGUMENT);
    }

    #[test]
    fn a_name_that_could_be_a_path_is_refused() {
        for bad in ["", "..", "a/b", ".hidden"] {
            assert_eq!(
                code(name("container", bad.into()).unwrap_err()),
                Code::INVALID_ARGUMENT
            );
        }
    }

    #[test]
    fn no_limit_is_told_as_the_protocol_says() {
        let message = stats_message(&Stats::default());
        assert_eq!((message.memory_limit, message.pids_limit), (u64::MAX, 0));
    }
}
