//! nerdctl: hooks of the host make a container's network and names, and its output goes to a
//! program.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kata_like_tests::process::until;
use kata_like_tests::rootfs::Rootfs;
use kata_like_tests::{CtrContainer, Host, Parts, TestResult, failure};
use serde_json::{Value, json};

use crate::PATIENCE;

/// A hook of the host makes the network. It finds the namespace by the pid on its stdin.
/// Output goes to a program.
#[test]
fn nerdctls_hook_gives_the_network() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let rootfs = Rootfs::mount(&host)?;
    let place = PathBuf::from(format!("/run/{}", host.name("nerdctl")));
    fs::create_dir(&place)?;
    let (hook, logger) = programs(&place)?;
    let script = "ip -o -4 address show dev eth0; ping -c 1 10.79.0.1 >&2; echo there";
    let mut spec = rootfs.spec(&["sh", "-c", script])?;
    spec["annotations"] = json!({"nerdctl/name": "of the test"});
    for kind in ["createRuntime", "poststop"] {
        spec["hooks"][kind] = json!([{
            "path": hook, "args": ["hook", kind],
            "env": [format!("PATH={}", std::env::var("PATH").unwrap_or_default())],
        }]);
    }
    let id = host.name("nerdctl");
    let events = host.events()?;
    let uri = format!("binary://{logger}");
    let pod = CtrContainer::new(&host, id.clone());
    rootfs.run(&["-d", "--log-uri", &uri], &id, &spec)?.ok()?;
    assert_eq!(
        events.exit(&id, &id, PATIENCE)?.status(),
        0,
        "{}",
        host.log()
    );
    pod.delete()?;
    let read = |name: &str| fs::read_to_string(place.join(name)).unwrap_or_default();
    until("the logger has it all", PATIENCE, || {
        read("stdout").ends_with("there\n")
    })
    .map_err(|error| failure(format!("{error}: {:?}", [read("stdout"), read("stderr")])))?;
    let mut parts = Parts::new();
    parts.run("the output", || {
        let stdout = read("stdout");
        assert!(stdout.contains("10.79.0.2/24"), "{stdout}");
        let pinged = read("stderr");
        assert!(pinged.contains("1 packets received"), "{pinged}");
        Ok(())
    });
    for kind in ["createRuntime", "poststop"] {
        parts.run(kind, || {
            let state: Value =
                serde_json::from_slice(&fs::read(place.join(format!("{kind}.json")))?)?;
            assert_eq!(
                state["annotations"]["nerdctl/name"], "of the test",
                "{kind}: {state}"
            );
            let (found, status) = match kind {
                "createRuntime" => (state["pid"].as_i64(), "creating"),
                _ => (state["pid"].as_i64().filter(|pid| *pid != 0), "stopped"),
            };
            assert_eq!(found.is_some(), kind == "createRuntime", "{state}");
            assert_eq!(
                (&state["id"], &state["status"]),
                (&json!(id), &json!(status))
            );
            Ok(())
        });
    }
    parts.run("the end", || {
        fs::remove_dir_all(&place)?;
        drop((rootfs, events));
        host.leaves_nothing(&before)
    });
    parts.end()
}

/// The hook that makes the network, and the program that takes the output. Both leave their input
/// in this folder.
fn programs(place: &Path) -> TestResult<(String, String)> {
    let here = place.display();
    let program = |name: &str, script: String| -> TestResult<String> {
        let path = place.join(name);
        fs::write(&path, format!("#!/bin/sh -e\n{script}"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path.display().to_string())
    };
    let hook = program(
        "hook",
        format!(
            r#"state=$(cat)
echo "$state" >{here}/$1.json
case $1 in
createRuntime)
    pid=$(echo "$state" | sed 's/.*"pid": *\([0-9]*\).*/\1/')
    ip link add nerdctl0 type veth peer name eth0 netns $pid
    ip address add 10.79.0.1/24 dev nerdctl0
    ip link set nerdctl0 up
    nsenter --target $pid --net ip address add 10.79.0.2/24 dev eth0
    nsenter --target $pid --net ip link set eth0 up ;;
poststop) ip link delete nerdctl0 || true ;;
esac
"#
        ),
    )?;
    let logger = program(
        "logger",
        format!("cat <&3 >{here}/stdout 5>&- &\ncat <&4 >{here}/stderr 5>&- &\nexec 5>&-\nwait\n"),
    )?;
    Ok((hook, logger))
}

