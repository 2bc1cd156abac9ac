//! The agent's API: translates, delegates to the pod, translates back.
//!
//! Served to the pod's shim, on the one connection that `dial.rs` made. Each call runs in a task of
//! its own, so it is finished even when the caller has gone. `convert.rs` knows what messages mean.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream;
use kata_like_agent_protocol::agent::{
    ConfigureNetworkRequest, ConnectRequest, ContainerRequest, CreateContainerRequest,
    CreateContainerResponse, DeviceRequest, Empty, ExecRequest, ExecResponse, NextEventsRequest,
    NextEventsResponse, ResizeTerminalRequest, ServeNamesRequest, SetTimeRequest, ShutdownResponse,
    SignalRequest, StartContainerRequest, StartPodRequest, StartPodResponse, StatsResponse,
    Unwritten as UnwrittenMessage, UpdateRequest,
};
use kata_like_agent_protocol::agent_ttrpc::{Agent, create_agent};
use kata_like_agent_protocol::{PROTOCOL_VERSION, status};
use kata_like_failure::Failure;
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::asynchronous::transport::Listener;

use crate::container::Container;
use crate::convert::{self, name, wanted};
use crate::deadline::blocking;
use crate::device;
use crate::dial::Connection;
use crate::init;
use crate::network;
use crate::pod::Pod;
use crate::spec;

/// How long the machine waits for the host to hang up, after the answer to Shutdown.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long a call for events waits for the first: then its answer is empty.
const QUIET: Duration = Duration::from_secs(30);

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

/// Finishes `work` even when the caller stops waiting.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(|error| status::of(&error)),
        Err(error) => Err(status::of(&Failure::failed("answer the call", error))),
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
            return Err(status::of(&Failure::bad("protocol version", why)));
        }
        let pod = self.pod.clone();
        let started =
            detached(async move { pod.start(request.host_time_ns, &request.hostname).await })
                .await?;
        Ok(StartPodResponse {
            kernel_release: started.kernel_release,
            dialled_at_ns: started.dialled_at_ns,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn next_events(
        &self,
        _: &TtrpcContext,
        request: NextEventsRequest,
    ) -> ttrpc::Result<NextEventsResponse> {
        let most = convert::most_events(request.most)?;
        let next = self.pod.events_after(request.received, most, QUIET);
        let next = next.await.map_err(|error| status::of(&error))?;
        Ok(NextEventsResponse {
            events: next.into_iter().map(convert::event_message).collect(),
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        mut request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let name = name("container", std::mem::take(&mut request.container))?;
        let creation = convert::creation(request)?;
        let pod = self.pod.clone();
        let pid = detached(async move { pod.create(&name, creation).await }).await?;
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
        let process = spec::parse_process(&request.process).map_err(|error| status::of(&error))?;
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
        let result = convert::signal(signal).and_then(|signal| match all {
            true if !exec.is_empty() => {
                Err(Failure::bad("exec", "must be empty for a signal to all"))
            }
            true => container.signal_all(signal),
            false => container.signal(&exec, signal),
        });
        result.map_err(|error| status::of(&error))?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(request.container)?;
        detached(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(request.container)?;
        detached(async move { container.resume().await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let container = self.container(request.container)?;
        detached(async move { container.update(&request.resources).await }).await?;
        Ok(Empty::new())
    }

    async fn set_time(&self, _: &TtrpcContext, request: SetTimeRequest) -> ttrpc::Result<Empty> {
        let set = self.pod.set_time(request.host_time_ns);
        set.map_err(|error| status::of(&error))?;
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(request.container)?;
        let (width, height) =
            convert::size(request.width, request.height).map_err(|error| status::of(&error))?;
        let result = container.resize(&request.exec, width, height);
        result.map_err(|error| status::of(&error))?;
        Ok(Empty::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<StatsResponse> {
        let container = self.container(request.container)?;
        container.stats().await.map_err(|error| status::of(&error))
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
        let slot = convert::slot(request.slot)?;
        detached(blocking("add a device", move || device::bind(slot))).await?;
        Ok(Empty::new())
    }

    async fn unbind_device(
        &self,
        _: &TtrpcContext,
        request: DeviceRequest,
    ) -> ttrpc::Result<Empty> {
        let slot = convert::slot(request.slot)?;
        detached(blocking("remove a device", move || device::unbind(slot))).await?;
        Ok(Empty::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let network = convert::network(request)?;
        let configure = move || network::configure(&network);
        detached(blocking("set the network up", configure)).await?;
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<Empty> {
        let (port, token) = convert::connection(&request).map_err(|error| status::of(&error))?;
        let pod = self.pod.clone();
        detached(async move { pod.connect(port, token).await }).await?;
        Ok(Empty::new())
    }

    async fn serve_names(
        &self,
        _: &TtrpcContext,
        request: ServeNamesRequest,
    ) -> ttrpc::Result<Empty> {
        let address = convert::server(&request)?;
        let pod = self.pod.clone();
        detached(async move { pod.serve_names(address).await }).await?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<ShutdownResponse> {
        let pod = self.pod.clone();
        let done = detached(async move { Ok(pod.end().await) }).await?;
        if done {
            // The host hangs up when it has the answer. That ends the machine too.
            tokio::spawn(async {
                tokio::time::sleep(FAREWELL).await;
                log::info!("the host has asked for the end");
                init::restart()
            });
        }
        Ok(ShutdownResponse {
            done,
            left: Some(convert::unwritten_message(&self.pod.unwritten())).into(),
            ..Default::default()
        })
    }

    async fn get_unwritten(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<UnwrittenMessage> {
        Ok(convert::unwritten_message(&self.pod.unwritten()))
    }
}

impl Service {
    fn container(&self, requested: String) -> ttrpc::Result<Arc<Container>> {
        let name = name("container", requested)?;
        self.pod
            .container(&name)
            .map_err(|error| status::of(&error))
    }
}
