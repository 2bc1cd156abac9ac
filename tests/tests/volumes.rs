//! Files and directories of the host in a container: each side sees the other's changes, read-only
//! stays so, and nothing beside a volume is shared. `databases.rs` tests what databases do there.
//!
//! Everything except what concerns the VM also runs against runc.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use kata_like_tests::disk::LoopDevice;
use kata_like_tests::probe::Tool;
use kata_like_tests::process::until;
use kata_like_tests::volume::bind;
use kata_like_tests::{
    Call, CtrContainer, CtrPod, Directory, Host, Parts, TestResult, failure, is_oracle,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const SECOND: Duration = Duration::from_secs(1);

/// Waits until a command in the container prints `wanted`.
fn sees(pod: &CtrContainer, command: &[&str], wanted: &str) -> TestResult {
    let mut last = String::new();
    until("the container sees it", 10 * SECOND, || {
        last = match pod.exec(command) {
            Ok(output) => output.text(),
            Err(error) => error.to_string(),
        };
        last == wanted
    })
    .map_err(|error| failure(format!("{error}: {wanted:?}, last {last:?}")))
}

/// A script in the container prints `wanted`.
fn prints(pod: &CtrContainer, script: &str, wanted: &str) -> TestResult {
    let output = pod.exec(&["sh", "-c", script])?;
    assert_eq!(output.text(), wanted, "{}", output.both());
    Ok(())
}

#[test]
fn what_one_side_writes_the_other_reads() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    fs::write(volume.join("file"), "first\n")?;
    fs::create_dir_all(volume.join("deep/er"))?;
    let mount = volume.at("/data", "rbind:rw");
    let pod = host.start("written", &["--mount", &mount], &["sleep", "1000"])?;

    assert_eq!(pod.exec(&["cat", "/data/file"])?.text(), "first");
    // Appended, truncated, replaced and removed on the host: seen within a second, part of which is
    // emulation's.
    fs::write(volume.join("file"), "first\nsecond\n")?;
    sees(&pod, &["cat", "/data/file"], "first\nsecond")?;
    fs::write(volume.join("file.new"), "replaced\n")?;
    fs::rename(volume.join("file.new"), volume.join("file"))?;
    sees(&pod, &["cat", "/data/file"], "replaced")?;
    fs::write(volume.join("deep/er/new"), "")?;
    sees(&pod, &["ls", "/data/deep/er"], "new")?;
    fs::remove_file(volume.join("deep/er/new"))?;
    sees(&pod, &["ls", "/data/deep/er"], "")?;

    let script = "echo from inside >/data/inside; mkdir -m 750 /data/made; chown 1000:900 /data/inside; \
        ln -s inside /data/link; ln /data/inside /data/hard; mv /data/made /data/moved; chmod 4755 /data/hard";
    pod.exec_call(&[], &["sh", "-c", script]).ok()?;
    assert_eq!(fs::read_to_string(volume.join("link"))?, "from inside\n");
    let about = fs::metadata(volume.join("inside"))?;
    assert_eq!((about.uid(), about.gid(), about.nlink()), (1000, 900, 2));
    assert_eq!(about.permissions().mode() & 0o7777, 0o4755);
    assert_eq!(
        fs::metadata(volume.join("moved"))?.permissions().mode() & 0o777,
        0o750
    );
    pod.remove()
}

