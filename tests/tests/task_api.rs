//! The shim as containerd calls it: the binary's verbs and the task API, in both versions, directly.
//!
//! What `ctr` can't ask: methods that are not there yet, unknown ids, containerd 2.3's bootstrap,
//! `-info`, a `delete` that meets a living pod.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use kata_like_tests::host::NAMESPACE;
use kata_like_tests::process::{Process, until};
use kata_like_tests::task_api::{Refusal, SERVICES, TaskApi};
use kata_like_tests::{Call, Host, TestResult, failure, kata_like_only};

const SECOND: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(10);

fn shim() -> PathBuf {
    let prefix = std::env::var("KATA_LIKE_PREFIX").unwrap_or_else(|_| "/run/installed".into());
    PathBuf::from(prefix).join("bin/containerd-shim-kata-like-v2")
}

/// The binary with the flags that containerd gives it.
fn verb(host: &Host, id: &str, bundle: &Path, verb: &str) -> Command {
    let mut command = Command::new(shim());
    command
        .args(["-namespace", NAMESPACE, "-address"])
        .arg(host.address())
        .args(["-publish-binary", "containerd", "-id", id])
        .current_dir(bundle);
    if verb == "delete" {
        command.arg("-bundle").arg(bundle);
    }
    command.arg(verb);
    command
}

/// One binary serves containerd 1.7 and 2.x: both services answer, and alike.
#[test]
fn both_versions_answer_alike() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod = host.start("versions", &[], &["sleep", "1000"])?;
    let (_, pid) = pod.status()?;
    let pid = u32::try_from(pid)?;
    let id = pod.id().to_owned();
    for service in SERVICES {
        let api = TaskApi::connect(&host.bundle(&id), service)?;
        let request = api::StateRequest {
            id: id.clone(),
            ..Default::default()
        };
        let state: api::StateResponse = answered(api.call("State", &request, DEADLINE)?.0)?;
        assert_eq!(
            (state.pid, state.status),
            (pid, api::Status::RUNNING.into())
        );
        let request = api::ConnectRequest {
            id: id.clone(),
            ..Default::default()
        };
        let connected: api::ConnectResponse = answered(api.call("Connect", &request, DEADLINE)?.0)?;
        assert_eq!(connected.task_pid, pid);
        assert!(Process::find(i32::try_from(connected.shim_pid)?).is_some());
        let request = api::PidsRequest {
            id: id.clone(),
            ..Default::default()
        };
        let pids: api::PidsResponse = answered(api.call("Pids", &request, DEADLINE)?.0)?;
        assert!(
            pids.processes.iter().any(|process| process.pid == pid),
            "{pids:?}"
        );
        let request = api::StatsRequest {
            id: id.clone(),
            ..Default::default()
        };
        let stats: api::StatsResponse = answered(api.call("Stats", &request, DEADLINE)?.0)?;
        assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    }
    pod.remove()
}

/// What can't be done says so in words, with the code that containerd understands.
#[test]
fn what_cannot_be_done_is_said() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod = host.start("methods", &[], &["sleep", "1000"])?;
    let id = pod.id().to_owned();
    let api = TaskApi::connect(&host.bundle(&id), SERVICES[1])?;
    let checkpoint = api::CheckpointTaskRequest {
        id: id.clone(),
        ..Default::default()
    };
    let refusal = refused(
        api.call::<api::Empty>("Checkpoint", &checkpoint, DEADLINE)?
            .0,
    )?;
    assert_eq!(refusal.code, Code::UNIMPLEMENTED, "{refusal:?}");
    assert!(refusal.text.contains("not supported"), "{refusal:?}");
    // Nobody is there by that id: a code of its own, which callers take for success.
    let request = api::StateRequest {
        id: "nobody".into(),
        ..Default::default()
    };
    let refusal = refused(
        api.call::<api::StateResponse>("State", &request, DEADLINE)?
            .0,
    )?;
    assert_eq!(refusal.code, Code::NOT_FOUND, "{refusal:?}");
    let request = api::KillRequest {
        id: id.clone(),
        exec_id: "none".into(),
        signal: 9,
        ..Default::default()
    };
    let refusal = refused(api.call::<api::Empty>("Kill", &request, DEADLINE)?.0)?;
    assert_eq!(refusal.code, Code::NOT_FOUND, "{refusal:?}");
    // A running task is neither started nor deleted again, and ends no shim.
    let request = api::StartRequest {
        id: id.clone(),
        ..Default::default()
    };
    refused(
        api.call::<api::StartResponse>("Start", &request, DEADLINE)?
            .0,
    )?;
    let request = api::DeleteRequest {
        id: id.clone(),
        ..Default::default()
    };
    refused(
        api.call::<api::DeleteResponse>("Delete", &request, DEADLINE)?
            .0,
    )?;
    let request = api::ShutdownRequest {
        id: id.clone(),
        ..Default::default()
    };
    let _: api::Empty = answered(api.call("Shutdown", &request, DEADLINE)?.0)?;
    assert_eq!(pod.status()?.0, "RUNNING");
    pod.remove()
}

