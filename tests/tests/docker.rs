//! Docker 28 with `--runtime`: what people type, and what they get.
//!
//! dockerd runs on the tests' containerd. Everything except what concerns the VM also runs against
//! runc.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kata_like_tests::docker::{Container, Docker};
use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::process::until;
use kata_like_tests::{Call, Host, Parts, TestResult, failure, in_time, is_oracle, kata_like_only};

const PATIENCE: Duration = Duration::from_secs(60);

/// A page of a web server that a container runs.
fn get(address: &str) -> TestResult<String> {
    get_within(address, PATIENCE)
}

fn get_within(address: &str, patience: Duration) -> TestResult<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse()?, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
    body.map(str::to_owned).ok_or_else(|| failure(answer))
}

/// The address in the first network that it is in.
fn address(container: &Container) -> TestResult<String> {
    let all = container.inspect()?["NetworkSettings"]["Networks"].take();
    let first = all.as_object().and_then(|all| all.values().next());
    let address = first.and_then(|network| network["IPAddress"].as_str());
    Ok(address.unwrap_or_default().to_owned())
}

fn state(container: &Container) -> TestResult<(String, i64)> {
    let state = container.inspect()?["State"].take();
    let status = state["Status"].as_str().unwrap_or_default().to_owned();
    Ok((status, state["ExitCode"].as_i64().unwrap_or(-1)))
}