/// kubelet writes a new directory and swaps the link `..data`: a reader sees only the old or only
/// the new state, and never goes back.
#[test]
fn a_config_map_is_switched_whole_and_in_order() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    let publish = |generation: u32| -> TestResult {
        let name = format!("..generation-{generation}");
        fs::create_dir(volume.join(&name))?;
        for key in ["one", "two"] {
            fs::write(volume.join(&name).join(key), format!("{generation}\n"))?;
        }
        symlink(&name, volume.join("..data.new"))?;
        fs::rename(volume.join("..data.new"), volume.join("..data"))?;
        Ok(())
    };
    publish(1)?;
    for key in ["one", "two"] {
        symlink(format!("..data/{key}"), volume.join(key))?;
    }
    let mount = volume.at("/config", "rbind:ro");
    // Reads both keys through one look at the link, and both through the keys' own links.
    let script = "cd /config; while :; do d=$(readlink ..data); cat $d/one $d/two | tr '\\n' ' '; cat one; sleep 0.1; done";
    let log = volume_log(&host);
    let uri = format!("file://{}", log.display());
    let pod = host.start(
        "config",
        &["--mount", &mount, "--log-uri", &uri],
        &["sh", "-c", script],
    )?;
    let lines = || fs::read_to_string(&log).unwrap_or_default();
    for generation in 2..6 {
        let before = format!("{} {} {}\n", generation - 1, generation - 1, generation - 1);
        until("the last generation is read", 30 * SECOND, || {
            lines().contains(&before)
        })?;
        publish(generation)?;
        let after = format!("{generation} {generation} ");
        until("the switch is seen", 5 * SECOND, || {
            lines().contains(&after)
        })?;
    }
    pod.remove()?;
    let text = lines();
    let mut last = 0;
    for line in text.lines() {
        let numbers: Vec<u32> = line
            .split(' ')
            .map_while(|word| word.parse().ok())
            .collect();
        let [one, two, through] = numbers[..] else {
            continue; // the last line may be incomplete
        };
        assert_eq!(one, two, "half a switch: {text}");
        assert!(one >= last && through >= one, "back in time: {text}");
        last = through;
    }
    fs::remove_file(log)?;
    Ok(())
}

fn volume_log(host: &Host) -> PathBuf {
    PathBuf::from(format!("/run/{}", host.name("log")))
}

/// A volume may be one file: then nothing beside it is there.
#[test]
fn a_file_is_shared_alone() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    fs::write(volume.join("shared"), "shared\n")?;
    fs::write(volume.join("secret"), "secret\n")?;
    let mount = bind(&volume.join("shared"), "/etc/shared", "bind:rw");
    let pod = host.start("alone", &["--mount", &mount], &["sleep", "1000"])?;
    assert_eq!(pod.exec(&["cat", "/etc/shared"])?.text(), "shared");
    pod.exec_call(&[], &["sh", "-c", "echo more >>/etc/shared"])
        .ok()?;
    assert_eq!(fs::read_to_string(volume.join("shared"))?, "shared\nmore\n");
    let found = pod.exec(&["find", "/", "-xdev", "-name", "secret"])?;
    assert_eq!(found.text(), "");
    if !is_oracle() {
        let fsd = pod.process("fsd")?;
        let output = Call::new({
            let mut find = Command::new("find");
            find.arg(format!("/proc/{}/root/", fsd.pid))
                .args(["-name", "secret"]);
            find
        })
        .output()?;
        assert_eq!(
            output.text(),
            "",
            "the fs server can reach what is not shared"
        );
    }
    pod.remove()
}

/// What the host mounts below a volume is there if it was mounted before the start and the bind is
/// recursive. A later mount appears only if the volume's mount is a slave of the host's.
#[test]
fn mounts_of_the_host_arrive_where_they_should() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    fs::create_dir(volume.join("later"))?;
    fs::create_dir(volume.join("earlier"))?;
    let tmpfs = |name: &str| {
        mount(
            "none",
            volume.join(name),
            "tmpfs",
            MountFlags::empty(),
            None,
        )
    };
    tmpfs("earlier")?;
    fs::write(volume.join("earlier/file"), "")?;
    let plain = volume.at("/plain", "rbind:rw");
    let flat = volume.at("/flat", "bind:rw");
    let slave = volume.at("/slave", "rbind:rslave:rw");
    let mut options = Vec::new();
    for volume in [&plain, &flat, &slave] {
        options.extend(["--mount", volume.as_str()]);
    }
    let pod = host.start("propagated", &options, &["sleep", "1000"])?;
    let result = (|| -> TestResult {
        assert_eq!(pod.exec(&["ls", "/plain/earlier"])?.text(), "file");
        assert_eq!(pod.exec(&["ls", "/flat/earlier"])?.text(), "");
        tmpfs("later")?;
        fs::write(volume.join("later/file"), "")?;
        sees(&pod, &["ls", "/slave/later"], "file")?;
        assert_eq!(
            pod.exec(&["ls", "/plain/later"])?.text(),
            "",
            "private, yet it arrives"
        );
        Ok(())
    })();
    for name in ["earlier", "later"] {
        let _ = unmount(volume.join(name), UnmountFlags::DETACH);
    }
    result?;
    pod.remove()
}

