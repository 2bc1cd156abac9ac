//! containerd's task service, version 2 and 3 alike: translate, delegate, translate back.
//!
//! Registered by `serve`, called by containerd. A handler is dropped when its client leaves or its
//! time is over; so what changes the pod runs in a task of its own, and the handler only waits for
//! it. Every method is here: one left at its default would answer NOT_FOUND, which means "deleted"
//! to containerd.

use kata_like_failure::Failure;
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc;
use protobuf::MessageField;
use ttrpc::Code;
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::{convert, stats};
use crate::pod::Pod;

/// The service's name for containerd 2.x, as generated.
const TASK_V3: &str = "containerd.task.v3.Task";
/// Its name for 1.6, 1.7, and for 2.x where it was given a plain address.
const TASK_V2: &str = "containerd.task.v2.Task";

/// The services to register: one and the same under both names, for their messages are the same.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let make = || {
        create_task(Arc::new(TaskService {
            pod: Arc::clone(pod),
        }))
    };
    let mut services = make();
    if let Some(service) = make().remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), service);
    }
    services
}

struct TaskService {
    pod: Arc<Pod>,
}

/// Runs the work to its end, whoever waits for it.
async fn apart<T: Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(answer) => answer.map_err(convert::failure),
        Err(error) => Err(status(Code::INTERNAL, format!("the call failed: {error}"))),
    }
}

fn status(code: Code, text: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

#[async_trait]
impl Task for TaskService {
    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        let state = self
            .pod
            .process_state(&request.id, &request.exec_id)
            .map_err(convert::failure)?;
        Ok(api::StateResponse {
            id: if request.exec_id.is_empty() {
                request.id
            } else {
                request.exec_id.clone()
            },
            exec_id: request.exec_id,
            bundle: state.bundle.display().to_string(),
            pid: state.pid,
            status: convert::status(state.status),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at: convert::timestamp_or_none(state.exit.map(|exit| exit.at)),
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let request = convert::create(request).map_err(convert::failure)?;
        let pid = apart(Arc::clone(&self.pod).create(request)).await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let pid = apart(Arc::clone(&self.pod).start(request.id, request.exec_id)).await?;
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let deleted = apart(Arc::clone(&self.pod).delete(request.id, request.exec_id)).await?;
        Ok(api::DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: convert::timestamp(deleted.exit.at),
            ..Default::default()
        })
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let processes = self.pod.pids(&request.id).map_err(convert::failure)?;
        let processes: Result<_, _> = processes.into_iter().map(convert::process).collect();
        Ok(api::PidsResponse {
            processes: processes.map_err(convert::failure)?,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        apart(Arc::clone(&self.pod).pause(request.id)).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        apart(Arc::clone(&self.pod).resume(request.id)).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        Err(convert::failure(Failure::unsupported(
            format!("checkpoint of container {:?}", request.id),
            "the state of a virtual machine's processes can't be saved",
        )))
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        let resources = convert::resources(request).map_err(convert::failure)?;
        apart(Arc::clone(&self.pod).update(id, resources)).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        if request.signal > 64 {
            return Err(status(
                Code::INVALID_ARGUMENT,
                format!(
                    "kill container {:?}: signal {} is not 0 to 64",
                    request.id, request.signal
                ),
            ));
        }
        let pod = Arc::clone(&self.pod);
        apart(pod.kill(request.id, request.exec_id, request.signal, request.all)).await?;
        Ok(Empty::new())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let exec = convert::exec(request).map_err(convert::failure)?;
        self.pod.register_exec(exec).map_err(convert::failure)?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        // As runc's shim: the kernel keeps 16 bits.
        let (width, height) = (request.width & 0xffff, request.height & 0xffff);
        let pod = Arc::clone(&self.pod);
        apart(pod.resize(request.id, request.exec_id, width, height)).await?;
        Ok(Empty::new())
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.pod
                .close_stdin(&request.id, &request.exec_id)
                .map_err(convert::failure)?;
        }
        Ok(Empty::new())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let exit = self
            .pod
            .wait(&request.id, &request.exec_id)
            .await
            .map_err(convert::failure)?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: convert::timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let read = self
            .pod
            .stats(&request.id)
            .await
            .map_err(convert::failure)?;
        let stats = stats::any(&read).map_err(convert::failure)?;
        Ok(api::StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pod.init_pid(&request.id),
            ..Default::default()
        })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _request: api::ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        self.pod.shutdown();
        Ok(Empty::new())
    }
}
