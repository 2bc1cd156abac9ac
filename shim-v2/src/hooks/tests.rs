//! Hooks as shell scripts of the test's own.

use std::time::Instant;

use super::*;

fn script(text: &str) -> HostHook {
    HostHook {
        path: "/bin/sh".into(),
        arguments: ["sh", "-c", text].map(String::from).into(),
        environment: None,
        timeout: None,
    }
}

async fn run_all(hooks: &[HostHook], directory: &std::path::Path) -> Result<(), String> {
    let annotations = HashMap::from([("a".to_owned(), "b".to_owned())]);
    let bundle = directory.display().to_string();
    let state = State {
        oci_version: "1.2.0",
        id: "c",
        status: "creating",
        pid: 7,
        bundle: &bundle,
        annotations: &annotations,
    };
    let place = Place {
        cgroup: None,
        mounts: None,
        directory: directory.to_owned(),
    };
    let ran = run("prestart", hooks, &state, &place, DEADLINE).await;
    ran.map_err(|error| error.one_line())
}

#[tokio::test]
async fn a_hook_gets_the_state_its_environment_and_the_bundle() {
    let bundle = tempfile::tempdir().unwrap();
    let mut hook = script("cat >state; echo $0 $X $HOME >rest; pwd >>rest");
    hook.arguments.push("name".into());
    hook.environment = Some(vec!["X=y".into()]);
    run_all(&[hook], bundle.path()).await.unwrap();
    let state = std::fs::read_to_string(bundle.path().join("state")).unwrap();
    let wanted = format!(
        r#"{{"ociVersion":"1.2.0","id":"c","status":"creating","pid":7,"bundle":"{}","annotations":{{"a":"b"}}}}"#,
        bundle.path().display()
    );
    assert_eq!(state, wanted);
    let rest = std::fs::read_to_string(bundle.path().join("rest")).unwrap();
    assert_eq!(rest, format!("name y\n{}\n", bundle.path().display()));
}

#[tokio::test]
async fn a_failure_is_told_as_runc_does_and_ends_the_list() {
    let bundle = tempfile::tempdir().unwrap();
    let hooks = [
        script("exit 0"),
        script("echo out; echo bad >&2; exit 3"),
        script("touch late"),
    ];
    let line = run_all(&hooks, bundle.path()).await.unwrap_err();
    assert_eq!(
        line,
        "error running prestart hook #1: exit status 3, stdout: out, stderr: bad"
    );
    assert!(!bundle.path().join("late").exists());
    let mut missing = script("");
    missing.path = "/nowhere/hook".into();
    let line = run_all(&[missing], bundle.path()).await.unwrap_err();
    let wanted = "error running prestart hook #0: run /nowhere/hook: No such file";
    assert!(line.starts_with(wanted), "{line}");
}

#[tokio::test]
async fn a_hook_that_hangs_is_killed_at_its_deadline() {
    let bundle = tempfile::tempdir().unwrap();
    let mut hook = script("exec sleep 60");
    hook.timeout = Some(Duration::from_secs(1));
    let begin = Instant::now();
    let line = run_all(&[hook], bundle.path()).await.unwrap_err();
    assert_eq!(
        line,
        "error running prestart hook #0: hook ran past specified timeout of 1.0s"
    );
    assert!(begin.elapsed() < Duration::from_secs(10));
}

/// Neither a child that keeps the output open nor output without end holds a hook up; and one that
/// does not read is fed more than a pipe holds without harm.
#[tokio::test]
async fn nothing_that_a_hook_leaves_holds_it_up() {
    let bundle = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let hook = script("sleep 5 & head -c 1000000 /dev/zero; exit 1");
    let line = run_all(&[hook], bundle.path()).await.unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(line.len() < 2 * MAX_OUTPUT, "{}", line.len());
    let annotations = HashMap::from([("a".to_owned(), "b".repeat(1 << 20))]);
    let state = State {
        oci_version: "1.2.0",
        id: "c",
        status: "stopped",
        pid: 0,
        bundle: "/",
        annotations: &annotations,
    };
    let place = Place {
        cgroup: None,
        mounts: None,
        directory: "/".into(),
    };
    let hooks = [script("exit 0")];
    run("poststop", &hooks, &state, &place, DEADLINE)
        .await
        .unwrap();
}