#[test]
fn a_container_gets_what_its_command_line_says() -> TestResult {
    let host = Host::alone()?;
    let docker = Docker::on(&host)?;
    let volume = PathBuf::from(format!("/run/{}", host.name("volume")));
    fs::create_dir(&volume)?;
    fs::write(volume.join("in"), "from the host\n")?;
    let bind = format!("{}:/data", volume.display());
    let options = [
        "--init",
        "--network",
        "none",
        "--env",
        "NAME=value",
        "--user",
        "5:6",
        "--group-add",
        "0",
        "--tmpfs",
        "/small:size=1m",
        "--memory",
        "300m",
        "--volume",
        &bind,
        "--device",
        "/dev/null:/dev/other",
    ];
    let script = "id -u; id -g; id -G; echo $NAME; cat /data/in; df -k /small | tail -n 1 | awk '{print $2}'; \
        cat /sys/fs/cgroup/memory.max; cat /proc/1/comm; echo 5 >/dev/other; ls /sys/class/net; \
        echo back >/data/out; echo wrong >&2; exit 7";
    fs::set_permissions(&volume, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    docker.run(&["--network", "none"], &["true"]).ok()?; // dockerd then makes things for itself
    let before = host.footprint();
    let mut parts = Parts::new();
    parts.run("options", || {
        let output = docker.run(&options, &["sh", "-c", script]).output()?;
        assert_eq!(output.status, 7, "{}", output.both());
        assert_eq!(
            output.text(),
            "5\n6\n6 0\nvalue\nfrom the host\n1024\n314572800\ndocker-init\nlo"
        );
        // Before these lines Docker may warn of what the host lacks.
        let errors = output.error_text();
        assert!(errors.ends_with("wrong"), "{errors}");
        assert_eq!(fs::read_to_string(volume.join("out"))?, "back\n");
        Ok(())
    });
    parts.run("--privileged", || {
        let script = "uname -r; mount -t tmpfs none /mnt 2>&1 || mkdir /mnt && \
            mount -t tmpfs none /mnt && echo mounted";
        let options = ["--privileged", "--network", "none"];
        let text = docker.run(&options, &["sh", "-c", script]).ok()?.text();
        assert!(text.ends_with("mounted"), "{text}");
        assert_eq!(text.contains("kata-like"), !is_oracle(), "{text}");
        Ok(())
    });
    parts.run("programs of another architecture", || {
        if is_oracle() {
            return Ok(()); // What is registered there stays on the host.
        }
        let script = "cd /proc/sys/fs/binfmt_misc && mount -t binfmt_misc none . && cd . && \
            echo ':foreign:M::foreign::/bin/cat:F' >register && \
            echo 'foreign program' >/program && chmod +x /program && exec /program";
        let options = ["--privileged", "--network", "none"];
        let text = docker.run(&options, &["sh", "-c", script]).ok()?.text();
        assert_eq!(text, "foreign program");
        Ok(())
    });
    parts.run("a command that is not there", || {
        let missing = docker
            .run(&["--network", "none"], &["no-such-command"])
            .output()?;
        assert_eq!(missing.status, 127, "{}", missing.both());
        Ok(())
    });
    parts.run("the end", || {
        fs::remove_dir_all(&volume)?;
        host.leaves_nothing(&before)
    });
    parts.end()
}

#[test]
fn a_container_lives_as_docker_steers_it() -> TestResult {
    let host = Host::alone()?;
    let docker = Docker::on(&host)?;
    let script = "echo begun; echo wrong >&2; trap 'echo asked to end; exit 3' TERM; mkdir -p /web; \
        echo a page >/web/page; httpd -p 80 -h /web; echo of memory >/dev/shm/held; \
        head -c 20000000 /dev/zero >>/dev/shm/held; while :; do sleep 0.2; done";
    let container = docker.start(
        "web",
        &["--publish", "127.0.0.1:8099:80"],
        &["sh", "-c", script],
    )?;
    let mut parts = Parts::new();
    parts.run("a published port", || {
        let mut page = Err(failure("not asked for"));
        until("the published port answers", PATIENCE, || {
            page = get("127.0.0.1:8099");
            page.is_ok()
        })?;
        assert_eq!(page?, "a page\n");
        assert_eq!(get(&format!("{}:80", address(&container)?))?, "a page\n");
        Ok(())
    });
    parts.run("exec", || {
        let output = container.exec("echo of exec; exit 5").output()?;
        assert_eq!((output.status, output.text().as_str()), (5, "of exec"));
        let mut cat = docker.call(&["exec", "-i", container.name(), "cat"]);
        cat = cat.input("through stdin");
        assert_eq!(cat.ok()?.text(), "through stdin");
        Ok(())
    });
    parts.run("logs", || {
        let logs = docker.call(&["logs", container.name()]).ok()?;
        assert_eq!(
            (logs.text(), logs.error_text()),
            ("begun".into(), "wrong".into())
        );
        Ok(())
    });
    parts.run("stats", || figures(&docker, &container));
    parts.run("top", || {
        let top = docker.output(&["top", container.name()])?;
        assert!(top.lines().count() > 1, "{top}");
        Ok(())
    });
    parts.run("pause", || a_pause_ends(&docker, &container));
    parts.run("restart", || {
        docker.output(&["restart", "--time", "30", container.name()])?;
        assert_eq!(state(&container)?.0, "running");
        until("the port answers again", PATIENCE, || {
            get("127.0.0.1:8099").is_ok()
        })
    });
    parts.run("stop", || a_stop_is_heeded(&docker, &container));
    parts.run("kill", || {
        docker.output(&["start", container.name()])?;
        docker.output(&["kill", container.name()])?;
        until("it is dead", PATIENCE, || {
            state(&container).is_ok_and(|it| it == ("exited".into(), 137))
        })
    });
    parts.end()
}

fn a_pause_ends(docker: &Docker, container: &Container) -> TestResult {
    docker.output(&["pause", container.name()])?;
    assert_eq!(state(container)?.0, "paused");
    assert!(
        get_within("127.0.0.1:8099", Duration::from_secs(3)).is_err(),
        "a paused server has answered"
    );
    docker.output(&["unpause", container.name()])?;
    assert_eq!(state(container)?.0, "running");
    assert_eq!(get("127.0.0.1:8099")?, "a page\n");
    Ok(())
}

/// The log is followed to its end, which the container writes itself: no KILL was needed.
fn a_stop_is_heeded(docker: &Docker, container: &Container) -> TestResult {
    std::thread::scope(|scope| -> TestResult {
        let follow = scope.spawn(|| docker.call(&["logs", "--follow", container.name()]).ok());
        let begun = Instant::now();
        docker.output(&["stop", "--time", "60", container.name()])?;
        assert!(in_time(begun.elapsed(), Duration::from_secs(60)));
        let followed = follow.join().map_err(|_| failure("a thread panicked"))??;
        assert_eq!(followed.text(), "begun\nasked to end\nbegun\nasked to end");
        Ok(())
    })?;
    assert_eq!(state(container)?, ("exited".into(), 3));
    Ok(())
}

/// `docker stats` of a container that holds 20 MB and has a few processes.
fn figures(docker: &Docker, container: &Container) -> TestResult {
    let format = "{{.CPUPerc}} {{.MemUsage}} {{.PIDs}} {{.NetIO}}";
    let stats = docker.output(&["stats", "--no-stream", "--format", format, container.name()])?;
    let [cpu, memory, _, _, processes, received, _, sent] =
        stats.split_whitespace().collect::<Vec<_>>()[..]
    else {
        return Err(failure(stats));
    };
    let number = |text: &str, unit: &str| -> TestResult<f64> {
        let number = text.strip_suffix(unit).unwrap_or_default();
        number
            .parse()
            .map_err(|_| failure(format!("{text}: {stats}")))
    };
    assert!((0.01..400.0).contains(&number(cpu, "%")?), "{stats}");
    assert!((19.0..40.0).contains(&number(memory, "MiB")?), "{stats}");
    assert!((3..20).contains(&processes.parse::<u64>()?), "{stats}");
    assert!(received != "0B" && sent != "0B", "{stats}");
    Ok(())
}

/// dockerd copies through the container's root on the host, while the container runs on it.
#[test]
fn files_are_copied_into_and_out_of_a_running_container() -> TestResult {
    let host = Host::alone()?;
    let docker = Docker::on(&host)?;
    let place = PathBuf::from(format!("/run/{}", host.name("copies")));
    fs::create_dir(&place)?;
    let container = docker.start("copied", &["--network", "none"], &["sleep", "1000"])?;
    let inside = |path: &str| format!("{}:{path}", container.name());
    let source = place.join("file").display().to_string();

    // Files that the container has read, written, looked for in vain and listed before are new all
    // the same.
    container
        .exec("echo old >/etc/there; cat /etc/there; ! cat /etc/new; ls /etc")
        .ok()?;
    fs::write(&source, "of the host\n")?;
    for name in ["there", "new"] {
        docker.output(&["cp", &source, &inside(&format!("/etc/{name}"))])?;
        container
            .exec(&format!(
                "i=0; until grep -q 'of the host' /etc/{name} && ls /etc | grep -q {name}; do \
                i=$((i+1)); [ $i -lt 20 ] || exit 1; sleep 0.2; done"
            ))
            .ok()
            .map_err(|error| failure(format!("{name}: {error}")))?;
    }
    // A process has written it, and still has it open.
    let target = place.join("out").display().to_string();
    docker.output(&[
        "exec",
        "-d",
        container.name(),
        "sh",
        "-c",
        "exec >/etc/open; echo of the guest; sleep 1000",
    ])?;
    let copied = || {
        docker.output(&["cp", &inside("/etc/open"), &target])?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(fs::read_to_string(&target)?)
    };
    let mut last = Ok(String::new());
    until(
        "what was written is copied",
        Duration::from_secs(20),
        || {
            last = copied();
            last.as_ref().is_ok_and(|text| text == "of the guest\n")
        },
    )
    .map_err(|error| failure(format!("{error}: {last:?}")))?;
    Ok(fs::remove_dir_all(place)?)
}

/// A network removed with the value.
struct Network<'docker>(&'docker Docker<'docker>, String);

impl Drop for Network<'_> {
    fn drop(&mut self) {
        let _ = self.0.call(&["network", "rm", &self.1]).output();
    }
}

