//! Every kind of end that a stream can have, and its effect on the process: cases of one pod.
//!
//! The streams are requested as containerd's clients do it, but only by the task API.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, Empty, KillRequest, Status};
use kata_like_tests::fifo::Fifo;
use kata_like_tests::host::NAMESPACE;
use kata_like_tests::process::until;
use kata_like_tests::shim_pod::{Case, ShimPod};
use kata_like_tests::task::{KILL, Streams};
use kata_like_tests::task_api::{done, refused};
use kata_like_tests::{TestResult, failure, in_time, is_oracle};
use serde_json::json;

/// All of them.
pub const CASES: [Case; 8] = [
    ("nothing", nowhere),
    ("plain files", plain_files),
    ("file://", file_uri),
    ("binary:// with a terminal", logger_of_a_terminal),
    ("an input that comes and goes", input_comes_and_goes),
    ("a reader that leaves", reader_leaves),
    ("a reader that stalls", reader_stalls),
    ("the end of a terminal", hang_up),
];

const SECOND: Duration = Duration::from_secs(1);
/// For steps that take milliseconds on a quiet host.
const SOON: Duration = Duration::from_secs(30);

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| format!("{}: {error}", path.display()))
}

fn nowhere(pod: &ShimPod) -> TestResult {
    let task = pod.task("silent");
    let spec = pod.spec(&["sh", "-c", "cat; echo out; echo err >&2; exit 8"]);
    done(task.create(&spec, &Streams::default())?)?;
    done(task.start("")?)?;
    assert_eq!(done(task.wait("")?)?, 8);
    done(task.delete("")?).map(drop)
}

/// Output is appended; an input that is a file has an end.
fn plain_files(pod: &ShimPod) -> TestResult {
    let folder = pod.files().join("plain");
    fs::create_dir(&folder)?;
    for (name, content) in [("in", "one\ntwo\n"), ("out", "before\n"), ("err", "")] {
        fs::write(folder.join(name), content)?;
    }
    let path = |name: &str| folder.join(name).display().to_string();
    let streams = Streams {
        stdin: path("in"),
        stdout: path("out"),
        stderr: path("err"),
        terminal: false,
    };
    let task = pod.task("files");
    let script = "while read -r line; do echo got $line; echo err $line >&2; done; exit 9";
    done(task.create(&pod.spec(&["sh", "-c", script]), &streams)?)?;
    done(task.start("")?)?;
    if is_oracle() {
        // runc's shim keeps an end of any input open until it is told.
        done(task.close_stdin("")?)?;
    }
    assert_eq!(done(task.wait("")?)?, 9);
    done(task.delete("")?)?;
    assert_eq!(text(&folder.join("out")), "before\ngot one\ngot two\n");
    assert_eq!(text(&folder.join("err")), "err one\nerr two\n");
    Ok(())
}

/// The path is percent-encoded, its folder is made, and both streams go there. What is no path is
/// refused.
fn file_uri(pod: &ShimPod) -> TestResult {
    let task = pod.run("uri", &["sleep", "1000"])?;
    let folder = pod.files().join("a folder/100% #1");
    let base = pod.files().display();
    let uri = format!("file://{base}/a%20folder/100%25%20%231/l%C3%B6g?key=value");
    let streams = Streams {
        stdout: uri.clone(),
        stderr: uri,
        ..Streams::default()
    };
    let command = ["sh", "-c", "echo out; sleep 0.2; echo err >&2"];
    for _ in 0..2 {
        assert_eq!(task.run_with(&command, &streams)?, 0);
    }
    let log = folder.join("lög");
    let mut lines: Vec<String> = text(&log).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["err", "err", "out", "out"]);
    assert_eq!(fs::metadata(&log)?.permissions().mode() & 0o777, 0o644);
    for bad in ["file:///100%", "file:///%zz"] {
        let streams = Streams {
            stdout: bad.into(),
            stderr: bad.into(),
            ..Streams::default()
        };
        done(task.exec("bad", &json!({"args": command}), &streams)?)?;
        let refusal = refused(task.start("bad")?)?;
        assert!(refusal.text.contains(bad), "{refusal:?}");
        done(task.delete("bad")?)?;
    }
    task.end()
}