/// For the containers of a pod a volume is one file system: FIFOs and sockets join them, locks
/// exclude them, and the volume outlives containers that go. A socket of the host is visible there.
#[test]
fn a_volume_joins_the_containers_of_a_pod() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    let of_host = std::os::unix::net::UnixListener::bind(volume.join("host.sock"))?;
    let (mount, tool) = (volume.at("/shared", "rbind:rw"), Tool::new(&host)?);
    let options = ["--mount", &mount, "--mount", &tool.mount()];
    let sandbox = CtrPod::start(&host, &[])?;
    let server = sandbox.container("server", &options, &["sleep", "1000"])?;
    let client = sandbox.container("client", &options, &["sleep", "1000"])?;
    let script = "cd /shared; mkfifo fifo; (echo through >fifo) >/dev/null 2>&1 & \
        cd /shared; /tool serve socket >/dev/null 2>&1 & cd /shared; >lock; \
        for kind in flock fcntl; do /tool lock $kind lock hold >$kind 2>&1 & done; \
        until [ -S socket ] && grep -q locked flock && grep -q locked fcntl; do sleep 0.1; done";
    server.exec_call(&[], &["sh", "-c", script]).ok()?;
    let script = "cd /shared; for kind in flock fcntl; do /tool lock $kind lock try; done; \
        timeout 20 cat fifo; timeout 20 /tool ask socket; stat -c %F host.sock";
    let found = client.exec(&["sh", "-c", script])?;
    let wanted = "EAGAIN\nEAGAIN\nthrough\nserved\nsocket";
    assert_eq!(found.text(), wanted, "{}", found.both());

    drop(of_host);
    server.remove()?;
    let another = sandbox.container("another", &options, &["sleep", "1000"])?;
    let script = "cd /shared; for kind in flock fcntl; do /tool lock $kind lock try; done; \
        rm fifo; mkfifo fifo; (echo again >fifo) >/dev/null 2>&1 &";
    let found = client.exec(&["sh", "-c", script])?;
    assert_eq!(found.text(), "locked\nlocked", "{}", found.both());
    let found = another.exec(&["timeout", "20", "cat", "/shared/fifo"])?;
    assert_eq!(found.text(), "again", "{}", found.both());
    for pod in [client, another] {
        pod.remove()?;
    }
    sandbox.remove()
}

