//! A pod of several containers, made as containerd's CRI plugin makes one: by annotations and by the
//! paths of namespaces, which are the host's.
//!
//! `ctr` gives the annotations that CRI would. Works on runc, too, where each container is a process of
//! its own in the namespaces of the first.

use crate::annotations::{Role, annotation_options};
use crate::ctr::Call;
use crate::host::Host;
use crate::pod::Pod;
use crate::{TestResult, runtime};

/// The pod's first container, which holds what the others share.
pub struct Sandbox<'host> {
    host: &'host Host,
    pod: Pod<'host>,
    pid: i32,
}

/// The namespaces that Kubernetes shares among the containers of a pod.
const SHARED: [&str; 3] = ["network", "ipc", "uts"];

impl<'host> Sandbox<'host> {
    /// Starts the sandbox container. Its command is what a pause image has: it never ends by itself.
    pub fn start(host: &'host Host, options: &[&str]) -> TestResult<Self> {
        let id = host.name("sandbox");
        let annotations = annotation_options(Role::Sandbox, &id);
        let mut all: Vec<&str> = annotations.iter().map(String::as_str).collect();
        all.extend(options);
        let pod = host.start_as(&id, &all, &["sleep", "100000"])?;
        let (_, pid) = pod.status()?;
        Ok(Self { host, pod, pid })
    }

    /// The sandbox's own container.
    pub fn pod(&self) -> &Pod<'host> {
        &self.pod
    }

    /// Its pid on the host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What makes a container one of this pod's.
    fn options(&self, options: &[&str]) -> Vec<String> {
        let mut all = annotation_options(Role::Container, self.pod.id());
        for kind in SHARED {
            let file = match kind {
                "network" => "net",
                other => other,
            };
            all.push("--with-ns".to_owned());
            all.push(format!("{kind}:/proc/{}/ns/{file}", self.pid));
        }
        all.extend(options.iter().map(|option| (*option).to_owned()));
        all
    }

    /// A container of the pod in the background.
    pub fn container(
        &self,
        stem: &str,
        options: &[&str],
        command: &[&str],
    ) -> TestResult<Pod<'host>> {
        let options = self.options(options);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        self.host.start(stem, &options, command)
    }

    /// A container of the pod in the foreground, which is then deleted.
    pub fn run(&self, stem: &str, options: &[&str], command: &[&str]) -> Call {
        let options = self.options(options);
        let (id, runtime) = (self.host.name(stem), runtime());
        let mut all = vec!["run", "--rm", "--runtime", &runtime];
        all.extend(options.iter().map(String::as_str));
        all.extend([crate::IMAGE, &id]);
        all.extend(command);
        self.host.ctr(all)
    }

    /// Kills and deletes the sandbox container; other containers should have gone before.
    pub fn remove(self) -> TestResult {
        self.pod.remove()
    }
}
