//! A connection to the loopback of a pod's network namespace on the host reaches the pod's own
//! loopback, as containerd's port-forward makes it.
//!
//! Under runc both are one, so runc is the oracle. Only a refusal differs: the host's kernel
//! accepts a connection before the guest is asked.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::namespace::{self, Namespace, pattern};
use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::process::until;
use kata_like_tests::{
    CtrContainer, Host, Parts, TestResult, failure, in_time, is_oracle, kata_like_only,
};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(60);
/// A refusal must come sooner than anything that is waited for.
const AT_ONCE: Duration = Duration::from_secs(4);
const BULK: usize = 8 << 20;
const MANY: usize = 300;

/// A network namespace on the host, dialled from within.
#[derive(Clone)]
struct Inside(PathBuf);

impl Inside {
    /// The namespace of a pod without a network, by its pid on the host.
    fn of_pid(pid: i32) -> Self {
        Self(format!("/proc/{pid}/ns/net").into())
    }

    /// A namespace of the test's own.
    fn of(namespace: &Namespace) -> Self {
        Self(namespace.path())
    }

    /// Does something in a thread inside the namespace; its sockets stay there.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> TestResult<T> + Send + 'static,
    ) -> TestResult<T> {
        namespace::inside(&self.0, work)
    }

    fn dial(&self, address: &str) -> TestResult<TcpStream> {
        let address: SocketAddr = address.parse()?;
        self.run(move || {
            let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        })
    }

    /// Says something to the server, and reads its answer to the end.
    fn ask(&self, address: &str, question: &[u8]) -> TestResult<Vec<u8>> {
        let mut stream = self.dial(address)?;
        stream.write_all(question)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    }

    /// Waits until the server answers there.
    fn served(&self, address: &str) -> TestResult {
        let mut last = Err(failure("not tried"));
        until("an answer", PATIENCE, || {
            last = self.ask(address, b"ehello");
            matches!(&last, Ok(answer) if answer == b"helloover")
        })
        .map_err(|error| failure(format!("{error}: {address}: {last:?}")))
    }

    /// How long a refusal takes.
    fn refused(&self, address: &str) -> TestResult<Duration> {
        let begin = Instant::now();
        let refusal = match self.dial(address) {
            Ok(mut stream) => stream.read(&mut [0]).map_err(Into::into),
            Err(error) => Err(error),
        };
        let error = refusal.expect_err("neither refused nor reset");
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        let known = [ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset];
        match kind {
            Some(kind) if known.contains(&kind) => Ok(begin.elapsed()),
            _ => Err(failure(format!("{address}: {error}"))),
        }
    }
}

fn rest(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).map(|_| rest)
}

/// One direction ends and the other goes on, whichever ends first.
fn half_closes(inside: &Inside) -> TestResult {
    let mut stream = inside.dial("127.0.0.1:83")?;
    stream.write_all(b"equestion")?;
    let mut back = [0; 8];
    stream.read_exact(&mut back)?;
    stream.shutdown(Shutdown::Write)?;
    assert_eq!(rest(&mut stream)?, b"over");

    let mut stream = inside.dial("127.0.0.1:83")?;
    stream.write_all(b"h")?;
    assert_eq!(rest(&mut stream)?, b"");
    stream.write_all(&pattern(100_000))?;
    drop(stream);
    let mut taken = Vec::new();
    until("the server has all of it", PATIENCE, || {
        taken = inside.ask("127.0.0.1:83", b"c").unwrap_or_default();
        taken == b"100000"
    })
    .map_err(|error| failure(format!("{error}: {taken:?}")))
}

