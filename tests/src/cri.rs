//! Pods as a kubelet makes them: through containerd's CRI plugin, with the runtime under test as a
//! handler.
//!
//! What the kubelet does itself is done here, too: the pod's cgroup, the folder of its logs, the
//! volumes. A test writes what it wants of a pod or container in protobuf's text format; names,
//! image and paths are filled in. Whatever was made is taken away when it goes out of scope, a
//! failed test included.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kata_like_cri_client::messages::*;
use kata_like_cri_client::{Client, Error, Request};
use protobuf::{MessageField, text_format};

use crate::ctr::DEADLINE;
use crate::host::Host;
use crate::{IMAGE, Patience, TestResult, failure, scaled};

mod container;
mod set_up;

pub use container::{Container, text_of_log};
pub(crate) use set_up::{imports, set_up};

/// The handler that a RuntimeClass names. Its pods are on a network with IPv4 and IPv6 and an MTU
/// of 1400.
pub const HANDLER: &str = "kata-like";

/// The same on another network: an MTU of 9000, and ports of the host lead to pods.
pub const LARGE: &str = "kata-like-large";

/// A pod whose virtual machine is small: what a container may have is the machine's size.
pub const SMALL: &str = "linux { resources { memory_limit_in_bytes: 134217728 } }";

/// How long something may take that is a matter of seconds.
pub const MINUTE: Duration = Duration::from_secs(60);

/// containerd's namespace of CRI.
pub const NAMESPACE: &str = "k8s.io";

/// The image of a pod's first container.
pub const PAUSE: &str = "localhost/pause:latest";

/// Where the kubelet keeps the cgroups of its pods.
const CGROUPS: &str = "/sys/fs/cgroup/kubepods";

/// How long to wait before something is asked for again: at least so long, and so many times as
/// long as the answer took. Who waits beside many others is not to take the CPU from what is waited
/// for.
const POLL: Duration = Duration::from_millis(50);
const SHARE: u32 = 10;

/// Hands all controllers of a cgroup down, as the kubelet does it for its pods.
fn delegate(cgroup: &Path) -> TestResult {
    let names = fs::read_to_string(cgroup.join("cgroup.controllers"))?;
    for name in names.split_whitespace() {
        fs::write(cgroup.join("cgroup.subtree_control"), format!("+{name}"))?;
    }
    Ok(())
}

/// Who speaks to the CRI plugin.
pub struct Kubelet<'host> {
    host: &'host Host,
    client: Client,
}

impl<'host> Kubelet<'host> {
    /// Connects, and waits until the plugin has the images: it learns of them by events.
    pub fn new(host: &'host Host) -> TestResult<Self> {
        let kubelet = Self {
            client: Client::connect(&host.address())?,
            host,
        };
        for image in [IMAGE, PAUSE] {
            kubelet.until(image, || {
                let request = ImageStatusRequest {
                    image: image_of(image),
                    ..Default::default()
                };
                Ok(kubelet.call(request)?.image.is_some().then_some(()))
            })?;
        }
        Ok(kubelet)
    }

    /// Makes a call.
    pub fn call<R: Request>(&self, request: R) -> TestResult<R::Answer> {
        Ok(self.try_call(request)?)
    }

    /// Makes a call, and gives its error as it is.
    pub fn try_call<R: Request>(&self, request: R) -> Result<R::Answer, Error> {
        self.client.call(&request, scaled(DEADLINE))
    }

    /// Makes a call that must be refused, and gives what is said about it.
    pub fn refused<R: Request>(&self, request: R) -> TestResult<String> {
        match self.try_call(request) {
            Err(Error::Refused { text, .. }) => Ok(text),
            Err(error) => Err(error.into()),
            Ok(answer) => Err(failure(format!("{}: done: {answer}", R::METHOD))),
        }
    }

    /// Asks again and again until there is an answer.
    fn until<T>(
        &self,
        what: &str,
        mut ask: impl FnMut() -> TestResult<Option<T>>,
    ) -> TestResult<T> {
        let patience = Patience::new(DEADLINE);
        loop {
            let asked = Instant::now();
            if let Some(found) = ask()? {
                return Ok(found);
            }
            if patience.is_over() {
                return Err(failure(format!("not within {DEADLINE:?}: {what}")));
            }
            std::thread::sleep(POLL.max(asked.elapsed() * SHARE));
        }
    }