/// A tmpfs has its size, and the root does what users expect of a file system.
#[test]
fn a_root_file_system_behaves() -> TestResult {
    let host = Host::shared()?;
    let mount = "type=tmpfs,src=tmpfs,dst=/small,options=size=64k:mode=700";
    let pod = host.start("behaves", &["--mount", mount], &["sleep", "1000"])?;
    let mut parts = Parts::new();
    parts.run("a tmpfs", || {
        let full = pod.exec(&[
            "dd",
            "if=/dev/zero",
            "of=/small/file",
            "bs=1024",
            "count=128",
        ])?;
        assert!(
            full.error_text().contains("No space left"),
            "{}",
            full.both()
        );
        assert_eq!(pod.exec(&["stat", "-c", "%a", "/small"])?.text(), "700");
        Ok(())
    });
    for (what, script, wanted) in [
        (
            "rename over",
            "cd /tmp; echo a >a; echo b >b; mv a b; cat b; ls a 2>/dev/null || echo gone",
            "a\ngone",
        ),
        (
            "hard links",
            "cd /tmp; echo x >l1; ln l1 l2; stat -c %h l1",
            "2",
        ),
        (
            "unlinked, still open",
            "cd /tmp; echo kept >u; exec 3<u; rm u; cat <&3",
            "kept",
        ),
        (
            "sparse",
            "cd /tmp; truncate -s 1G s; stat -c %s s; du -k s | cut -f1",
            "1073741824\n0",
        ),
        (
            "a FIFO",
            "cd /tmp; mkfifo f; (echo through >f &); cat f",
            "through",
        ),
        (
            "times",
            "cd /tmp; touch -d '2001-02-03 04:05:06' t; stat -c %Y t",
            "981173106",
        ),
        (
            "a name of 255 bytes",
            "cd /tmp; n=$(printf '%0255d' 0); touch $n; ls $n | wc -c",
            "256",
        ),
        (
            "set-user-id",
            "cp /bin/busybox /tmp/su; chmod 4755 /tmp/su; stat -c %a /tmp/su",
            "4755",
        ),
    ] {
        parts.run(what, || prints(&pod, script, wanted));
    }
    parts.run("the pod's end", || pod.remove());
    parts.end()
}

/// What Kubernetes makes of volumes: a directory or a file below one (subPath), files for a further
/// group of the process, and directories that give new files their group (fsGroup).
#[test]
fn groups_and_parts_of_a_volume_count() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    fill(&volume)?;
    let tool = Tool::new(&host)?;
    let mounts = [
        tool.mount(),
        volume.at("/data", "rbind:rw"),
        bind(&volume.join("part"), "/part", "rbind:rw"),
        bind(
            &volume.join("part/deeper/file"),
            "/etc/part.conf",
            "rbind:ro",
        ),
    ];
    let mut options = Vec::new();
    for mount in &mounts {
        options.extend(["--mount", mount.as_str()]);
    }
    options.extend(["--cap-add", "CAP_SYS_ADMIN"]); // to mount an overlay
    let pod = host.start("parts", &options, &["sleep", "1000"])?;
    let users = "echo u:x:1000:1000::/:/bin/sh >>/etc/passwd; echo g:x:7777:u >>/etc/group";
    pod.exec_call(&[], &["sh", "-c", users]).ok()?;
    let mut parts = Parts::new();
    for (what, script, wanted) in [
        (
            "a directory below a volume",
            "cd /part; cat deeper/file; ls; ls .. | grep -c secret",
            "of the part\ndeeper\n0",
        ),
        (
            "a file below a volume",
            "cat /etc/part.conf; (echo x >/etc/part.conf) 2>/dev/null || echo kept",
            "of the part\nkept",
        ),
        (
            "a part is of the whole",
            "echo more >>/part/deeper/file; tail -n 1 /data/part/deeper/file; tail -n 1 /etc/part.conf",
            "more\nmore",
        ),
        (
            "a group beside the own",
            "su u -c 'id -G; cat /data/theirs; cat /data/nobodys 2>/dev/null || echo refused'",
            "1000 7777\nread\nrefused",
        ),
        (
            "a group's directory",
            "su u -c 'cd /data/given; mkdir d; echo >d/file; echo >file; stat -c %u:%g d d/file file'",
            "1000:7777\n1000:7777\n1000:7777",
        ),
        (
            "an overlay on the root",
            OVERLAY,
            "refused\nall:\ndir\n\nall/dir:\nnew\ncharacter special file\nkept\nold",
        ),
    ] {
        parts.run(what, || prints(&pod, script, wanted));
    }
    parts.run("a group's directory on the host", || {
        let made = fs::metadata(volume.join("given/d/file"))?;
        assert_eq!((made.uid(), made.gid()), (1000, 7777));
        Ok(())
    });
    parts.run("a part on the host", || {
        assert_eq!(
            fs::read_to_string(volume.join("part/deeper/file"))?,
            "of the part\nmore\n"
        );
        Ok(())
    });
    parts.run("inotify", || inotify_tells_of_the_guest(&pod, &volume));
    parts.run("the pod's end", || pod.remove());
    parts.end()
}