/// The logging program gets what the terminal shows.
fn logger_of_a_terminal(pod: &ShimPod) -> TestResult {
    let folder = pod.files().join("logger");
    fs::create_dir(&folder)?;
    let (program, here) = (folder.join("logger"), folder.display());
    let script = format!(
        "#!/bin/sh\necho \"$* $CONTAINER_ID $CONTAINER_NAMESPACE\" >{here}/told\nexec 5>&-\n\
         cat <&3 >{here}/shown\ntouch {here}/ended\n"
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let streams = Streams {
        stdout: format!("binary://{}?--name=a%20b", program.display()),
        terminal: true,
        ..Streams::default()
    };
    let task = pod.task("logged");
    let spec = pod.spec(&["sh", "-c", "tty; echo err >&2; exit 3"]);
    done(task.create(&spec, &streams)?)?;
    done(task.start("")?)?;
    assert_eq!(done(task.wait("")?)?, 3);
    done(task.delete("")?)?;
    until("the logger's end", SOON, || folder.join("ended").exists())?;
    let shown = text(&folder.join("shown")).replace('\r', "");
    assert!(
        shown.starts_with("/dev/") && shown.ends_with("\nerr\n"),
        "{shown:?}"
    );
    let told = format!("--name a b {} {NAMESPACE}\n", task.id());
    assert_eq!(text(&folder.join("told")), told);
    Ok(())
}

/// A client that leaves does not end the input. After `CloseIO` the last one does, and nothing is
/// lost.
fn input_comes_and_goes(pod: &ShimPod) -> TestResult {
    let folder = pod.files();
    let (input, output) = (Fifo::new(folder, "in")?, Fifo::new(folder, "out")?);
    let mut reader = output.reader()?;
    let streams = Streams {
        stdin: input.path(),
        stdout: output.path(),
        stderr: output.path(),
        terminal: false,
    };
    let task = pod.task("reads");
    done(task.create(&pod.spec(&["cat"]), &streams)?)?;
    done(task.start("")?)?;
    drop(input.write("one\n")?);
    reader.expect("one\n", SOON)?;
    let client = input.write("two\n")?;
    done(task.close_stdin("")?)?;
    reader.expect("two\n", SOON)?;
    assert_eq!(task.status("")?, Status::RUNNING);
    drop(client);
    assert_eq!(done(task.wait("")?)?, 0);
    reader.to_end(SOON)?;
    assert_eq!(reader.text(), "one\ntwo\n");
    done(task.delete("")?).map(drop)
}

/// A reader that comes back reads on where the last one stopped. The process notices nothing.
fn reader_leaves(pod: &ShimPod) -> TestResult {
    let output = Fifo::new(pod.files(), "left")?;
    let mut first = output.reader()?;
    let streams = Streams {
        stdout: output.path(),
        stderr: output.path(),
        ..Streams::default()
    };
    let task = pod.task("counts");
    let script = "i=0; while [ $i -lt 25 ]; do echo $i; i=$((i+1)); sleep 0.05; done";
    done(task.create(&pod.spec(&["sh", "-c", script]), &streams)?)?;
    done(task.start("")?)?;
    first.expect("3\n", SOON)?;
    let mut all = first.text();
    drop(first);
    thread::sleep(SECOND);
    assert_eq!(task.status("")?, Status::RUNNING);
    let mut second = output.reader()?;
    assert_eq!(done(task.wait("")?)?, 0);
    second.to_end(SOON)?;
    all.push_str(&second.text());
    let wanted: String = (0..25).map(|number| format!("{number}\n")).collect();
    assert_eq!(all, wanted);
    done(task.delete("")?).map(drop)
}

/// Output without a reader stalls its writer and nothing else: no memory grows, no call or other
/// process waits.
fn reader_stalls(pod: &ShimPod) -> TestResult {
    let output = Fifo::new(pod.files(), "stalled")?;
    let mut reader = output.reader()?;
    let streams = Streams {
        stdout: output.path(),
        stderr: output.path(),
        ..Streams::default()
    };
    let shim = pod.first().process("shim")?;
    let task = pod.task("endless");
    done(task.create(&pod.spec(&["yes"]), &streams)?)?;
    done(task.start("")?)?;
    reader.at_least(1 << 20, SOON)?;
    let before = shim.anonymous_kib()?;
    thread::sleep(SECOND);
    // Two seconds of `yes` are hundreds of megabytes.
    let grown = shim.anonymous_kib()?.saturating_sub(before);
    assert!(grown < 4096, "the shim has grown by {grown} KiB");
    assert_eq!(task.run(&["true"])?, 0);

    let (api, id) = (pod.connect()?, task.id().to_owned());
    let kill = KillRequest {
        id: id.clone(),
        signal: KILL,
        ..Default::default()
    };
    let (killed, took) = api.call::<Empty>("Kill", &kill, SOON)?;
    done(killed)?;
    assert!(in_time(took, SECOND), "Kill took {took:?}");
    assert_eq!(done(task.wait("")?)?, 137);
    let delete = DeleteRequest {
        id,
        ..Default::default()
    };
    // runc's shim waits for the reader for ten seconds.
    let (deleted, took) = api.call::<DeleteResponse>("Delete", &delete, SOON)?;
    assert_eq!(done(deleted)?.exit_status, 137);
    assert!(
        is_oracle() || in_time(took, 3 * SECOND),
        "Delete took {took:?}"
    );
    // The reader still gets what had been taken, and then the end.
    reader.to_end(SOON)?;
    let seen = reader.text();
    match seen.len() > 1 << 20
        && seen
            .split_inclusive('\n')
            .all(|line| "y\n".starts_with(line))
    {
        true => Ok(()),
        false => Err(failure(format!(
            "{} bytes, or others than were written",
            seen.len()
        ))),
    }
}

/// The session's leader ends: processes on the terminal get SIGHUP, and one that ignores it delays
/// nobody's exit.
fn hang_up(pod: &ShimPod) -> TestResult {
    let task = pod.run("terminal", &["sleep", "1000"])?;
    let output = Fifo::new(pod.files(), "terminal")?;
    let mut reader = output.reader()?;
    let streams = Streams {
        stdout: output.path(),
        terminal: true,
        ..Streams::default()
    };
    let script = "trap '' HUP; sleep 2222 & trap - HUP; sleep 1111 & echo ready; \
        read -r go; echo bye; exit 7";
    let input = Fifo::new(pod.files(), "typed")?;
    let streams = Streams {
        stdin: input.path(),
        ..streams
    };
    done(task.exec("shell", &json!({"args": ["sh", "-c", script]}), &streams)?)?;
    done(task.start("shell")?)?;
    reader.expect("ready", SOON)?;
    let typed = input.write("go\n")?;
    assert_eq!(done(task.wait("shell")?)?, 7);
    reader.expect("bye\r\n", SOON)?;
    let sleepers = "ps -o args | grep '^sleep [12]' | sort | tr '\\n' ,";
    task.shows(sleepers, "sleep 1000,sleep 2222,")?;
    drop(typed);
    done(task.delete("shell")?)?;
    reader.to_end(SOON)?;
    // The client hangs a terminal up: the process ends by SIGHUP.
    done(task.exec(
        "again",
        &json!({"args": ["sh", "-c", "sleep 3333; echo never"]}),
        &streams,
    )?)?;
    done(task.start("again")?)?;
    done(task.kill("again", 1, false)?)?;
    assert_eq!(done(task.wait("again")?)?, 129);
    done(task.delete("again")?)?;
    task.end()
}
