//! Process namespaces of a pod, and work in its containers by a stream's address.

use std::thread;

use crate::cri::{self, Kubelet, MINUTE};
use crate::{Host, Parts, TestResult, failure, scaled};
use kata_like_cri_client::messages::*;
use kata_like_cri_client::{Channel, Ended, Spdy, Stream};
use sha2::{Digest, Sha256};

/// Two pods that start side by side: in one the containers see each other's processes, in the other
/// only a debugging container sees its target's.
pub fn processes_are_shared_as_asked(host: &Host) -> TestResult {
    let kubelet = Kubelet::new(host)?;
    let mode = |mode: &str| format!("namespace_options {{ {mode} }}");
    let config = |text: &str| format!("linux {{ security_context {{ {} }} }}", mode(text));
    let (shared, apart) = thread::scope(|scope| {
        let shared = scope.spawn(|| kubelet.pod("shared", &config("pid: POD")));
        let apart = kubelet.pod("apart", &config("pid: CONTAINER"));
        (shared.join(), apart)
    });
    let shared = shared.map_err(|_| failure("the thread of the shared pod"))??;
    let apart = apart?;

    let mut parts = Parts::new();
    parts.run("processes of the pod", || {
        let one = shared.start("one", &["sleep", "1111"], &config("pid: POD"))?;
        let list = shared.run("two", "ps -o pid,args; echo $$", &config("pid: POD"))?;
        // The pod's first process is the pause container's.
        assert!(
            list.contains("    1 /pause\n")
                && list.contains("sleep 1111")
                && !list.ends_with("\n1\n"),
            "{list}"
        );
        assert_eq!(one.stop(0)?.exit_code, 137);
        Ok(())
    });
    let target = parts.run("a container with its own processes", || {
        apart.start("target", &["sleep", "2222"], &config("pid: CONTAINER"))
    });
    parts.run("a container beside it", || {
        let script = "ps -o pid,args; echo $$";
        let list = apart.run("other", script, &config("pid: CONTAINER"))?;
        assert!(
            !list.contains("sleep 2222") && list.ends_with("\n1\n"),
            "{list}"
        );
        Ok(())
    });
    if let Some(target) = &target {
        parts.run("a container that debugs it", || {
            let joins = format!("pid: TARGET target_id: {:?}", target.id());
            let list = apart.run("debug", "ps -o pid,args", &config(&joins))?;
            assert!(list.contains("1 sleep 2222"), "{list}");
            assert!(!list.contains("sleep 1111"), "{list}");
            Ok(())
        });
        let execs = Execs {
            kubelet: &kubelet,
            target,
        };
        parts.run("exec", || execs.each_stream_is_its_own());
        parts.run("exec on a terminal", || execs.a_terminal_has_its_size());
        parts.run("cp", || execs.files_are_copied());
        parts.run("exec by SPDY", || execs.an_input_ends_by_spdy());
    }
    parts.run("attach", || attach(&kubelet, &apart));
    parts.run("the pods' end", || {
        apart.remove()?;
        shared.remove()
    });
    parts.end()
}

/// Commands in a container by a stream's address, as `kubectl exec` and `cp` run them.
struct Execs<'a> {
    kubelet: &'a Kubelet<'a>,
    target: &'a cri::Container<'a>,
}

