//! Traffic through CNI's bridges: between pods, between pod and host, through ports of the host.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;

use kata_like_tests::cri::{Container, Kubelet, LARGE, MINUTE, Pod, SMALL};
use kata_like_tests::process::until;
use kata_like_tests::{Call, Parts, TestResult, failure, scaled};

use super::host;

const BULK: usize = 1 << 18;

/// Sends back what it receives.
const ECHO: [&str; 6] = ["nc", "-ll", "-p", "6000", "-e", "cat"];

/// Two pods on one network, and a third on another one with longer frames and forwarded ports of
/// the host.
#[test]
fn pods_and_host_reach_each_other() -> TestResult {
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let before = host.footprint();
    let one = kubelet.pod("one", SMALL)?;
    let other = kubelet.pod("other", SMALL)?;
    let ports = "port_mappings { container_port: 6000 host_port: 16000 }";
    let large = kubelet.pod_of(LARGE, "large", &format!("{SMALL} {ports}"))?;
    let (addresses, at_large) = (other.addresses()?, large.addresses()?);
    let client = one.start("client", &["sleep", "100000"], "")?;
    let server = other.start("server", &ECHO, "")?;
    let server_at_large = large.start("server", &ECHO, "")?;

    let make =
        format!("dd if=/dev/urandom of=/tmp/x bs={BULK} count=1 2>/dev/null; md5sum </tmp/x");
    let digest = client.exec(&make)?;
    let mut parts = Parts::new();
    // Over one bridge, and through the host from one bridge to the other.
    parts.run("from pod to pod", || {
        let (was, others_was) = (traffic(&one)?, traffic(&other)?);
        for address in [&addresses, &at_large].into_iter().flatten() {
            from_pod(&client, address, 6000, &digest)?;
        }
        let (is, others_is) = (traffic(&one)?, traffic(&other)?);
        for ((was, is), times) in [(was, is), (others_was, others_is)].into_iter().zip([4, 2]) {
            for (was, is) in was.into_iter().zip(is) {
                assert!(is - was >= times * BULK as u64, "{was} {is}");
            }
        }
        Ok(())
    });
    parts.run("from pod to host", || to_the_gateway(&client, &digest));
    for (name, addresses, mtu) in [
        ("from host to pod", &addresses, 1400),
        ("from host to pod in long frames", &at_large, 9000),
    ] {
        parts.run(name, || segments_are_as_long_as_can_be(addresses, mtu));
    }
    for (name, container, mtu, gateway) in [
        ("a packet", &server, 1400, "10.88.0.1"),
        ("a long packet", &server_at_large, 9000, "10.89.0.1"),
    ] {
        parts.run(name, || a_whole_packet_is_answered(container, mtu, gateway));
    }
    // On the host's loopback, on its other addresses, and from another pod.
    parts.run("a port of the host", || {
        for address in ["127.0.0.1", "10.88.0.1", "fd89::1"] {
            from_host(address, 16000)?;
        }
        from_pod(&client, "10.88.0.1", 16000, &digest)
    });
    parts.run("the pods' end", || {
        one.remove()?;
        other.remove()?;
        large.remove()?;
        let closed = TcpStream::connect(("127.0.0.1", 16000));
        assert!(closed.is_err(), "{closed:?}");
        host.leaves_nothing(&before)
    });
    parts.end()
}

/// From a pod to the host, by the gateway's address.
fn to_the_gateway(client: &Container, digest: &str) -> TestResult {
    for address in ["10.88.0.1", "fd88::1"] {
        let listener = TcpListener::bind((address, 5000))?;
        thread::scope(|scope| {
            let echo = scope.spawn(|| echo_once(&listener).map_err(|error| error.to_string()));
            from_pod(client, address, 5000, digest)?;
            echo.join().map_err(|_| failure("a thread panicked"))??;
            TestResult::Ok(())
        })?;
    }
    Ok(())
}

/// TCP's longest segment is as long as the guest's interface allows.
fn segments_are_as_long_as_can_be(addresses: &[String; 2], mtu: u32) -> TestResult {
    let without_headers = [20 + 20 + 12, 40 + 20 + 12];
    for (address, headers) in addresses.iter().zip(without_headers) {
        let stream = from_host(address, 6000)?;
        let segment = longest_segment(&stream)?;
        assert_eq!(segment, mtu - headers, "{address}");
    }
    Ok(())
}

/// An echo request of the interface's full length, and its answer.
fn a_whole_packet_is_answered(container: &Container, mtu: u32, gateway: &str) -> TestResult {
    let script = format!(
        "cat /sys/class/net/eth0/mtu; ping -c 1 -W 30 -s {} {gateway} >/dev/null && echo answered",
        mtu - 28
    );
    assert_eq!(container.exec(&script)?, format!("{mtu}\nanswered"));
    Ok(())
}

/// What the pod's interface has received and sent, in bytes.
fn traffic(pod: &Pod) -> TestResult<[u64; 2]> {
    let stats = pod.stats()?;
    let eth0 = &stats.network.default_interface;
    assert_eq!(eth0.name, "eth0");
    Ok([eth0.rx_bytes.value, eth0.tx_bytes.value])
}

/// Sends a file from the pod, which must come back unchanged. The server may not be there yet.
fn from_pod(client: &Container, address: &str, port: u16, digest: &str) -> TestResult {
    let script = format!(
        "end=$(($(date +%s) + 60)); until nc -w 30 {address} {port} </tmp/x >/tmp/back; do
             [ $(date +%s) -lt $end ] || exit 1; sleep 0.2
         done; md5sum </tmp/back"
    );
    let back = client.exec(&script)?;
    assert_eq!(back, digest, "{address} port {port}");
    Ok(())
}

/// Sends bytes from the host, which must come back unchanged; returns the connection.
fn from_host(address: &str, port: u16) -> TestResult<TcpStream> {
    let mut found = None;
    until("a connection", MINUTE, || {
        found = TcpStream::connect((address, port)).ok();
        found.is_some()
    })
    .map_err(|error| failure(format!("{error} to {address} port {port}")))?;
    let stream = found.ok_or_else(|| failure("no connection"))?;
    stream.set_read_timeout(Some(scaled(MINUTE)))?;
    let sent: Vec<u8> = (0..BULK as u32)
        .map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut back = vec![0; BULK];
    thread::scope(|scope| {
        let writer = scope.spawn(|| (&stream).write_all(&sent));
        (&stream).read_exact(&mut back)?;
        writer.join().map_err(|_| failure("a thread panicked"))??;
        TestResult::Ok(())
    })
    .map_err(|error| failure(format!("{address} port {port}: {error}")))?;
    assert!(back == sent, "other bytes came back from {address}");
    Ok(stream)
}

/// Accepts one connection and sends back what it brings.
fn echo_once(listener: &TcpListener) -> TestResult {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(scaled(MINUTE)))?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(stream.write_all(&bytes)?)
}

/// The longest segment that a connection's TCP sends, in bytes.
fn longest_segment(stream: &TcpStream) -> TestResult<u32> {
    let mut ss = Command::new("ss");
    ss.args(["-t", "-i", "-n", "-H", "src"]);
    ss.arg(stream.local_addr()?.to_string());
    let text = Call::new(ss).ok()?.text();
    let found = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix("mss:"));
    let found = found.ok_or_else(|| failure(format!("no mss in {text:?}")))?;
    Ok(found.parse()?)
}