fn much_passes_both_ways(inside: &Inside) -> TestResult {
    let mut stream = inside.dial("127.0.0.1:83")?;
    let mut writer = stream.try_clone()?;
    let bytes = pattern(BULK);
    let back = thread::scope(|scope| {
        let bytes = &bytes;
        scope.spawn(move || {
            writer.write_all(b"e")?;
            writer.write_all(bytes)?;
            writer.shutdown(Shutdown::Write)
        });
        rest(&mut stream)
    })?;
    let (same, word) = back.split_at(BULK.min(back.len()));
    assert!(same == bytes && word == b"over", "{} bytes", back.len());
    Ok(())
}

/// All are open before the first one is used.
fn many_at_once(inside: &Inside) -> TestResult {
    let mut all = Vec::new();
    for _ in 0..MANY {
        all.push(inside.dial("127.0.0.1:83")?);
    }
    for (number, stream) in all.iter_mut().enumerate() {
        write!(stream, "enumber {number}.")?;
    }
    for (number, stream) in all.iter_mut().enumerate().rev() {
        let wanted = format!("number {number}.");
        let mut back = vec![0; wanted.len()];
        stream.read_exact(&mut back)?;
        assert_eq!(back, wanted.as_bytes());
    }
    // They end in another order.
    for stream in &all {
        stream.shutdown(Shutdown::Write)?;
    }
    for stream in &mut all {
        assert_eq!(rest(stream)?, b"over");
    }
    Ok(())
}

#[test]
fn every_port_of_loopback_is_the_pods() -> TestResult {
    let host = Host::alone()?;
    let tool = Tool::new(&host)?;
    let namespace = Namespace::new(&host, "pod")?;
    let inside = &Inside::of(&namespace);
    let before = host.footprint();
    let (mount, network) = (tool.mount(), namespace.option());
    let pod = host.start(
        "ports",
        &["--mount", &mount, "--with-ns", &network],
        &[
            TOOL,
            "listen",
            "127.0.0.1:81",
            "[::1]:82",
            "0.0.0.0:83",
            "127.0.0.1:45678",
        ],
    )?;
    let mut parts = Parts::new();
    for address in [
        "127.0.0.1:81",
        "[::1]:82",
        "127.0.0.1:83",
        "127.0.0.1:45678",
    ] {
        parts.run(address, || inside.served(address));
    }
    if !is_oracle() {
        // The guest's server is found at its address, whatever the host's address.
        for address in ["[::1]:81", "127.0.0.1:82", "[::1]:83", "127.3.2.1:81"] {
            parts.run(address, || inside.served(address));
        }
    }
    for address in ["127.0.0.1:84", "[::1]:84", "127.0.0.1:45679"] {
        parts.run(address, || {
            let took = inside.refused(address)?;
            assert!(in_time(took, AT_ONCE), "{address}: refused after {took:?}");
            Ok(())
        });
    }
    parts.run("half closes", || half_closes(inside));
    parts.run("a reset", || a_reset_is_told(inside));
    parts.run("much both ways", || much_passes_both_ways(inside));
    parts.run("many at once", || many_at_once(inside));
    parts.run("the pod's end", || {
        a_pod_with_connections_ends(inside, pod)?;
        host.leaves_nothing(&before)
    });
    parts.end()
}

fn a_reset_is_told(inside: &Inside) -> TestResult {
    let mut cut = inside.dial("127.0.0.1:83")?;
    cut.write_all(b"r")?;
    let mut word = [0; 10];
    cut.read_exact(&mut word)?;
    cut.write_all(b"!")?;
    let kind = rest(&mut cut).map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::ConnectionReset));
    Ok(())
}

/// A pod with connections, one idle and one stalled, is killed and deleted like any other.
fn a_pod_with_connections_ends(inside: &Inside, pod: CtrContainer) -> TestResult {
    let mut idle = inside.dial("127.0.0.1:81")?;
    idle.write_all(b"ex")?;
    idle.read_exact(&mut [0])?;
    let mut stalled = inside.dial("127.0.0.1:81")?;
    stalled.write_all(b"e")?;
    stalled.set_write_timeout(Some(Duration::from_millis(500)))?;
    while stalled.write(&[7; 1 << 16]).is_ok() {}
    pod.remove()?;
    let end = rest(&mut idle);
    assert!(end.is_err() || end.is_ok_and(|rest| rest.is_empty()));
    inside.refused("127.0.0.1:81")?;
    Ok(())
}

