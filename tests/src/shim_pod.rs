//! A pod whose containers are made by calls to its shim, as containerd makes them, but without
//! containerd.
//!
//! For states that `ctr` doesn't show, and for steps that repeat often: a call takes milliseconds
//! here, and no container needs a machine of its own. It works on runc, too, whose shim also serves
//! all containers of a pod.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::protobuf::Message;
use serde_json::Value;

use crate::annotations::{Role, annotate};
use crate::ctr_pod::CtrPod;
use crate::host::Host;
use crate::rootfs::{Rootfs, join_namespace};
use crate::task::{self, Streams, Task};
use crate::task_api::{Answer, TaskApi, done};
use crate::{CtrContainer, Parts, TestResult};

/// A pod whose further containers are made by calls to its shim.
pub struct ShimPod<'host> {
    host: &'host Host,
    pod: CtrPod<'host>,
    api: Arc<TaskApi>,
    rootfs: Rootfs<'host>,
    spec: Value,
    files: PathBuf,
}

/// A case of a pod: its topic, and the test.
pub type Case = (&'static str, fn(&ShimPod) -> TestResult);

/// Runs cases one after the other in one pod; a failure does not keep the others from running.
pub fn run(pod: &ShimPod, cases: &[Case]) -> TestResult {
    let mut parts = Parts::new();
    for (name, case) in cases {
        parts.run(name, || case(pod));
    }
    parts.end()
}

impl<'host> ShimPod<'host> {
    /// Starts the pod, by `ctr`.
    pub fn start(host: &'host Host) -> TestResult<Self> {
        let files = PathBuf::from(format!("/run/{}", host.name("direct")));
        fs::create_dir(&files)?;
        let rootfs = Rootfs::mount(host)?;
        let mut spec = rootfs.spec(&["sleep", "1000"])?;
        let pod = CtrPod::start(host, &[])?;
        let api = TaskApi::connect_as_containerd(&host.bundle(pod.first().id()))?;
        annotate(&mut spec, Role::Container, pod.first().id());
        let network = format!("/proc/{}/ns/net", pod.pid());
        join_namespace(&mut spec, "network", &network);
        Ok(Self {
            host,
            pod,
            api: Arc::new(api),
            rootfs,
            spec,
            files,
        })
    }

    /// The host.
    pub fn host(&self) -> &'host Host {
        self.host
    }

    /// The pod's first container, which `ctr` has made.
    pub fn first(&self) -> &CtrContainer<'host> {
        self.pod.first()
    }

    /// A folder of the test's own, gone with the pod.
    pub fn files(&self) -> &Path {
        &self.files
    }

    /// The directory that is the containers' root.
    pub fn root(&self) -> &Path {
        self.rootfs.path()
    }

    /// A further connection, for a call that waits.
    pub fn connect(&self) -> TestResult<TaskApi> {
        TaskApi::connect_as_containerd(&self.host.bundle(self.pod.first().id()))
    }

    /// The spec of a container with this command.
    pub fn spec(&self, command: &[&str]) -> Value {
        let mut spec = self.spec.clone();
        spec["process"]["args"] = command.into();
        spec
    }

    /// A new name for a container, and the task that it will be.
    pub fn task(&self, stem: &str) -> Task {
        Task::new(Arc::clone(&self.api), self.host.name(stem), &self.files)
    }

    /// Makes and starts a container without streams.
    pub fn run(&self, stem: &str, command: &[&str]) -> TestResult<Task> {
        let task = self.task(stem);
        done(task.create(&self.spec(command), &Streams::default())?)?;
        done(task.start("")?)?;
        Ok(task)
    }

    /// Calls any method.
    pub fn call<T: Message>(&self, method: &str, request: &impl Message) -> TestResult<Answer<T>> {
        Ok(self.api.call(method, request, task::DEADLINE)?.0)
    }

    /// Takes the pod away.
    pub fn remove(self) -> TestResult {
        let _ = fs::remove_dir_all(&self.files);
        self.pod.remove()
    }
}