#[test]
fn containers_of_a_network_reach_each_other() -> TestResult {
    let host = Host::alone()?;
    let docker = Docker::on(&host)?;
    let network = Network(&docker, host.name("network"));
    docker.output(&["network", "create", &network.1])?;
    let option = ["--network", network.1.as_str()];
    let script = "mkdir /web; echo a page >/web/page; exec httpd -f -p 80 -h /web";
    let options = ["--network", network.1.as_str(), "--ipc", "shareable"];
    let server = docker.start("server", &options, &["sh", "-c", script])?;
    let fetch = |from: &str| {
        format!(
            "i=0; until printf 'GET /page HTTP/1.0\\r\\n\\r\\n' | nc {from} 80 | grep '^a page'; \
            do i=$((i+1)); [ $i -lt 20 ] || exit 1; sleep 1; done"
        )
    };
    // By the name that Docker's own resolver knows, and by address.
    let script = format!("{}; {}", fetch(server.name()), fetch(&address(&server)?));
    let mut parts = Parts::new();
    parts.run("by name and address", || {
        let pages = docker.run(&option, &["sh", "-c", &script]).ok()?;
        assert_eq!(pages.text(), "a page\na page");
        Ok(())
    });
    let container = format!("container:{}", server.name());
    parts.run("in one network", || {
        let script = fetch("127.0.0.1");
        let page = docker.run(&["--network", &container], &["sh", "-c", &script]);
        assert_eq!(page.ok()?.text(), "a page");
        Ok(())
    });
    parts.run("with its IPC objects", || {
        let script = "echo shared >/dev/shm/file; readlink /proc/1/ns/ipc";
        let own = server.exec(script).ok()?.text();
        let script = "readlink /proc/self/ns/ipc; cat /dev/shm/file";
        let options = ["--network", &container, "--ipc", &container];
        let seen = docker.run(&options, &["sh", "-c", script]).ok()?.text();
        assert_eq!(seen, format!("{own}\nshared"));
        Ok(())
    });
    if is_oracle() {
        return parts.end();
    }
    parts.run("with its IPC objects, in another network", || {
        let alone = docker.run(&["--ipc", &container], &["true"]);
        refused(alone, "--network container:NAME")
    });
    for (option, why) in [("--network", "hostNetwork"), ("--pid", "hostPID")] {
        parts.run(why, || {
            refused(docker.run(&[option, "host"], &["true"]), why)
        });
    }
    parts.end()
}

