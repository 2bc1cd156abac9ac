//! A pod of several containers that `ctr` makes as containerd's CRI plugin would: by annotations,
//! and by the paths of namespaces on the host.
//!
//! It works on runc, too, where each container is a process in the namespaces of the first one.

use crate::annotations::{Role, annotation_options};
use crate::ctr::Call;
use crate::ctr_container::CtrContainer;
use crate::host::Host;
use crate::{TestResult, runtime};

/// A pod, held by its first container, whose namespaces the others share.
pub struct CtrPod<'host> {
    host: &'host Host,
    first: CtrContainer<'host>,
    pid: i32,
}

/// The namespaces that Kubernetes shares among the containers of a pod.
const SHARED: [&str; 3] = ["network", "ipc", "uts"];

impl<'host> CtrPod<'host> {
    /// Starts the first container. Its command is that of a pause image: it never ends by itself.
    pub fn start(host: &'host Host, options: &[&str]) -> TestResult<Self> {
        let id = host.name("sandbox");
        let annotations = annotation_options(Role::Sandbox, &id);
        let mut all: Vec<&str> = annotations.iter().map(String::as_str).collect();
        all.extend(options);
        let first = host.start_as(&id, &all, &["sleep", "100000"])?;
        let (_, pid) = first.status()?;
        Ok(Self { host, first, pid })
    }

    /// The first container, which is CRI's sandbox.
    pub fn first(&self) -> &CtrContainer<'host> {
        &self.first
    }

    /// The first container's pid on the host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The options that make a container one of this pod.
    fn options(&self, options: &[&str]) -> Vec<String> {
        let mut all = annotation_options(Role::Container, self.first.id());
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
    ) -> TestResult<CtrContainer<'host>> {
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

    /// Kills and deletes the first container; other containers should have gone before.
    pub fn remove(self) -> TestResult {
        self.first.remove()
    }
}
