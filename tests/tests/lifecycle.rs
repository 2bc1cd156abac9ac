//! A container's life under a real containerd 2.1, as a user of `ctr` sees it.
//!
//! Everything except what concerns the VM also runs against runc, the oracle. `run-tests` runs this
//! in the test host; `streams` tests what moves through pipes, `faults.rs` what dies.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::pty::OnTerminal;
use kata_like_tests::{Host, Parts, TestResult, failure, figures, is_oracle, kata_like_only};

const SECOND: Duration = Duration::from_secs(1);

/// The first thing anybody tries: the guest's kernel answers, not the host's.
#[test]
fn hello_from_another_kernel() -> TestResult {
    let host = Host::shared()?;
    let output = host.run(&host.name("hello"), &[], &["uname", "-r"]).ok()?;
    assert_eq!(output.error_text(), "");
    let hosts = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    if is_oracle() {
        assert_eq!(output.text(), hosts.trim());
    } else {
        assert_ne!(output.text(), hosts.trim());
        assert!(output.text().starts_with("6.12."), "{}", output.text());
    }
    Ok(())
}

#[test]
fn exit_codes_are_the_commands() -> TestResult {
    let host = Host::shared()?;
    let output = host
        .run(&host.name("exits"), &[], &["sh", "-c", "exit 7"])
        .output()?;
    assert_eq!(output.status, 7, "{}", output.both());
    Ok(())
}

/// SIGTERM goes once, to the named process; SIGKILL ends the container. Each gives 128 + signal.
#[test]
fn signals_end_what_they_are_sent_to() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let mut parts = Parts::new();
    parts.run("SIGTERM", || {
        let script = "trap 'echo told; exit 21' TERM; (trap 'echo child' TERM; sleep 1000) & wait";
        let trapping = host.start("trapping", &[], &["sh", "-c", script])?;
        let exec = host.name("exec");
        let sleeper = host.ctr([
            "task",
            "exec",
            "--exec-id",
            &exec,
            trapping.id(),
            "sleep",
            "1000",
        ]);
        let waiting = thread::spawn(move || sleeper.output());
        events.wait("start of the exec", 60 * SECOND, |event| {
            event.topic == "/tasks/exec-started" && event.process() == exec
        })?;
        host.ctr([
            "task",
            "kill",
            "--exec-id",
            &exec,
            "--signal",
            "TERM",
            trapping.id(),
        ])
        .ok()?;
        let ended = waiting
            .join()
            .map_err(|_| failure("the exec's thread panicked"))??;
        assert_eq!(ended.status, 143, "{}", ended.both());
        assert_eq!(trapping.status()?.0, "RUNNING");

        assert_eq!(trapping.kill("TERM")?.status, 0);
        assert_eq!(
            events
                .exit(trapping.id(), trapping.id(), 10 * SECOND)?
                .status(),
            21
        );
        assert_eq!(trapping.delete()?, 21);
        Ok(())
    });
    parts.run("SIGKILL", || {
        let sleeping = host.start("sleeping", &[], &["sleep", "1000"])?;
        assert_eq!(sleeping.kill("KILL")?.status, 0);
        assert_eq!(
            events
                .exit(sleeping.id(), sleeping.id(), 10 * SECOND)?
                .status(),
            137
        );
        // To kill an ended process is no failure: at most the answer says that there is none.
        let again = sleeping.kill("KILL")?;
        assert!(
            again.status == 0 || again.error_text().contains("process already finished"),
            "{}",
            again.both()
        );
        assert_eq!(sleeping.delete()?, 137);
        Ok(())
    });
    parts.end()
}

#[test]
fn environment_arguments_directory_and_user_arrive() -> TestResult {
    let host = Host::shared()?;
    let script = r#"echo "$GREETING"; pwd; id -u; id -g; id -G; for a; do echo "[$a]"; done"#;
    let options = ["--env", "GREETING=a b  c", "--cwd", "/tmp", "--user", "app"];
    let command = ["sh", "-c", script, "sh", "one", "", "two words", "$HOME"];
    let output = host.run(&host.name("arrive"), &options, &command).ok()?;
    assert_eq!(
        output.text(),
        "a b  c\n/tmp\n1000\n1000\n1000 900\n[one]\n[]\n[two words]\n[$HOME]"
    );
    Ok(())
}