/// `nerdctl compose up` of two services: containers on one bridge, each with a file for
/// `/etc/hosts` of its own. The hook of each start writes all those files anew, in place.
#[test]
fn services_find_each_other_by_name() -> TestResult {
    let host = Host::alone()?;
    let before = host.footprint();
    let rootfs = Rootfs::mount(&host)?;
    let place = PathBuf::from(format!("/run/{}", host.name("compose")));
    fs::create_dir(&place)?;
    let hook = place.join("hook");
    fs::write(
        &hook,
        COMPOSE.replace("PLACE", &place.display().to_string()),
    )?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let start = |name: &str, number: &str| -> TestResult<CtrContainer> {
        let hosts = place.join(format!("{name}.hosts"));
        fs::write(&hosts, "")?;
        let mut spec = rootfs.spec(&["sleep", "1000"])?;
        let mount = json!({"destination": "/etc/hosts", "type": "bind", "source": hosts,
            "options": ["bind", "rprivate"]});
        spec["mounts"]
            .as_array_mut()
            .into_iter()
            .for_each(|all| all.push(mount.clone()));
        spec["hooks"]["createRuntime"] = json!([{"path": hook, "args": ["hook", name, number],
            "env": [format!("PATH={}", std::env::var("PATH").unwrap_or_default())]}]);
        rootfs.start(&host.name(name), &spec)
    };
    let web = start("web", "2")?;
    // It has looked in vain: what it knows of the file is old when the other one comes.
    let early = web
        .exec_call(&[], &["sh", "-c", "ping -c 1 database; cat /etc/hosts"])
        .output()?;
    assert!(early.text().contains("10.80.0.2 web"), "{}", early.both());
    let database = start("database", "3")?;
    let mut parts = Parts::new();
    for (from, to) in [(&web, "database"), (&database, "web")] {
        parts.run(to, || {
            let ping = ["ping", "-c", "1", "-W", "10", to];
            let mut last = String::new();
            until("an answer", PATIENCE, || {
                let output = from.exec_call(&[], &ping).output();
                last = output.map_or_else(|error| error.to_string(), |output| output.both());
                last.contains("1 packets received")
            })
            .map_err(|error| failure(format!("{error}: {last}")))
        });
    }
    parts.run("the end", || {
        web.remove()?;
        database.remove()?;
        let mut bridge = std::process::Command::new("ip");
        bridge.args(["link", "delete", "compose0"]);
        kata_like_tests::Call::new(bridge).ok()?;
        fs::remove_dir_all(&place)?;
        drop(rootfs);
        host.leaves_nothing(&before)
    });
    parts.end()
}

/// The hook of a service: `hook NAME NUMBER`.
const COMPOSE: &str = r#"#!/bin/sh -e
pid=$(sed 's/.*"pid": *\([0-9]*\).*/\1/')
ip link add compose0 type bridge 2>/dev/null || true
ip link set compose0 up
ip link add service$2 master compose0 type veth peer name eth0 netns $pid
ip link set service$2 up
nsenter --target $pid --net ip address add 10.80.0.$2/24 dev eth0
nsenter --target $pid --net ip link set eth0 up
echo "10.80.0.$2 $1" >>PLACE/names
for hosts in PLACE/*.hosts; do
    (echo "127.0.0.1 localhost"; cat PLACE/names) >$hosts
done
"#;