/// Files and directories that a process reaches only by its groups, and a part of its own.
fn fill(volume: &Directory) -> TestResult {
    fs::create_dir_all(volume.join("part/deeper"))?;
    fs::write(volume.join("part/deeper/file"), "of the part\n")?;
    fs::write(volume.join("secret"), "beside\n")?;
    for (name, mode) in [("theirs", 0o640), ("nobodys", 0o600)] {
        fs::write(volume.join(name), "read\n")?;
        chown(volume.join(name), Some(0), Some(7777))?;
        fs::set_permissions(volume.join(name), fs::Permissions::from_mode(mode))?;
    }
    fs::create_dir(volume.join("given"))?;
    chown(volume.join("given"), Some(0), Some(7777))?;
    let mode = fs::Permissions::from_mode(0o2770);
    fs::set_permissions(volume.join("given"), mode)?;
    Ok(())
}

/// inotify reports what the container does. It reports what the host does only under runc.
fn inotify_tells_of_the_guest(pod: &CtrContainer, volume: &Directory) -> TestResult {
    let script = "/tool watch /data >/tmp/events 2>&1 & until grep -q watching /tmp/events; do sleep 0.1; done";
    pod.exec_call(&[], &["sh", "-c", script]).ok()?;
    fs::write(volume.join("of-the-host"), "")?;
    sees(pod, &["sh", "-c", "ls /data | grep of-the"], "of-the-host")?;
    let script = "echo >/data/of-the-guest; until grep -q of-the-guest /tmp/events; do sleep 0.1; done; \
        grep -c of-the-host /tmp/events";
    let told = pod.exec(&["sh", "-c", script])?.text();
    assert_eq!(told == "1", is_oracle(), "{told}");
    Ok(())
}

/// The kernel refuses a file system like the root's as an overlay's upper one, here as under runc.
/// In memory it works: a node hides a removed file of the root, an attribute hides a directory's
/// content.
const OVERLAY: &str = "mkdir -p /tmp/o; cd /tmp/o; mkdir -p low/dir up work memory all; echo kept >low/gone; \
    echo old >low/dir/old; over() { mount -t overlay -o lowerdir=low,upperdir=$1/up,workdir=$1/work overlay all; }; \
    over . 2>/dev/null || echo refused; mount -t tmpfs none memory; mkdir memory/up memory/work; over memory; \
    rm all/gone; rm -r all/dir; mkdir all/dir; echo >all/dir/new; ls all all/dir; stat -c %F memory/up/gone; \
    umount all; cat low/gone; ls low/dir";

/// A block device of the host, given as a device, is a disk of the guest.
#[test]
fn a_block_device_is_a_disk() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    let image = volume.join("image");
    fs::File::create(&image)?.set_len(4 << 20)?;
    let device = LoopDevice::attach(&image)?;
    let path = device.path();
    let pod = host.start("disk", &["--device", path], &["sleep", "1000"])?;
    let script = format!(
        "echo from the guest | dd of={path} bs=512 seek=8 conv=sync 2>/dev/null && sync && dd if={path} bs=512 skip=8 count=1 2>/dev/null | head -n 1"
    );
    let output = pod.exec(&["sh", "-c", &script])?;
    assert_eq!(output.text(), "from the guest", "{}", output.both());
    let size = pod.exec(&["blockdev", "--getsize64", path])?;
    assert_eq!(size.text(), (4 << 20).to_string(), "{}", size.both());
    pod.remove()?;
    let bytes = fs::read(&image)?;
    assert!(bytes[8 * 512..].starts_with(b"from the guest\n"));
    Ok(())
}