#[test]
fn a_terminal_has_the_size_of_the_users() -> TestResult {
    let host = Host::shared()?;
    let id = host.name("terminal");
    let script = "tty; while read -r word; do [ \"$word\" = quit ] && exit 5; stty size; done";
    let mut command = host.ctr_command();
    command.args([
        "run",
        "--rm",
        "--runtime",
        &kata_like_tests::runtime(),
        "--tty",
    ]);
    command.args([kata_like_tests::IMAGE, &id, "sh", "-c", script]);
    let mut terminal = OnTerminal::start(command, 91, 33)?;
    terminal.expect("/dev/", 60 * SECOND)?;
    ask_size(&mut terminal, "33 91")?;
    terminal.resize(122, 44)?;
    ask_size(&mut terminal, "44 122")?;
    terminal.write("quit\n")?;
    assert_eq!(terminal.finish(30 * SECOND)?, 5);
    Ok(())
}

/// The container gets the size a moment after ctr was told: ask until it is there.
fn ask_size(terminal: &mut OnTerminal, wanted: &str) -> TestResult {
    for _ in 0..20 {
        terminal.write("size\n")?;
        if terminal.expect(wanted, SECOND / 2).is_ok() {
            return Ok(());
        }
    }
    terminal.expect(wanted, SECOND)
}

/// An exec has exit codes and streams of its own while the main process runs, and no more rights.
#[test]
fn an_exec_runs_beside_the_main_process() -> TestResult {
    let host = Host::shared()?;
    let options = [
        "--seccomp",
        "--cap-drop",
        "CAP_CHOWN",
        "--user",
        "app",
        "--env",
        "KEPT=yes",
    ];
    let pod = host.start("beside", &options, &["sleep", "1000"])?;

    let mut parts = Parts::new();
    parts.run("its code and streams", || {
        let output = pod.exec(&["sh", "-c", "echo out; echo err >&2; exit 9"])?;
        assert_eq!(
            (output.status, output.text(), output.error_text()),
            (9, "out".into(), "err".into())
        );
        Ok(())
    });
    parts.run("its rights", || {
        let rights = "grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp):' /proc/";
        let script = format!("{rights}1/status; echo; {rights}self/status; echo $KEPT; pwd");
        let output = pod.exec(&["sh", "-c", &script])?;
        let text = output.text();
        let (inits, execs) = text
            .split_once("\n\n")
            .ok_or_else(|| failure(output.both()))?;
        assert_eq!(format!("{inits}\nyes\n/"), execs);
        assert!(inits.contains("Seccomp:\t2"), "no filter: {inits}");
        assert!(inits.contains("NoNewPrivs:\t1"), "{inits}");
        Ok(())
    });
    parts.run("its directory and user", || {
        let output = pod
            .exec_call(
                &["--cwd", "/tmp", "--user", "1:1"],
                &["sh", "-c", "pwd; id -u"],
            )
            .ok()?;
        assert_eq!(output.text(), "/tmp\n1");
        Ok(())
    });
    parts.run("the container's end", || {
        assert_eq!(pod.status()?.0, "RUNNING");
        pod.remove()
    });
    parts.end()
}

/// A command that can't run fails at once, in runc's words, and leaves nothing: as the main
/// process, and as an exec, after which the next exec works.
#[test]
fn a_missing_command_fails_in_runcs_words() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let cases = [
        ("nope", "exec: \"nope\": executable file not found in $PATH"),
        (
            "/bin/nope",
            "exec: \"/bin/nope\": stat /bin/nope: no such file or directory",
        ),
        (
            "/etc/not-executable",
            "exec: \"/etc/not-executable\": permission denied",
        ),
    ];
    let mut parts = Parts::new();
    for (command, words) in cases {
        parts.run(command, || {
            let output = host.run(&host.name("missing"), &[], &[command]).output()?;
            assert_eq!(output.status, 1, "{command}: {}", output.both());
            assert!(
                output.error_text().contains(words),
                "{command}: {}",
                output.both()
            );
            assert_eq!(
                output.error_text().lines().count(),
                1,
                "{command}: {}",
                output.both()
            );
            Ok(())
        });
    }
    parts.run("what they leave", || host.leaves_nothing(&before));
    let pod = host.start("missing", &[], &["sleep", "1000"])?;
    for (command, words) in cases {
        parts.run(&format!("{command} as an exec"), || {
            let output = pod.exec(&[command])?;
            assert_eq!(output.status, 1, "{command}: {}", output.both());
            assert!(
                output.error_text().contains(words),
                "{command}: {}",
                output.both()
            );
            assert_eq!(pod.exec(&["echo", "works"])?.text(), "works");
            Ok(())
        });
    }
    parts.run("the end", || {
        pod.remove()?;
        host.leaves_nothing(&before)
    });
    parts.end()
}

