//! Each of our errors becomes the code that containerd acts on, and each message keeps its numbers.

use containerd_shim_protos::cgroups_v2::metrics as cgroups;

use kata_like_failure::Failure;
use kata_like_proxy::{CPU_KEYS, DeviceIo, EVENT_KEYS, HugePages, MEMORY_KEYS, Stats};
use protobuf::MessageDyn;
use ttrpc::Code;

use super::*;

fn any_of(type_url: &str, value: &[u8]) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value: value.to_vec(),
        ..Any::default()
    }
}

fn code(error: Failure) -> (Code, String) {
    match failure(error) {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

#[test]
fn the_options_of_cri_name_a_configuration() {
    let bytes = b"\x0a\x03k.l\x12\x07/c.toml";
    for type_url in [
        "runtimeoptions.v1.Options",
        "type.googleapis.com/runtimeoptions.v1.Options",
    ] {
        let found = config_path(Some(&any_of(type_url, bytes))).expect(type_url);
        assert_eq!(found, Some(PathBuf::from("/c.toml")));
    }
}

#[test]
fn absent_empty_and_runc_s_options_name_none() {
    let runc = RuncOptions {
        io_uid: 1000,
        ..RuncOptions::default()
    };
    let runc = runc.write_to_bytes().expect("a small message");
    for options in [
        None,
        Some(any_of("", b"")),
        Some(any_of("runtimeoptions.v1.Options", b"")),
        Some(any_of("containerd.runc.v1.Options", &runc)),
    ] {
        assert_eq!(config_path(options.as_ref()).expect("accepted"), None);
    }
}

#[test]
fn other_options_are_refused_by_name() {
    let (code, text) =
        code(config_path(Some(&any_of("io.example.Options", b""))).expect_err("not known"));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("io.example.Options"), "{text}");
}

#[test]
fn options_that_are_cut_or_have_a_body_are_refused() {
    for value in [&b"\x12\x07/c.t"[..], b"\x1a\x05a = 1", b"\xff"] {
        let options = any_of("runtimeoptions.v1.Options", value);
        assert!(config_path(Some(&options)).is_err(), "{value:?}");
    }
}

fn exec_request(json: &[u8], terminal: bool) -> containerd_shim_protos::api::ExecProcessRequest {
    containerd_shim_protos::api::ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        terminal,
        spec: MessageField::some(any_of(PROCESS, json)),
        ..Default::default()
    }
}

#[test]
fn the_request_s_word_on_the_terminal_wins() {
    for terminal in [true, false] {
        let json = br#"{"terminal":true,"args":["a"],"cwd":"/","x":1}"#;
        let exec = exec(exec_request(json, terminal)).expect("a process");
        let process: serde_json::Value = serde_json::from_slice(&exec.process).expect("JSON");
        assert_eq!(process["terminal"], terminal);
        assert_eq!(process["args"][0], "a");
        assert_eq!(process["x"], 1, "what we don't know is passed on");
        assert_eq!(exec.stdio.terminal, terminal);
    }
}

#[test]
fn an_exec_without_a_process_is_refused() {
    for json in [&b""[..], b"[]", b"{\"args\":"] {
        let error = exec(exec_request(json, false)).expect_err("no process");
        assert_eq!(code(error).0, Code::INVALID_ARGUMENT);
    }
    let mut request = exec_request(b"{}", false);
    request.spec = MessageField::none();
    assert!(exec(request).is_err());
}

#[test]
fn no_time_is_the_one_of_go() {
    let none = timestamp_or_none(None);
    assert_eq!((none.seconds, none.nanos), (-62_135_596_800, 0));
    let never_ran = timestamp(Exit::of_nothing().at);
    assert_eq!((never_ran.seconds, never_ran.nanos), (-62_135_596_800, 0));
    let time = SystemTime::UNIX_EPOCH + std::time::Duration::new(5, 7);
    let some = timestamp_or_none(Some(time));
    assert_eq!((some.seconds, some.nanos), (5, 7));
}

#[test]
fn errors_get_the_codes_that_containerd_acts_on() {
    let text = || "x".to_owned();
    for (error, wanted) in [
        (Failure::new(Kind::NotFound, text()), Code::NOT_FOUND),
        (
            Failure::new(Kind::AlreadyExists, text()),
            Code::ALREADY_EXISTS,
        ),
        (
            Failure::new(Kind::WrongState, text()),
            Code::FAILED_PRECONDITION,
        ),
        (Failure::new(Kind::Failed, text()), Code::UNKNOWN),
        (
            // Not UNIMPLEMENTED: containerd would call another version of the service.
            Failure::new(Kind::Unsupported, text()),
            Code::UNKNOWN,
        ),
    ] {
        assert_eq!(code(error), (wanted, text()));
    }
}

#[test]
fn an_error_s_text_is_its_whole_chain_on_one_line() {
    let cause = std::io::Error::other("exec: \"x\": executable file\nnot found in $PATH");
    let error = Failure::failed("create container c", cause);
    assert_eq!(
        code(error).1,
        "create container c: exec: \"x\": executable file not found in $PATH"
    );
}

