//! Connections to a pod's ports through the node, as `kubectl port-forward` makes them.

use kata_like_cri_client::messages::*;
use kata_like_cri_client::{Forward, Spdy};
use kata_like_tests::cri::{Kubelet, MINUTE, SMALL};
use kata_like_tests::{Parts, TestResult, kata_like_only, scaled};

use super::host;

/// How many connections are open at once.
const MANY: usize = 20;

#[test]
fn ports_of_a_pod_are_forwarded() -> TestResult {
    kata_like_only!(); // in runc's pods the listening processes are in the namespace itself
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let before = host.footprint();
    let pod = kubelet.pod("ports", SMALL)?;
    let script = "mkdir /four /six; echo by IPv4 >/four/index.html; echo by IPv6 >/six/index.html
        httpd -p 127.0.0.1:8004 -h /four; httpd -p [::1]:8006 -h /six
        nc -ll -p 8000 -e cat & echo serves; wait";
    let server = pod.start("server", &["sh", "-c", script], "")?;
    server.wait_log("serves")?;
    server.exec("until nc -w 9 127.0.0.1 8000 </dev/null; do :; done")?;
    let ports = Ports {
        kubelet: &kubelet,
        pod: pod.id().to_owned(),
    };

    let mut parts = Parts::new();
    parts.run("a page by IPv4", || ports.a_page_comes(8004, "by IPv4"));
    parts.run("a page by IPv6", || ports.a_page_comes(8006, "by IPv6"));
    parts.run("many at once", || ports.many_at_once_are_served());
    // The next connection is served all the same.
    parts.run("a port without a server", || {
        let (data, error) = ports.open(9999)?.finish()?;
        assert!(data.is_empty() && !error.is_empty(), "{data:?} {error:?}");
        Ok(())
    });
    parts.run("a page by SPDY", || ports.a_page_comes_by_spdy());
    parts.run("the pod's end", || {
        pod.remove()?;
        host.leaves_nothing(&before)
    });
    parts.end()
}

/// Asks for connections to ports of a pod.
struct Ports<'a> {
    kubelet: &'a Kubelet<'a>,
    pod: String,
}

impl Ports<'_> {
    fn ask(&self, port: u16) -> TestResult<String> {
        let request = PortForwardRequest {
            pod_sandbox_id: self.pod.clone(),
            port: vec![port.into()],
            ..Default::default()
        };
        Ok(self.kubelet.call(request)?.url)
    }

    fn open(&self, port: u16) -> TestResult<Forward> {
        Ok(Forward::open(&self.ask(port)?, port, scaled(MINUTE))?)
    }

    fn a_page_comes(&self, port: u16, text: &str) -> TestResult {
        let mut forward = self.open(port)?;
        forward.send(b"GET / HTTP/1.0\r\n\r\n")?;
        let (page, error) = forward.finish()?;
        let page = String::from_utf8(page)?;
        assert!(
            page.contains(text) && error.is_empty(),
            "{page:?} {error:?}"
        );
        Ok(())
    }

    fn many_at_once_are_served(&self) -> TestResult {
        let mut forwards = Vec::new();
        for _ in 0..MANY {
            forwards.push(self.open(8000)?);
        }
        for (number, forward) in forwards.iter_mut().enumerate() {
            forward.send(&number.to_le_bytes().repeat(1000))?;
        }
        for (number, forward) in forwards.iter_mut().enumerate() {
            assert!(
                forward.read(8000)? == number.to_le_bytes().repeat(1000),
                "{number}"
            );
        }
        Ok(())
    }

    /// containerd does not pass on that a client ends one direction: it closes the connection.
    fn a_page_comes_by_spdy(&self) -> TestResult {
        let mut spdy = Spdy::open(&self.ask(8004)?, "portforward.k8s.io", scaled(MINUTE))?;
        let mut stream =
            |kind| spdy.stream(&[("streamtype", kind), ("port", "8004"), ("requestid", "0")]);
        let (error, data) = (stream("error")?, stream("data")?);
        spdy.end(error)?;
        spdy.send(data, b"GET / HTTP/1.0\r\n\r\n")?;
        let page = String::from_utf8(spdy.finish(data)?)?;
        assert!(page.contains("by IPv4"), "{page:?}");
        assert_eq!(spdy.finish(error)?, b"");
        Ok(())
    }
}