fn refused(call: Call, why: &str) -> TestResult {
    let output = call.output()?;
    let said = output.error_text();
    assert!(
        output.status != 0 && said.contains(why),
        "no {why:?} in: {}",
        output.both()
    );
    Ok(())
}

#[test]
fn an_unknown_device_is_refused_by_name() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let docker = Docker::on(&host)?;
    refused(
        docker.run(&["--network", "none", "--device", "/dev/kvm"], &["true"]),
        "/dev/kvm",
    )
}

/// `docker commit` of a running container: the image has what it has written, also through a
/// mapping.
#[test]
fn a_commit_has_all_that_was_written() -> TestResult {
    const BYTES: u64 = 8 << 20;
    let host = Host::alone()?;
    let docker = Docker::on(&host)?;
    let tool = Tool::new(&host)?;
    let mount = format!("{}:{TOOL}:ro", tool.path().display());
    let options = ["--network", "none", "--volume", &mount];
    let bytes = BYTES.to_string();
    let script = format!("seq 1000 >/numbers; exec {TOOL} store /file {bytes} hold");
    let container = docker.start("committed", &options, &["sh", "-c", &script])?;
    until("all is stored", PATIENCE, || {
        let logs = docker.output(&["logs", container.name()]);
        logs.is_ok_and(|logs| logs.contains("stored"))
    })?;
    let image = host.name("committed");
    docker.call(&["commit", container.name(), &image]).ok()?;
    let script = format!("{TOOL} stored /file {bytes}; wc -l </numbers");
    let mut arguments = vec!["run", "--rm", "--runtime", "io.containerd.runc.v2"];
    arguments.extend(options);
    arguments.extend([image.as_str(), "sh", "-c", &script]);
    let seen = docker.call(&arguments).ok()?.text();
    drop(container);
    docker.call(&["image", "rm", "--force", &image]).ok()?;
    assert_eq!(seen, "whole\n1000");
    Ok(())
}
