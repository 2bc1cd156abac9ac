//! A guest that belongs to an attacker, from its agent on: the pod's shim and proxy stay small, the
//! shim answers within a second, logs little, and the pod can be removed.
//!
//! The guest is the product's kernel with an initrd of the test's own, in which the static program
//! of `tests/probe` is `/init` (`tests/probe/src/agent.rs` has the cases). What needs no guest is
//! in the proxy's own tests (`shim-v2/proxy/src/follow/tests.rs`).

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::Message;
use kata_like_tests::oracle::PROBE;
use kata_like_tests::process::{Process, until};
use kata_like_tests::task_api::{SERVICES, TaskApi};
use kata_like_tests::{
    CtrContainer, Host, Parts, Patience, TestResult, failure, in_time, kata_like_only,
};

const SECOND: Duration = Duration::from_secs(1);
/// What shim and proxy may each hold in memory of its own.
const MOST_KIB: u64 = 64 << 10;
/// How many lines a pod may add to the host's log.
const MOST_LINES: usize = 100;

/// An initrd with the hostile agent, and a configuration that names it.
struct Image(PathBuf);

impl Image {
    fn new(host: &Host, case: &str) -> TestResult<Self> {
        let agent = std::env::var_os(PROBE);
        let agent = agent.ok_or_else(|| failure("run-tests builds the probe"))?;
        let image = Self(PathBuf::from(format!("/run/{}", host.name("hostile"))));
        fs::create_dir(&image.0)?;
        let initrd = image.0.join("initrd.img");
        let entries = [
            ("dev", 0o040_755, (0, 0), Vec::new()),
            ("dev/null", 0o020_666, (1, 3), Vec::new()),
            ("init", 0o100_755, (0, 0), fs::read(agent)?),
            ("case", 0o100_644, (0, 0), case.into()),
            ("TRAILER!!!", 0, (0, 0), Vec::new()),
        ];
        fs::write(&initrd, archive(&entries))?;
        let lines = format!("initrd = {initrd:?}\n");
        fs::write(image.0.join("config.toml"), lines)?;
        Ok(image)
    }

    fn start<'host>(&self, host: &'host Host, case: &str) -> TestResult<CtrContainer<'host>> {
        let config = self.0.join("config.toml").display().to_string();
        let options = ["--runtime-config-path", config.as_str()];
        host.start(case, &options, &["sleep", "1000"])
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Name, mode, device number, content.
type Entry<'a> = (&'a str, u32, (u32, u32), Vec<u8>);

/// A `newc` cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut all = Vec::new();
    let pad = |all: &mut Vec<u8>| all.resize(all.len().next_multiple_of(4), 0);
    for (inode, (name, mode, (major, minor), content)) in (1..).zip(entries) {
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        all.extend(b"070701");
        for field in [
            inode, *mode, 0, 0, 1, 0, size, 0, 0, *major, *minor, name_size, 0,
        ] {
            all.extend(format!("{field:08X}").bytes());
        }
        all.extend(name.bytes());
        all.push(0);
        pad(&mut all);
        all.extend(content);
        pad(&mut all);
    }
    all
}

/// A pod with a hostile agent, whose container runs.
struct Hostile<'host> {
    pod: CtrContainer<'host>,
    shim: Process,
    proxy: Process,
    api: TaskApi,
    _image: Image,
}

impl<'host> Hostile<'host> {
    fn start(host: &'host Host, case: &str) -> TestResult<Self> {
        let image = Image::new(host, case)?;
        let pod = image.start(host, case)?;
        Ok(Self {
            shim: pod.process("shim")?,
            proxy: pod.process("proxy")?,
            api: TaskApi::connect(&host.bundle(pod.id()), SERVICES[1])?,
            pod,
            _image: image,
        })
    }

    /// Makes a call, which is answered within a second. Says whether it was done.
    fn answers<T: Message>(&self, method: &str, request: &impl Message) -> TestResult<bool> {
        let (answer, took) = self.api.call::<T>(method, request, 30 * SECOND)?;
        if let Err(refusal) = &answer {
            let text = &refusal.text;
            let clean = !text.contains(['\n', '\u{202e}', '\u{1b}', '\u{7}']);
            assert!(clean && text.len() < 10_000, "{text:?}");
        }
        match in_time(took, SECOND) {
            true => Ok(answer.is_ok()),
            false => Err(failure(format!("{method} took {took:?}"))),
        }
    }