impl Execs<'_> {
    /// The stream's address.
    fn ask(&self, command: &[&str], tty: bool) -> TestResult<String> {
        let request = ExecRequest {
            container_id: self.target.id().to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        Ok(self.kubelet.call(request)?.url)
    }

    fn exec(&self, command: &[&str], tty: bool) -> TestResult<Stream> {
        Ok(Stream::open(&self.ask(command, tty)?, scaled(MINUTE))?)
    }

    fn each_stream_is_its_own(&self) -> TestResult {
        let script = "read line; echo out $line; echo err >&2; exit 7";
        let mut stream = self.exec(&["sh", "-c", script], false)?;
        stream.send(Channel::Stdin, b"hello\n")?;
        let ended = stream.finish()?;
        assert_eq!(ended.stdout, b"out hello\n");
        assert_eq!(ended.stderr, b"err\n");
        assert_eq!(ended.exit_code(), Some(7), "{ended:?}");
        Ok(())
    }

    fn a_terminal_has_its_size(&self) -> TestResult {
        let mut stream = self.exec(&["sh"], true)?;
        stream.read_until("/ # ")?;
        stream.resize(100, 30)?;
        // The new size arrives beside the input.
        let script = "i=0; until stty size | grep '^30 100'; do i=$((i+1)); [ $i = 50 ] && exit; sleep 0.1; done; exit 9\n";
        stream.send(Channel::Stdin, script.as_bytes())?;
        stream.read_until("\n30 100")?;
        assert_eq!(stream.finish()?.exit_code(), Some(9));
        Ok(())
    }

    /// tar's output arrives unchanged, and goes back into the container.
    fn files_are_copied(&self) -> TestResult {
        let made = "head -c 100000 /dev/urandom >/tmp/file; sha256sum </tmp/file | cut -c-64";
        let digest = self.target.exec(made)?;
        let archive = self
            .exec(&["tar", "-cf", "-", "-C", "/tmp", "file"], false)?
            .finish()?;
        let file = archive.stdout.get(512..512 + 100_000).unwrap_or_default();
        let found: String = Sha256::digest(file)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(found, digest, "{} bytes of tar", archive.stdout.len());
        assert_eq!(archive.exit_code(), Some(0));

        // tar ends with its input, which only SPDY can end.
        let unpack = ["tar", "-xmf", "-", "-C", "/var"];
        let mut spdy = Spdy::open(
            &self.ask(&unpack, false)?,
            "v4.channel.k8s.io",
            scaled(MINUTE),
        )?;
        let mut open = |kind| spdy.stream(&[("streamtype", kind)]);
        let (error, stdin) = (open("error")?, open("stdin")?);
        open("stdout")?;
        open("stderr")?;
        spdy.send(stdin, &archive.stdout)?;
        spdy.end(stdin)?;
        let ended = Ended {
            status: String::from_utf8(spdy.finish(error)?)?,
            ..Ended::default()
        };
        assert_eq!(ended.exit_code(), Some(0), "{ended:?}");
        let unpacked = self.target.exec("sha256sum </var/file | cut -c-64")?;
        assert_eq!(unpacked, digest);
        Ok(())
    }

    fn an_input_ends_by_spdy(&self) -> TestResult {
        let url = self.ask(&["sh", "-c", "wc -c; echo err >&2; exit 5"], false)?;
        let mut spdy = Spdy::open(&url, "v4.channel.k8s.io", scaled(MINUTE))?;
        let mut open = |kind| spdy.stream(&[("streamtype", kind)]);
        let (error, stdin) = (open("error")?, open("stdin")?);
        let (stdout, stderr) = (open("stdout")?, open("stderr")?);
        spdy.send(stdin, &[0; 100_000])?;
        spdy.end(stdin)?;
        let ended = Ended {
            stdout: spdy.finish(stdout)?,
            stderr: spdy.finish(stderr)?,
            status: String::from_utf8(spdy.finish(error)?)?,
        };
        assert_eq!(ended.stdout, b"100000\n");
        assert_eq!(ended.stderr, b"err\n");
        assert_eq!(ended.exit_code(), Some(5), "{ended:?}");
        Ok(())
    }
}

/// As `kubectl attach` does it.
fn attach(kubelet: &Kubelet, pod: &cri::Pod) -> TestResult {
    let script = "echo waits; read line; echo got $line";
    let attached = pod.start("attached", &["sh", "-c", script], "stdin: true")?;
    let request = AttachRequest {
        container_id: attached.id().to_owned(),
        stdin: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    let mut stream = Stream::open(&kubelet.call(request)?.url, scaled(MINUTE))?;
    stream.send(Channel::Stdin, b"hello\n")?;
    stream.read_until("got hello\n")?;
    stream.finish()?;
    assert_eq!(attached.wait_exit()?.exit_code, 0);
    assert_eq!(attached.log_text()?, "waits\ngot hello\n");
    Ok(())
}