/// Pods with a namespace of their own that nobody has prepared: the same port, and each its own.
#[test]
fn several_pods_have_their_own_ports() -> TestResult {
    let host = Host::alone()?;
    let tool = Tool::new(&host)?;
    let before = host.footprint();
    let mount = tool.mount();
    let mut pods = Vec::new();
    for stem in ["first", "second"] {
        let server = [TOOL, "listen", "127.0.0.1:80"];
        let pod = host.start(stem, &["--mount", &mount], &server)?;
        let inside = Inside::of_pid(pod.status()?.1);
        inside.served("127.0.0.1:80")?;
        pods.push((pod, inside));
    }
    for ((_, inside), length) in pods.iter().zip([1000, 3000]) {
        inside.ask(
            "127.0.0.1:80",
            &[b"h".as_slice(), &pattern(length)].concat(),
        )?;
    }
    for ((_, inside), length) in pods.iter().zip(["1000", "3000"]) {
        let mut taken = Vec::new();
        until("each has its own", PATIENCE, || {
            taken = inside.ask("127.0.0.1:80", b"c").unwrap_or_default();
            taken == length.as_bytes()
        })
        .map_err(|error| failure(format!("{error}: {taken:?}")))?;
    }
    for (pod, _) in pods {
        pod.remove()?;
    }
    host.leaves_nothing(&before)
}

/// The shim is killed: nothing listens any more, and nothing hangs on the namespace.
#[test]
fn a_killed_shim_leaves_no_listener() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let tool = Tool::new(&host)?;
    let namespace = Namespace::new(&host, "pod")?;
    let before = host.footprint();
    let (mount, network) = (tool.mount(), namespace.option());
    let options = ["--mount", &mount, "--with-ns", &network];
    let events = host.events()?;
    let pod = host.start("killed", &options, &[TOOL, "listen", "127.0.0.1:80"])?;
    let inside = Inside::of(&namespace);
    inside.served("127.0.0.1:80")?;
    let mut open = inside.dial("127.0.0.1:80")?;
    pod.process("shim")?.signal(Signal::KILL)?;
    events.exit(pod.id(), pod.id(), PATIENCE)?;
    drop(events);
    let end = rest(&mut open);
    assert!(end.is_err() || end.is_ok_and(|rest| rest.is_empty()));
    let refused = inside.dial("127.0.0.1:80").map(drop).unwrap_err();
    let kind = refused.downcast_ref::<io::Error>().map(io::Error::kind);
    assert_eq!(kind, Some(ErrorKind::ConnectionRefused), "{refused}");
    pod.remove_container()?;
    host.leaves_nothing(&before)
}

/// If the kernel refuses BPF the pod runs without port-forward, and the log says why.
#[test]
fn without_bpf_a_pod_has_no_port_forward_and_runs() -> TestResult {
    kata_like_only!();
    let probe = {
        let host = Host::shared()?;
        Tool::new(&host)?
    };
    let program = probe.path().display().to_string();
    let host = Host::wrapped(&[&program, "without-bpf"])?;
    let namespace = Namespace::new(&host, "pod")?;
    let options = ["--with-ns", &namespace.option()];
    let run = host.run(&host.name("without"), &options, &["echo", "runs"]);
    assert_eq!(run.ok()?.text(), "runs");
    let log = host.log();
    let lines = log.lines().filter(|line| line.contains("port-forward"));
    let [line] = lines.collect::<Vec<_>>()[..] else {
        return Err(failure(format!("not one line of port-forward in {log}")));
    };
    for words in ["make a BPF map", "Operation not permitted"] {
        assert!(line.contains(words), "no {words:?} in {line}");
    }
    Ok(())
}