#[test]
fn detach_and_attach() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let script = "while read -r line; do echo got $line; done; exit 4";
    let pod = host.start("detached", &[], &["sh", "-c", script])?;
    // Attach's own end does not end the container's input; the container's end ends attach.
    let attach = host.ctr(["task", "attach", pod.id()]).input("one\ntwo\n");
    let attached = thread::spawn(move || attach.output());
    thread::sleep(3 * SECOND);
    assert_eq!(pod.status()?.0, "RUNNING");
    assert_eq!(pod.kill("KILL")?.status, 0);
    let output = attached
        .join()
        .map_err(|_| failure("the thread of attach panicked"))??;
    assert_eq!(
        (output.status, output.text()),
        (137, "got one\ngot two".into())
    );
    // attach deletes the task, as `ctr run` in the foreground does.
    let id = pod.id().to_owned();
    events.wait("deletion", 10 * SECOND, |event| {
        event.topic == "/tasks/delete" && event.container() == id
    })?;
    assert!(!host.ctr(["task", "ls"]).ok()?.text().contains(&id));
    pod.remove_container()
}

#[test]
fn list_processes_kill_and_delete() -> TestResult {
    let host = Host::shared()?;
    let pod = host.start("listed", &[], &["sh", "-c", "sleep 1000 & wait"])?;
    let (status, pid) = pod.status()?;
    assert_eq!(status, "RUNNING");
    // Clients look at the task's pid: it has a network namespace of its own, and the task's cgroup.
    let namespace = fs::read_link(format!("/proc/{pid}/ns/net"))?;
    assert_ne!(namespace, fs::read_link("/proc/self/ns/net")?);
    let group = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    assert!(group.contains(pod.id()), "{group}");
    let list = host.ctr(["task", "ps", pod.id()]).ok()?.text();
    assert!(list.contains(&pid.to_string()), "{list}");
    let metrics = host
        .ctr(["task", "metrics", "--format", "json", pod.id()])
        .ok()?
        .text();
    assert!(metrics.contains("usage"), "{metrics}");
    // A running task can't be deleted.
    let refused = host.ctr(["task", "rm", pod.id()]).output()?;
    assert_ne!(refused.status, 0, "{}", refused.both());
    assert_eq!(pod.kill("KILL")?.status, 0);
    pod.wait_status("STOPPED", 5 * SECOND)?;
    let id = pod.id().to_owned();
    assert_eq!(pod.delete()?, 137);
    assert!(!host.ctr(["task", "ls"]).ok()?.text().contains(&id));
    Ok(())
}

