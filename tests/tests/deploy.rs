//! The files in `deploy/` do what they say: the RuntimeClass, and the example pods as a kubelet
//! runs them.
//!
//! All tests of CRI use containerd's configuration from there.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use kata_like_cri_client::Forward;
use kata_like_cri_client::messages::PortForwardRequest;
use kata_like_tests::cri::{self, HANDLER, Kubelet, MINUTE};
use kata_like_tests::ctr::DEADLINE;
use kata_like_tests::manifest::{self, Container, Pod, RuntimeClass, Volumes};
use kata_like_tests::process::until;
use kata_like_tests::{Host, Parts, TestResult, Version, failure, is_oracle, scaled};

/// A running pod of the examples.
struct Example<'kubelet> {
    manifest: Pod,
    pod: cri::Pod<'kubelet>,
    volumes: Volumes,
}

impl<'kubelet> Example<'kubelet> {
    fn run(
        kubelet: &'kubelet Kubelet<'kubelet>,
        class: &RuntimeClass,
        file: &str,
    ) -> TestResult<Self> {
        let manifest = Pod::read(file)?;
        let pod = kubelet.pod(&manifest.metadata.name, &manifest.sandbox(class)?)?;
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

    /// As the kubelet does it: init containers first, each to its end or, if it is always
    /// restarted, beside the others.
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
fn hello(kubelet: &Kubelet<'_>, class: &RuntimeClass) -> TestResult {
    let example = Example::run(kubelet, class, "hello.yaml")?;
    let containers = example.start_all()?;
    let [container] = containers.as_slice() else {
        return Err(failure("hello.yaml: not one container"));
    };
    assert_eq!(container.wait_exit()?.exit_code, 0);
    let nodes = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let printed = container.log_text()?;
    assert_eq!(printed == nodes, is_oracle(), "{printed}");
    assert_eq!(printed.ends_with("-kata-like\n"), !is_oracle(), "{printed}");
    drop(containers);
    example.remove()
}

/// Both probes as the kubelet makes them.
fn web(kubelet: &Kubelet<'_>, class: &RuntimeClass) -> TestResult {
    let example = Example::run(kubelet, class, "web.yaml")?;
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
    // The kubelet's seconds are shorter than the emulated host's.
    let limit = i64::from(alive.timeout_seconds) * 6;
    let answer = kubelet.call(containers[0].command(&words, limit))?;
    assert_eq!(answer.exit_code, 0, "{answer}");
    // `kubectl port-forward pod/web 8080`, and a page through that port.
    let request = PortForwardRequest {
        pod_sandbox_id: example.pod.id().to_owned(),
        port: vec![ready.port.into()],
        ..Default::default()
    };
    let url = kubelet.call(request)?.url;
    let mut forward = Forward::open(&url, ready.port, scaled(MINUTE))?;
    forward.send(b"GET / HTTP/1.0\r\n\r\n")?;
    let (page, error) = forward.finish()?;
    let page = String::from_utf8(page)?;
    assert!(
        page.contains("200 OK") && page.ends_with("it works\n") && error.is_empty(),
        "{page:?} {error:?}"
    );

    rights_and_limits(&containers[0])?;
    let limit = fs::read_to_string(example.pod.cgroup().join("memory.max"))?;
    assert_eq!(limit.trim(), ((128 + 256) << 20).to_string());
    drop(containers);
    example.remove()
}

/// The rights and limits that the manifest gives the container.
fn rights_and_limits(container: &cri::Container<'_>) -> TestResult {
    let status = container.exec(
        "id -u; id -g; id -G
         grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status
         touch /tmp/file 2>&1; touch /www/file && stat -c %g /www/file
         cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max",
    )?;
    assert_eq!(
        status.replace('\t', ""),
        "65534\n65534\n65534\nCapBnd:0000000000000000\nNoNewPrivs:1\nSeccomp:2\n\
         touch: /tmp/file: Read-only file system\n65534\n134217728\n100000 100000"
    );
    // The limits also size the virtual machine.
    let machine = container.exec("nproc; grep MemTotal /proc/meminfo")?;
    let mut words = machine.split_whitespace();
    let (processors, memory) = (words.next().unwrap_or_default(), words.nth(1));
    let kib: u64 = memory.unwrap_or_default().parse()?;
    assert!(
        is_oracle() || processors == "1" && (128 << 10..=256 << 10).contains(&kib),
        "{machine}"
    );
    Ok(())
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

/// The containers share the volume, and each starts when it may.
fn sidecar(kubelet: &Kubelet<'_>, class: &RuntimeClass) -> TestResult {
    let example = Example::run(kubelet, class, "sidecar.yaml")?;
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
    assert_eq!(class.memory()?, 256 << 20);

    let host = Host::on(Version::V2_1Cri, true)?;
    let kubelet = Kubelet::new(&host)?;
    let before = host.footprint();
    let mut parts = Parts::new();
    parts.run("hello.yaml", || hello(&kubelet, &class));
    parts.run("web.yaml", || web(&kubelet, &class));
    parts.run("sidecar.yaml", || sidecar(&kubelet, &class));
    parts.run("the end", || host.leaves_nothing(&before));
    parts.end()
}