    /// What a pod of this name is asked for with, the cgroup and folders made.
    fn config(&self, name: &str, config: &str) -> TestResult<PodSandboxConfig> {
        let mut config: PodSandboxConfig = text_format::parse_from_str(config)?;
        let metadata = config.metadata.mut_or_insert_default();
        metadata.name = name.to_owned();
        metadata.uid = name.to_owned();
        metadata.namespace = "default".to_owned();
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = format!("/kubepods/{name}");
        let security = linux.security_context.mut_or_insert_default();
        own_processes(&mut security.namespace_options);
        let directory = PathBuf::from(format!("/run/{name}"));
        config.log_directory = directory.join("logs").display().to_string();
        fs::create_dir_all(&config.log_directory)?;
        let cgroup = Path::new(CGROUPS).join(name);
        fs::create_dir(&cgroup)?;
        delegate(&cgroup)?;
        let memory = |resources: &MessageField<LinuxContainerResources>| {
            let resources = resources.as_ref();
            resources.map_or(0, |resources| resources.memory_limit_in_bytes)
        };
        if let (limit @ 1.., overhead @ 1..) = (memory(&linux.resources), memory(&linux.overhead)) {
            fs::write(cgroup.join("memory.max"), (limit + overhead).to_string())?;
        }
        Ok(config)
    }

    /// Runs a pod. `config` is a `PodSandboxConfig`.
    pub fn pod(&self, stem: &str, config: &str) -> TestResult<Pod<'_>> {
        self.pod_of(HANDLER, stem, config)
    }

    /// The same with another handler.
    pub fn pod_of(&self, handler: &'static str, stem: &str, config: &str) -> TestResult<Pod<'_>> {
        let mut pod = self.planned(handler, stem, config)?;
        // Twenty at once may be a lot for one emulated CPU.
        let answer = self.client.call(&pod.request(), scaled(2 * DEADLINE))?;
        pod.id = answer.pod_sandbox_id;
        Ok(pod)
    }

    /// Asks for a pod that must be refused, and gives what is said about it.
    pub fn no_pod(&self, stem: &str, config: &str) -> TestResult<String> {
        let pod = self.planned(HANDLER, stem, config)?;
        self.refused(pod.request())
    }

    /// A pod that containerd has not been asked for.
    fn planned(&self, handler: &'static str, stem: &str, config: &str) -> TestResult<Pod<'_>> {
        let name = self.host.name(stem);
        Ok(Pod {
            kubelet: self,
            handler,
            id: String::new(),
            config: self.config(&name, config)?,
            name,
            attempts: Cell::new(0),
            removed: false,
        })
    }
}

/// A pod.
pub struct Pod<'kubelet> {
    kubelet: &'kubelet Kubelet<'kubelet>,
    handler: &'static str,
    name: String,
    id: String,
    config: PodSandboxConfig,
    attempts: Cell<u32>,
    removed: bool,
}