/// containerd's clients rely on this order: the OOM is told before the exit that it caused, an
/// exec's exit before the init's. Only the process that takes too much memory is killed.
#[test]
fn events_come_in_containerds_order() -> TestResult {
    let host = Host::shared()?;
    let events = host.events()?;
    let limit = ["--memory-limit", "67108864"];
    let pod = host.start("events", &limit, &["sleep", "1000"])?;
    let id = pod.id().to_owned();
    let hog = host.name("hog");
    let exec = |exec: &str, command: &[&str]| {
        let mut arguments = vec!["task", "exec", "--exec-id", exec, &id];
        arguments.extend(command);
        host.ctr(arguments)
    };
    let output = exec(&hog, &["tail", "/dev/zero"]).output()?;
    assert_eq!(output.status, 137, "{}", output.both());
    if !is_oracle() {
        let words =
            "its limit linux.resources.memory.limit is 64 MiB; the pod's virtual machine has";
        assert!(host.log().contains(words), "no {words:?} in the log");
    }
    host.ctr(["task", "pause", &id]).ok()?;
    host.ctr(["task", "resume", &id]).ok()?;
    let sleeper = host.name("exec");
    let call = exec(&sleeper, &["sleep", "1000"]);
    let waiting = thread::spawn(move || call.output());
    events.wait("start of the exec", 60 * SECOND, |event| {
        event.topic == "/tasks/exec-started" && event.process() == sleeper
    })?;
    pod.kill("KILL")?;
    events.exit(&id, &id, 10 * SECOND)?;
    let _ = waiting.join();
    pod.delete()?;
    events.wait("deletion", 10 * SECOND, |event| {
        event.topic == "/tasks/delete" && event.container() == id
    })?;
    let seen: Vec<_> = events
        .of(&id)
        .iter()
        .filter(|event| event.topic.starts_with("/tasks"))
        // runc's shim sends it on another way, and so at any time.
        .filter(|event| !is_oracle() || event.topic != "/tasks/oom")
        .map(|event| (event.topic.clone(), event.process().to_owned()))
        .collect();
    let wanted = [
        ("create", ""),
        ("start", ""),
        ("exec-added", &hog),
        ("exec-started", &hog),
        ("oom", ""),
        ("exit", &hog),
        ("paused", ""),
        ("resumed", ""),
        ("exec-added", &sleeper),
        ("exec-started", &sleeper),
        ("exit", &sleeper),
        ("exit", &id),
        ("delete", ""),
    ];
    let wanted: Vec<_> = wanted
        .into_iter()
        .filter(|(topic, _)| !is_oracle() || *topic != "oom")
        .map(|(topic, process)| (format!("/tasks/{topic}"), process.to_owned()))
        .collect();
    // A deletion tells the init's id, too.
    let plain = |(topic, process): (String, String)| match topic.as_str() {
        "/tasks/delete" => (topic, String::new()),
        _ => (topic, process),
    };
    let seen: Vec<_> = seen.into_iter().map(plain).collect();
    assert_eq!(seen, wanted);
    Ok(())
}

#[test]
fn ten_at_once_all_run() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let started = Instant::now();
    thread::scope(|scope| {
        let runs: Vec<_> = (0..10)
            .map(|number| {
                let host = &host;
                scope.spawn(move || {
                    let word = format!("number {number}");
                    let call = host.run(&host.name("ten"), &[], &["echo", &word]);
                    let output = call.deadline(300 * SECOND).ok()?;
                    assert_eq!(output.text(), word);
                    TestResult::Ok(())
                })
            })
            .collect();
        runs.into_iter()
            .try_for_each(|run| run.join().map_err(|_| failure("a run panicked"))?)
    })?;
    figures::note(&format!(
        "ten at once: {:.1} s",
        started.elapsed().as_secs_f32()
    ));
    host.leaves_nothing(&before)
}

#[test]
fn twenty_in_sequence_leave_the_host_as_it_was() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let started = Instant::now();
    for _ in 0..20 {
        host.run(&host.name("twenty"), &[], &["true"]).ok()?;
    }
    figures::note(&format!(
        "twenty in sequence: {:.1} s",
        started.elapsed().as_secs_f32()
    ));
    host.leaves_nothing(&before)
}

/// The guest's clock is the host's, and its memory and CPUs are there from the first instruction.
#[test]
fn the_guest_has_what_was_promised() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let script = "date +%s; grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo";
    let config = "/run/promised.toml";
    std::fs::write(config, "max_vcpus = 2\n")?;
    let options = ["--runtime-config-path", config];
    let clock_now = || -> TestResult<u64> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        Ok(since.as_secs())
    };
    let before = clock_now()?;
    let output = host
        .run(&host.name("promised"), &options, &["sh", "-c", script])
        .ok()?;
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    let [clock, cpus, memory] = lines[..] else {
        return Err(failure(output.both()));
    };
    let (clock, after): (u64, u64) = (clock.parse()?, clock_now()?);
    assert!(
        (before - 1..=after + 1).contains(&clock),
        "guest {clock}, host {before} to {after}"
    );
    assert_eq!(cpus, "2");
    let kib: u64 = memory
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .parse()?;
    assert!((1_900_000..=2_097_152).contains(&kib), "{memory}");
    Ok(())
}
