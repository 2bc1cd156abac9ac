//! What lies in `deploy/` does what it says: the RuntimeClass, and the example pods as a kubelet runs them.
//!
//! containerd's configuration from there is the one that all tests of CRI use.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use kata_like_tests::cri::{self, HANDLER, Kubelet};
use kata_like_tests::ctr::DEADLINE;
use kata_like_tests::manifest::{self, Container, Pod, RuntimeClass, Volumes, quantity};
use kata_like_tests::process::until;
use kata_like_tests::{Host, TestResult, Version, failure, is_oracle};

/// A pod of the examples that runs.
struct Example<'kubelet> {
    manifest: Pod,
    pod: cri::Pod<'kubelet>,
    volumes: Volumes,
}

impl<'kubelet> Example<'kubelet> {
    fn run(kubelet: &'kubelet Kubelet<'kubelet>, file: &str) -> TestResult<Self> {
        let manifest = Pod::read(file)?;
        let pod = kubelet.pod(&manifest.metadata.name, &manifest.sandbox()?)?;
        let volumes = Volumes::make(&manifest, &pod)?;
        Ok(Self {
            manifest,
            pod,
            volumes,
        })
    }

    fn start(&self, container: &Container) -> TestResult<cri::Container<'_>> {
        let config = self.manifest.container(container, &self.volumes)?;
        self.pod.start(&container.name, &container.words(), &config)
    }

    /// As the kubelet does it: those before the others, each to its end or, if it is restarted always, beside them.
    fn start_all(&self) -> TestResult<Vec<cri::Container<'_>>> {
        let mut started = Vec::new();
        for container in &self.manifest.spec.init_containers {
            let running = self.start(container)?;
            if container.restart_policy.is_none() {
                let status = running.wait_exit()?;
                if status.exit_code != 0 {
                    return Err(failure(format!("{}: {status}", container.name)));
                }
            }
            started.push(running);
        }
        for container in &self.manifest.spec.containers {
            started.push(self.start(container)?);
        }
        Ok(started)
    }

    /// The volumes go with the pod.
    fn remove(self) -> TestResult {
        self.pod.stop()?;
        drop(self.volumes);
        self.pod.remove()
    }
}

/// The kernel's release that a pod of one container prints.
fn hello(kubelet: &Kubelet<'_>) -> TestResult {
    let example = Example::run(kubelet, "hello.yaml")?;
    let containers = example.start_all()?;
    let [container] = containers.as_slice() else {
        return Err(failure("hello.yaml: not one container"));
    };
    assert_eq!(container.wait_exit()?.exit_code, 0);
    let own = container.log_text()?.contains("kata-like");
    assert_eq!(own, !is_oracle(), "{}", container.log_text()?);
    drop(containers);
    example.remove()
}

/// Both probes as the kubelet makes them.
fn web(kubelet: &Kubelet<'_>) -> TestResult {
    let example = Example::run(kubelet, "web.yaml")?;
    let spec = &example.manifest.spec.containers[0];
    let containers = example.start_all()?;
    let address = example.pod.status()?.network.ip.clone();
    let ready = spec.readiness_probe.as_ref();
    let ready = ready.and_then(|probe| probe.http_get.as_ref());
    let ready = ready.ok_or_else(|| failure("web.yaml: no readiness probe"))?;
    assert_eq!(ready.port, spec.ports[0].container_port);
    let mut page = String::new();
    until("the server answers", DEADLINE, || {
        get(&address, ready.port, &ready.path)
            .map(|answer| page = answer)
            .is_ok()
    })?;
    assert!(
        page.contains("200 OK") && page.ends_with("it works\n"),
        "{page}"
    );
    let alive = spec.liveness_probe.as_ref();
    let alive = alive.ok_or_else(|| failure("web.yaml: no liveness probe"))?;
    let command = alive.exec.as_ref().map(|exec| exec.command.as_slice());
    let words: Vec<&str> = command
        .unwrap_or_default()
        .iter()
        .map(String::as_str)
        .collect();
    // The kubelet's seconds are not the emulated host's.
    let limit = i64::from(alive.timeout_seconds) * 6;
    let answer = kubelet.call(containers[0].command(&words, limit))?;
    assert_eq!(answer.exit_code, 0, "{answer}");
    let status =
        containers[0].exec("id -u; grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status")?;
    assert_eq!(
        status.replace('\t', ""),
        "65534\nCapBnd:0000000000000000\nNoNewPrivs:1\nSeccomp:2"
    );
    drop(containers);
    example.remove()
}

/// A page by HTTP, with its head.
fn get(address: &str, port: u16, path: &str) -> TestResult<String> {
    let address = format!("{address}:{port}").parse()?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

/// The containers share the volume, and each begins when it may.
fn sidecar(kubelet: &Kubelet<'_>) -> TestResult {
    let example = Example::run(kubelet, "sidecar.yaml")?;
    let containers = example.start_all()?;
    let main = containers.last().ok_or_else(|| failure("no container"))?;
    assert_eq!(main.wait_exit()?.exit_code, 0, "{}", main.log_text()?);
    assert_eq!(main.log_text()?, "through a sidecar\n");
    drop(containers);
    example.remove()
}

#[test]
fn the_examples_are_what_they_say() -> TestResult {
    let class: RuntimeClass =
        manifest::read(&manifest::deploy().join("kubernetes/runtimeclass.yaml"))?;
    let head = (class.api_version.as_str(), class.kind.as_str());
    assert_eq!(head, ("node.k8s.io/v1", "RuntimeClass"));
    assert_eq!(
        (class.metadata.name.as_str(), class.handler.as_str()),
        (HANDLER, HANDLER)
    );
    let memory = class.overhead.pod_fixed.get("memory");
    let memory = memory.ok_or_else(|| failure("no overhead of memory"))?;
    assert_eq!(quantity(memory)?, 256 << 20);

    let host = Host::on(Version::V2_1Cri, true)?;
    let kubelet = Kubelet::new(&host)?;
    let before = host.footprint();
    hello(&kubelet)?;
    web(&kubelet)?;
    sidecar(&kubelet)?;
    host.leaves_nothing(&before)
}