impl Pod<'_> {
    /// Its sandbox's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its address of IPv4, and that of IPv6.
    pub fn addresses(&self) -> TestResult<[String; 2]> {
        let network = self.status()?.network;
        match &network.additional_ips[..] {
            [other] => Ok([network.ip.clone(), other.ip.clone()]),
            others => Err(failure(format!("{} and {others:?}", network.ip))),
        }
    }

    /// What was there of it when CNI was told to take its interface away: interfaces in its network
    /// namespace, and the VMMs of this host as `/proc/PID/comm`.
    pub fn seen_at_del(&self) -> TestResult<String> {
        let path = set_up::seen_at_del(self.kubelet.host.directory(), &self.id);
        fs::read_to_string(&path)
            .map_err(|error| failure(format!("read {}: {error}", path.display())))
    }

    /// The pid of its VMM.
    pub fn vmm(&self) -> TestResult<i64> {
        self.process("vmm")
    }

    /// The pid of its `shim`, `vmm`, `fsd` or `proxy`.
    pub fn process(&self, name: &str) -> TestResult<i64> {
        let path = Path::new("/run/kata-like").join(format!("{NAMESPACE}:{}", self.id));
        let record = fs::read(path.join("shim.json"))?;
        let record: serde_json::Value = serde_json::from_slice(&record)?;
        record[name]["pid"]
            .as_i64()
            .ok_or_else(|| failure(format!("no pid of the {name} in {record}")))
    }

    /// The cgroup that the kubelet has made for it.
    pub fn cgroup(&self) -> PathBuf {
        Path::new(CGROUPS).join(&self.name)
    }

    /// A folder for its volumes.
    pub fn volume(&self, name: &str) -> TestResult<PathBuf> {
        let path = PathBuf::from(format!("/run/{}/volumes/{name}", self.name));
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    fn request(&self) -> RunPodSandboxRequest {
        RunPodSandboxRequest {
            config: MessageField::some(self.config.clone()),
            runtime_handler: self.handler.to_owned(),
            ..Default::default()
        }
    }

    /// Its state.
    pub fn status(&self) -> TestResult<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer = self.kubelet.call(request)?;
        answer.status.0.map(|status| *status).ok_or_else(no_answer)
    }

    /// Its figures.
    pub fn stats(&self) -> TestResult<LinuxPodSandboxStats> {
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let stats = self.kubelet.call(request)?.stats;
        let linux = stats.0.and_then(|stats| stats.linux.0);
        linux.map(|linux| *linux).ok_or_else(no_answer)
    }

    /// Creates a container. `config` is a `ContainerConfig`.
    pub fn create(&self, name: &str, command: &[&str], config: &str) -> TestResult<Container<'_>> {
        let attempt = self.attempts.get();
        self.attempts.set(attempt + 1);
        let mut config: ContainerConfig = text_format::parse_from_str(config)?;
        let metadata = config.metadata.mut_or_insert_default();
        metadata.name = name.to_owned();
        metadata.attempt = attempt;
        config.image = image_of(IMAGE);
        config.command = command.iter().map(|word| (*word).to_owned()).collect();
        config.log_path = format!("{name}_{attempt}.log");
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        own_processes(&mut security.namespace_options);
        let log = Path::new(&self.config.log_directory).join(&config.log_path);
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(self.config.clone()),
            ..Default::default()
        };
        Ok(Container {
            kubelet: self.kubelet,
            id: self.kubelet.call(request)?.container_id,
            log,
        })
    }

    /// Creates a container and starts it.
    pub fn start(&self, name: &str, command: &[&str], config: &str) -> TestResult<Container<'_>> {
        let container = self.create(name, command, config)?;
        self.kubelet.call(container.start())?;
        Ok(container)
    }

    /// Runs a shell's script to its end and gives its output, both streams; any other exit code
    /// than 0 is an error.
    pub fn run(&self, name: &str, script: &str, config: &str) -> TestResult<String> {
        let script = format!("exec 2>&1\n{script}");
        let container = self.start(name, &["sh", "-c", &script], config)?;
        let status = container.wait_exit()?;
        let log = container.log_text()?;
        container.remove()?;
        match status.exit_code {
            0 => Ok(log),
            code => Err(failure(format!("{name}: exit code {code}: {log}"))),
        }
    }

    /// Stops it: its containers are killed, its network is taken away.
    pub fn stop(&self) -> TestResult {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        self.kubelet.call(request).map(drop)
    }

    /// Stops and removes it, and what the kubelet had made for it.
    pub fn remove(mut self) -> TestResult {
        self.removed = true;
        self.stop()?;
        self.kubelet.call(RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        })?;
        self.clear()
    }

    /// The cgroup goes only if nothing is in it any more.
    fn clear(&self) -> TestResult {
        let cgroup = self.cgroup();
        fs::remove_dir(&cgroup)
            .map_err(|error| failure(format!("remove {}: {error}", cgroup.display())))?;
        Ok(fs::remove_dir_all(format!("/run/{}", self.name))?)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        let _ = self.stop();
        let _ = self.kubelet.call(RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        });
        let _ = self.clear();
    }
}

/// As the kubelet asks for it where a pod says nothing; CRI's own default is to share them.
fn own_processes(options: &mut MessageField<NamespaceOption>) {
    if options.is_none() {
        options.mut_or_insert_default().pid = NamespaceMode::CONTAINER.into();
    }
}

/// A mount of a container's.
pub fn volume(source: &Path, target: &str, more: &str) -> String {
    format!("mounts {{ host_path: {source:?} container_path: {target:?} {more} }} ")
}

fn image_of(name: &str) -> MessageField<ImageSpec> {
    MessageField::some(ImageSpec {
        image: name.to_owned(),
        ..Default::default()
    })
}

fn no_answer() -> Box<dyn std::error::Error + Send + Sync> {
    failure("the answer is empty")
}