#[test]
fn an_exec_is_named_beside_its_pid() {
    let named = process(TaskProcess {
        pid: 5,
        exec: "e".into(),
    })
    .expect("a small message");
    assert_eq!(named.info.type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(named.info.value, b"\x0a\x01e");
    let init = process(TaskProcess {
        pid: 4,
        exec: String::new(),
    });
    assert!(init.expect("a small message").info.is_none());
}

#[test]
fn stats_are_those_of_a_cgroup_v2() {
    let file = |entries: &[(&str, u64)]| {
        let entries = entries.iter();
        entries
            .map(|(key, value)| ((*key).into(), *value))
            .collect()
    };
    let any = super::super::stats::any(&Stats {
        cpu_stat: file(&[("usage_usec", 3)]),
        memory_usage: 4,
        pids_current: 5,
        swap_peak: 6,
        memory_stat: file(&[
            ("shmem", 7),
            ("workingset_refault_anon", 8),
            ("workingset_refault_file", u64::MAX),
        ]),
        memory_events: file(&[("max", 9)]),
        io: vec![DeviceIo {
            major: 254,
            minor: 16,
            written_bytes: 10,
            ..Default::default()
        }],
        huge_pages: vec![HugePages {
            size: "2MB".into(),
            current: 11,
            ..Default::default()
        }],
        ..Default::default()
    })
    .expect("a small message");
    assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = cgroups::Metrics::parse_from_bytes(&any.value).expect("our own message");
    assert_eq!(metrics.cpu.usage_usec, 3);
    assert_eq!(metrics.memory.usage, 4);
    assert_eq!(metrics.pids.current, 5);
    assert_eq!(metrics.memory.swap_max_usage, 6);
    assert_eq!(metrics.memory.shmem, 7);
    assert_eq!(metrics.memory.workingset_refault, u64::MAX);
    assert_eq!(metrics.memory_events.max, 9);
    let [device] = metrics.io.usage.as_slice() else {
        panic!("{:?}", metrics.io);
    };
    assert_eq!((device.major, device.minor, device.wbytes), (254, 16, 10));
    let [pages] = metrics.hugetlb.as_slice() else {
        panic!("{:?}", metrics.hugetlb);
    };
    assert_eq!((pages.pagesize.as_str(), pages.current), ("2MB", 11));
}

/// What is taken of the guest's files is what containerd is told: no key is missing, and none is
/// taken for nothing.
#[test]
fn each_key_that_is_taken_is_told() {
    let file = |keys: &[&str]| keys.iter().map(|key| ((*key).to_owned(), 7)).collect();
    let keys = [CPU_KEYS.as_slice(), &MEMORY_KEYS, &EVENT_KEYS];
    let told = |without: &str| {
        let [cpu, memory, events] = keys.map(|keys| {
            let kept = keys.iter().filter(|key| **key != without).copied();
            file(&kept.collect::<Vec<_>>())
        });
        let stats = Stats {
            cpu_stat: cpu,
            memory_stat: memory,
            memory_events: events,
            ..Default::default()
        }
        .bounded();
        let any = super::super::stats::any(&stats).expect("a small message");
        let metrics = cgroups::Metrics::parse_from_bytes(&any.value).expect("our own message");
        let parts: [&dyn MessageDyn; 3] =
            [&*metrics.cpu, &*metrics.memory, &*metrics.memory_events];
        parts.map(|part| part.write_to_bytes_dyn().expect("a small message"))
    };
    let all = told("");
    for key in keys.concat() {
        assert_ne!(told(key), all, "{key} is taken and not told");
    }
    let missing = |message: &dyn MessageDyn| {
        let all = message.descriptor_dyn();
        let missing = all.fields().filter(|field| !field.has_field(message));
        missing.map(|field| field.name().to_owned()).collect()
    };
    let cpu = cgroups::CPUStat::parse_from_bytes(&all[0]).expect("our own message");
    let memory = cgroups::MemoryStat::parse_from_bytes(&all[1]).expect("our own message");
    let events = cgroups::MemoryEvents::parse_from_bytes(&all[2]).expect("our own message");
    let none: [Vec<String>; 3] = [missing(&cpu), missing(&memory), missing(&events)];
    // What is in other files, or is not told.
    let cpu = ["psi", "nr_bursts", "burst_usec"];
    let usage = ["usage", "usage_limit", "swap_usage", "swap_limit"];
    let peaks = ["max_usage", "swap_max_usage", "psi"];
    let wanted = [cpu.as_slice(), &usage, &peaks].concat();
    assert_eq!(none.concat(), wanted);
}

#[test]
fn an_update_s_limits_are_those_of_linux() {
    let request = |type_url: &str| containerd_shim_protos::api::UpdateTaskRequest {
        id: "c".into(),
        resources: MessageField::some(any_of(type_url, b"{}")),
        ..Default::default()
    };
    assert_eq!(resources(request(RESOURCES)).expect("limits"), b"{}");
    let windows = RESOURCES.replace("Linux", "Windows");
    let (code, text) = code(resources(request(&windows)).expect_err("not of Linux"));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("WindowsResources"), "{text}");
}