    /// State and Stats answer, and shim and proxy are small.
    fn stays_well(&self) -> TestResult {
        let id = self.pod.id();
        let state = api::StateRequest {
            id: id.into(),
            ..Default::default()
        };
        assert!(self.answers::<api::StateResponse>("State", &state)?);
        let stats = api::StatsRequest {
            id: id.into(),
            ..Default::default()
        };
        self.answers::<api::StatsResponse>("Stats", &stats)?;
        let kib = self.shim.anonymous_kib()?;
        assert!(kib < MOST_KIB, "the shim has {kib} KiB");
        // It is gone when the pod has ended.
        match self.proxy.anonymous_kib() {
            Ok(kib) => assert!(kib < MOST_KIB, "the proxy has {kib} KiB"),
            Err(error) if self.proxy.is_alive() => return Err(error),
            Err(_) => {}
        }
        Ok(())
    }

    /// A Delete is refused, and a SIGKILL taken.
    fn is_killed(&self) -> TestResult {
        let delete = api::DeleteRequest {
            id: self.pod.id().into(),
            ..Default::default()
        };
        assert!(!self.answers::<api::DeleteResponse>("Delete", &delete)?);
        let kill = api::KillRequest {
            id: self.pod.id().into(),
            signal: 9,
            ..Default::default()
        };
        self.answers::<api::Empty>("Kill", &kill).map(drop)
    }

    /// The pod ends by itself within this time; its task has exited with 137, and can be deleted.
    fn ends_within(self, limit: Duration) -> TestResult {
        let deadline = Patience::new(limit);
        while self.pod.status()?.0 != "STOPPED" {
            self.stays_well()?;
            if deadline.is_over() {
                return Err(failure(format!("it runs after {limit:?}")));
            }
            thread::sleep(SECOND / 2);
        }
        assert_eq!(self.pod.delete()?, 137);
        until("the shim is gone", 10 * SECOND, || !self.shim.is_alive())
    }
}

/// Starts a pod for each case and has the test go on with them: afterwards nothing is left, and the
/// log is no longer than it may be.
fn with_pods(
    cases: &[&str],
    act: impl Fn(&mut Parts, Vec<(&str, Hostile)>) -> TestResult,
) -> TestResult {
    let host = Host::alone()?;
    let (before, logged) = (host.footprint(), host.log().lines().count());
    let mut parts = Parts::new();
    let mut pods = Vec::new();
    for case in cases {
        let pod = parts.run(&format!("start {case}"), || Hostile::start(&host, case));
        pods.extend(pod.map(|pod| (*case, pod)));
    }
    act(&mut parts, pods)?;
    parts.end()?;
    let log = host.log();
    let lines = log.lines().count() - logged;
    assert!(lines < MOST_LINES * cases.len(), "{lines} lines:\n{log}");
    host.leaves_nothing(&before)
}

/// Frames that nobody has asked for, and what is no event, end the pod at once.
#[test]
fn a_flood_ends_the_pod() -> TestResult {
    kata_like_only!();
    for case in [
        "data-300",
        "data-4096",
        "data-65536",
        "second-300",
        "ids-4096",
        "nonsense",
    ] {
        with_pods(&[case], |parts, pods| {
            for (case, pod) in pods {
                parts.run(case, || pod.ends_within(10 * SECOND));
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// SIGKILL is held to: without an answer, with one and no exit, and if the guest knows of no such
/// process. Before it the pod is as well as any, whatever events and texts the guest sends.
#[test]
fn a_guest_that_does_not_die_is_given_up() -> TestResult {
    kata_like_only!();
    let cases = ["strangers", "texts", "silent", "drip", "yes", "denies"];
    with_pods(&cases, |parts, pods| {
        for _ in 0..10 {
            for (case, pod) in &pods {
                parts.run(case, || pod.stays_well());
            }
        }
        for (case, pod) in &pods {
            assert_eq!(pod.pod.status()?.0, "RUNNING", "{case}");
            parts.run(case, || pod.is_killed());
        }
        for (case, pod) in pods {
            parts.run(case, || pod.ends_within(100 * SECOND));
        }
        Ok(())
    })
}