/// Wait may come before the end, from many, and after it.
#[test]
fn wait_answers_all_who_wait() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod = host.start("waited", &[], &["sleep", "1000"])?;
    let api = TaskApi::connect(&host.bundle(pod.id()), SERVICES[1])?;
    let request = api::WaitRequest {
        id: pod.id().into(),
        ..Default::default()
    };
    std::thread::scope(|scope| -> TestResult {
        let waits: Vec<_> = (0..3)
            .map(|_| {
                let bundle = host.bundle(pod.id());
                let request = &request;
                scope.spawn(move || -> TestResult<u32> {
                    let api = TaskApi::connect(&bundle, SERVICES[1])?;
                    let wait: api::WaitResponse =
                        answered(api.call("Wait", request, 60 * SECOND)?.0)?;
                    Ok(wait.exit_status)
                })
            })
            .collect();
        std::thread::sleep(SECOND);
        pod.kill("KILL")?;
        for wait in waits {
            assert_eq!(wait.join().map_err(|_| failure("a wait panicked"))??, 137);
        }
        Ok(())
    })?;
    let wait: api::WaitResponse = answered(api.call("Wait", &request, SECOND)?.0)?;
    assert_eq!(wait.exit_status, 137);
    assert!(wait.exited_at.seconds > 1_600_000_000, "{wait:?}");
    pod.delete().map(drop)
}

/// containerd calls `delete` after each container of a pod: the VM of a living pod is not touched.
#[test]
fn delete_of_another_id_leaves_the_pod_alone() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let pod = host.start("alive", &[], &["sleep", "1000"])?;
    let other = PathBuf::from(format!("/run/{}", host.name("bundle")));
    fs::create_dir(&other)?;
    let id = host.name("other");
    let output = Call::new(verb(&host, &id, &other, "delete"))
        .deadline(DEADLINE)
        .ok()?;
    let answer = api::DeleteResponse::parse_from_bytes(&output.stdout)?;
    assert_eq!(answer.exit_status, 137, "{answer:?}");
    assert_eq!(pod.status()?.0, "RUNNING");
    assert_eq!(pod.exec(&["echo", "alive"])?.text(), "alive");
    fs::remove_dir(&other)?;
    pod.remove()
}

/// `-info` needs no KVM, no configuration, and makes nothing.
#[test]
fn info_tells_name_and_version() -> TestResult {
    kata_like_only!();
    let mut command = Command::new(shim());
    command.arg("-info");
    let output = Call::new(command).deadline(DEADLINE).ok()?;
    let info = RuntimeInfo::parse_from_bytes(&output.stdout)?;
    assert_eq!(info.name, "io.containerd.kata-like.v2");
    assert!(!info.version.version.is_empty());
    Ok(())
}

/// containerd 2.3 sends BootstrapParams and reads BootstrapResult; an address alone is for the others.
#[test]
fn start_speaks_each_containerds_dialect() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    for (dialect, version) in [("2.1", 0), ("2.3", 3)] {
        let id = host.name("dialect");
        let bundle = PathBuf::from(format!("/run/{id}"));
        fs::create_dir(&bundle)?;
        let spec = format!(
            r#"{{"ociVersion":"1.1.0","process":{{"user":{{"uid":0,"gid":0}},"args":["true"],"cwd":"/"}},"root":{{"path":"rootfs"}},"linux":{{"cgroupsPath":"/{NAMESPACE}/{id}","namespaces":[{{"type":"network"}},{{"type":"mount"}}]}}}}"#
        );
        fs::write(bundle.join("config.json"), spec)?;
        let socket = host.address().display().to_string();
        let params = BootstrapParams {
            instance_id: id.clone(),
            namespace: NAMESPACE.into(),
            containerd_version: "2.3.0".into(),
            containerd_ttrpc_address: format!("{socket}.ttrpc"),
            containerd_grpc_address: socket.clone(),
            containerd_binary: "containerd".into(),
            ..Default::default()
        };
        let mut command = verb(&host, &id, &bundle, "start");
        command.env("TTRPC_ADDRESS", format!("{socket}.ttrpc"));
        let input = if version == 3 {
            params.write_to_bytes()?
        } else {
            Vec::new()
        };
        let output = Call::new(command).input(input).deadline(DEADLINE).ok()?;
        assert_eq!(output.error_text(), "", "{dialect}");
        let address = if version == 3 {
            let result = BootstrapResult::parse_from_bytes(&output.stdout)?;
            assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
            result.address
        } else {
            output.text()
        };
        assert!(address.starts_with("unix:///"), "{dialect}: {address:?}");
        assert_eq!(
            fs::read_to_string(bundle.join("address"))?,
            address,
            "{dialect}"
        );
        let api = TaskApi::connect(&bundle, SERVICES[1])?;
        let request = api::ConnectRequest {
            id: id.clone(),
            ..Default::default()
        };
        let connected: api::ConnectResponse = answered(api.call("Connect", &request, DEADLINE)?.0)?;
        let request = api::ShutdownRequest {
            id: id.clone(),
            ..Default::default()
        };
        let _: api::Empty = answered(api.call("Shutdown", &request, DEADLINE)?.0)?;
        let pid = i32::try_from(connected.shim_pid)?;
        until("the shim ends after Shutdown", DEADLINE, || {
            Process::find(pid).is_none()
        })?;
        Call::new(verb(&host, &id, &bundle, "delete"))
            .deadline(DEADLINE)
            .ok()?;
        fs::remove_dir_all(&bundle)?;
    }
    host.leaves_nothing(&before)
}

fn answered<T>(answer: Result<T, Refusal>) -> TestResult<T> {
    answer.map_err(|refusal| failure(format!("{refusal:?}")))
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Refusal>) -> TestResult<Refusal> {
    match answer {
        Ok(answer) => Err(failure(format!("it was done: {answer:?}"))),
        Err(refusal) => Ok(refusal),
    }
}
