//! A name server on the loopback of the pod's namespace, like Docker's at 127.0.0.11: the
//! container's resolv.conf names it, and it answers.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::thread;

use kata_like_tests::namespace::Namespace;
use kata_like_tests::process::until;
use kata_like_tests::{Host, Parts, TestResult};

use crate::PATIENCE;

/// An answer to a question for an IPv4 address: 10.9.8.7. None to any other.
fn answer(question: &[u8]) -> Option<Vec<u8>> {
    let name = question.get(12..)?.iter().position(|byte| *byte == 0)?;
    let asked = question.get(12..12 + name + 5)?;
    let is_ipv4 = asked.ends_with(&[0, 1, 0, 1]);
    let mut answer = [
        &question[..2],
        &[0x81, 0x80, 0, 1, 0, is_ipv4.into(), 0, 0, 0, 0],
        asked,
    ]
    .concat();
    if is_ipv4 {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 9, 8, 7]);
    }
    Some(answer)
}

/// Serves until the test binary ends.
fn serve(namespace: &Namespace, address: &'static str) -> TestResult {
    let (datagrams, connections) =
        namespace.inside(move || Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?)))?;
    thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, from)) = datagrams.recv_from(&mut question) {
            if let Some(answer) = answer(&question[..length]) {
                let _ = datagrams.send_to(&answer, from);
            }
        }
    });
    thread::spawn(move || {
        for mut stream in connections.incoming().flatten() {
            let mut length = [0; 2];
            let mut serve = || {
                stream.read_exact(&mut length)?;
                let mut question = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut question)?;
                let answer = answer(&question).unwrap_or_default();
                stream.write_all(&(answer.len() as u16).to_be_bytes())?;
                stream.write_all(&answer)
            };
            let _ = serve();
        }
    });
    Ok(())
}

/// The file names two servers. One answers in the namespace, by UDP and TCP, also to more questions
/// at once than are carried. The other address is left to the pod, which may have a server there.
#[test]
fn a_name_server_on_the_pod_s_loopback_answers() -> TestResult {
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    serve(&inner, "127.0.0.11:53")?;
    let folder = tempfile::tempdir()?;
    let conf = folder.path().join("resolv.conf");
    let servers = "search test\nnameserver 127.0.0.11\nnameserver 127.0.0.12\n";
    fs::write(&conf, servers)?;
    let before = host.footprint();
    let mount = format!(
        "type=bind,src={},dst=/etc/resolv.conf,options=rbind:ro",
        conf.display()
    );
    let options = ["--with-ns", &inner.option(), "--mount", &mount];
    let script = "nslookup some.name.test >/tmp/out 2>&1; sleep 1000";
    let pod = host.start("resolver", &options, &["sh", "-c", script])?;
    let mut parts = Parts::new();
    parts.run("the first process's question", || {
        let mut last = String::new();
        until("the first process has asked", PATIENCE, || {
            let seen = pod.exec(&["cat", "/tmp/out"]);
            last = seen.map_or_else(|error| error.to_string(), |seen| seen.both());
            last.contains("10.9.8.7")
        })
        .map_err(|error| kata_like_tests::failure(format!("{error}: {last}")))
    });
    parts.run("TCP, and the other address", || {
    // A question of 19 bytes for the address of `x`, as over TCP, and the last bytes of the answer.
    let question =
        r"\000\023\022\064\001\000\000\001\000\000\000\000\000\000\001x\000\000\001\000\001";
    let script = format!(
        "printf '{question}' | nc -w 20 127.0.0.11 53 | tail -c 4 | od -An -tu1; nc -w 20 127.0.0.12 53 </dev/null || echo nobody"
    );
    let seen = pod.exec(&["sh", "-c", &script])?;
    let words: Vec<_> = seen.text().split_whitespace().map(str::to_owned).collect();
    assert_eq!(words, ["10", "9", "8", "7", "nobody"], "{}", seen.both());
    Ok(())
    });
    parts.run("many at once", || {
    let script = "for i in $(seq 80); do nslookup name$i.test 127.0.0.11 >/tmp/out.$i 2>&1 & done; wait; \
        grep -l 10.9.8.7 /tmp/out.* | wc -l";
    let seen = pod.exec(&["sh", "-c", script])?;
    assert_eq!(seen.text().trim(), "80", "{}", seen.both());
    Ok(())
    });
    parts.run("the pod's end", || {
        pod.remove()?;
        host.leaves_nothing(&before)
    });
    parts.end()
}

/// The same by IPv6, of which loopback has one address.
#[test]
fn a_name_server_on_the_pod_s_ipv6_loopback_answers() -> TestResult {
    let host = Host::alone()?;
    let inner = Namespace::new(&host, "pod")?;
    serve(&inner, "[::1]:53")?;
    let folder = tempfile::tempdir()?;
    let conf = folder.path().join("resolv.conf");
    fs::write(&conf, "search test\nnameserver ::1\n")?;
    let before = host.footprint();
    let mount = format!(
        "type=bind,src={},dst=/etc/resolv.conf,options=rbind:ro",
        conf.display()
    );
    let options = ["--with-ns", &inner.option(), "--mount", &mount];
    let pod = host.start("resolver", &options, &["sleep", "1000"])?;
    let question =
        r"\000\023\022\064\001\000\000\001\000\000\000\000\000\000\001x\000\000\001\000\001";
    let script = format!(
        "nslookup some.name.test; printf '{question}' | nc -w 20 ::1 53 | tail -c 4 | od -An -tu1; \
        nc -w 20 127.0.0.1 53 </dev/null || echo nobody"
    );
    let seen = pod.exec(&["sh", "-c", &script])?;
    let text = seen.text();
    let has = |wanted: &str| text.lines().any(|line| line.trim().ends_with(wanted));
    assert!(
        has("10.9.8.7") && has("10   9   8   7") && has("nobody"),
        "{}",
        seen.both()
    );
    pod.remove()?;
    host.leaves_nothing(&before)
}
