//! Security contexts and volumes of containers.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::PathBuf;

use kata_like_tests::cri::{self, Kubelet, MINUTE, volume};
use kata_like_tests::process::until;
use kata_like_tests::{Host, Parts, TestResult, failure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::host;

/// A container's user, rights and files, each requested in CRI's words.
#[test]
fn security_contexts_and_volumes_are_as_asked() -> TestResult {
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let pod = kubelet.pod("secure", "linux { security_context { privileged: true } }")?;
    let mut parts = Parts::new();
    parts.run("users and groups", || a_user_is_who_is_asked_for(&pod));
    parts.run("capabilities", || capabilities_are_those_asked_for(&pod));
    parts.run("privileged", || privileged_is_so_within_the_guest(&pod));
    parts.run("masks", || masks_are_those_asked_for(&pod));
    parts.run("a profile", || a_profile_of_the_node_holds(&pod));
    parts.run("profiles that ask the host", || {
        profiles_that_ask_the_host_are_refused(&kubelet, &pod)
    });
    parts.run("labels", || {
        labels_of_the_host_are_no_hindrance(&host, &pod)
    });
    parts.run("volumes", || volumes(&pod));
    parts.run("the pod's end", || pod.remove());
    parts.end()
}

fn context(text: &str) -> String {
    format!("linux {{ security_context {{ {text} }} }} ")
}

fn a_user_is_who_is_asked_for(pod: &cri::Pod) -> TestResult {
    // The kubelet's work for fsGroup: the volume has the group, and new files in it inherit it.
    let group = pod.volume("group")?;
    chown(&group, None, Some(2000))?;
    fs::set_permissions(&group, fs::Permissions::from_mode(0o2775))?;
    let user = context(
        "run_as_user { value: 1000 } run_as_group { value: 3000 } supplemental_groups: 2000
         no_new_privs: true seccomp { profile_type: RuntimeDefault }",
    );
    let text = pod.run(
        "user",
        "id -u; id -g; id -G | tr ' ' '\n' | sort -nu | tr '\n' ' '; echo
         touch /group/file && stat -c '%u %g' /group/file
         grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\t'
         unshare -U echo a user namespace || true",
        &(user + &volume(&group, "/group", "")),
    )?;
    assert_eq!(
        text,
        "1000\n3000\n900 2000 3000 \n1000 2000\n\
         CapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2\n\
         unshare: unshare(0x10000000): Operation not permitted\n"
    );
    let name = pod.run("name", "id -un", &context(r#"run_as_username: "app""#))?;
    assert_eq!(name, "app\n");
    Ok(())
}

/// Capabilities, and a root that can't be written.
fn capabilities_are_those_asked_for(pod: &cri::Pod) -> TestResult {
    let text = pod.run(
        "few",
        "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\t'
         unshare -U echo a user namespace
         touch /file; mount -t tmpfs none /tmp; true",
        &context(
            r#"readonly_rootfs: true
               capabilities { add_capabilities: "NET_ADMIN" drop_capabilities: "ALL" }"#,
        ),
    )?;
    assert!(
        text.starts_with(
            "CapEff:0000000000001000\nCapBnd:0000000000001000\nNoNewPrivs:0\nSeccomp:0\n\
             a user namespace\n"
        ),
        "{text}"
    );
    assert!(text.contains("/file: Read-only file system"), "{text}");
    assert!(text.contains("permission denied"), "{text}");
    Ok(())
}

fn privileged_is_so_within_the_guest(pod: &cri::Pod) -> TestResult {
    let text = pod.run(
        "privileged",
        "mkdir /mnt; mount -t tmpfs mine /mnt; stat -f -c %T /mnt
         echo 1 >/proc/sys/vm/overcommit_memory; cat /proc/sys/vm/overcommit_memory
         last=$(cat /proc/sys/kernel/cap_last_cap); printf 'CapEff:%016x\n' $(((2 << last) - 1))
         grep -E '^(CapEff|Seccomp):' /proc/self/status | tr -d '\t'",
        &context("privileged: true"),
    )?;
    let lines: Vec<_> = text.lines().collect();
    assert!(
        matches!(lines[..], ["tmpfs", "1", all, own, "Seccomp:0"] if all == own),
        "{text}"
    );
    Ok(())
}

/// Masks are those of the request; none if it has none (procMount: Unmasked).
fn masks_are_those_asked_for(pod: &cri::Pod) -> TestResult {
    let look = "wc -c </proc/interrupts; v=$(cat /proc/sys/kernel/shmmni)
        echo $v >/proc/sys/kernel/shmmni && echo written || echo refused";
    let masked = r#"masked_paths: "/proc/interrupts" readonly_paths: "/proc/sys""#;
    let text = pod.run("masked", look, &context(masked))?;
    assert!(
        text.starts_with("0\n") && text.ends_with("refused\n"),
        "{text}"
    );
    let text = pod.run("unmasked", look, &context(""))?;
    assert!(
        !text.starts_with("0\n") && text.ends_with("written\n"),
        "{text}"
    );
    Ok(())
}

/// A file of this name with a seccomp profile of the node's own, and the request for it: raw, as
/// the kubelet passes it on.
fn profile(pod: &cri::Pod, name: &str, more: &str) -> TestResult<String> {
    let path = pod.volume("profiles")?.join(name);
    fs::write(
        &path,
        format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", {more}}}"#),
    )?;
    Ok(context(&format!(
        "seccomp {{ profile_type: Localhost localhost_ref: {path:?} }}"
    )))
}

/// A profile's rule for a system call.
fn rule(action: &str) -> String {
    format!(r#""syscalls": [{{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_{action}"}}]"#)
}

fn a_profile_of_the_node_holds(pod: &cri::Pod) -> TestResult {
    let no_mkdir = rule(r#"ERRNO", "errnoRet": 95, "comment": ""#);
    let text = pod.run(
        "profile",
        "mkdir /made; touch /touched && ls /touched; grep ^Seccomp: /proc/self/status | tr -d '\t'",
        &profile(pod, "no-mkdir", &no_mkdir)?,
    )?;
    let wanted =
        "mkdir: can't create directory '/made': Operation not supported\n/touched\nSeccomp:2\n";
    assert_eq!(text, wanted);
    Ok(())
}

fn profiles_that_ask_the_host_are_refused(kubelet: &Kubelet, pod: &cri::Pod) -> TestResult {
    let socket = r#", "listenerPath": "/run/seccomp.sock""#;
    for (more, field) in [
        (rule("NOTIFY"), "SCMP_ACT_NOTIFY is not supported"),
        (rule("NOTIFY") + socket, "linux.seccomp.listenerPath"),
    ] {
        let container = pod.create("notify", &["true"], &profile(pod, "notify", &more)?)?;
        let text = kubelet.refused(container.start())?;
        assert!(text.contains(field), "{text}");
        container.remove()?;
    }
    Ok(())
}

/// A label that only the host knows must not stop a container if every pod has one.
fn labels_of_the_host_are_no_hindrance(host: &Host, pod: &cri::Pod) -> TestResult {
    let label = r#"selinux_options { user: "u" role: "r" type: "container_t" level: "s0:c1,c2" }"#;
    assert_eq!(pod.run("label", "echo runs", &context(label))?, "runs\n");
    // CRI itself refuses AppArmor's profiles on a host without AppArmor; other callers don't ask.
    let options = ["--apparmor-profile", "cri-containerd.apparmor.d"];
    let call = host.run(&host.name("apparmor"), &options, &["true"]);
    call.ok().map(drop)
}

/// A config map as the kubelet writes it, which changes by the switch of a link; and an emptyDir in
/// memory.
fn volumes(pod: &cri::Pod) -> TestResult {
    let map = pod.volume("map")?;
    let write = |version: &str| -> TestResult {
        fs::create_dir(map.join(version))?;
        fs::write(map.join(version).join("key"), version)?;
        symlink(version, map.join("..new"))?;
        Ok(fs::rename(map.join("..new"), map.join("..data"))?)
    };
    write("..first")?;
    symlink("..data/key", map.join("key"))?;
    let memory = Memory::on(pod.volume("memory")?)?;
    let mounts = volume(&map, "/etc/map", "readonly: true")
        + &volume(&memory.0, "/cache", "")
        + &volume(&map.join("key"), "/etc/one", "readonly: true");
    let container = pod.start("volumes", &["sleep", "1000"], &mounts)?;
    assert_eq!(
        container.exec("cat /etc/map/key /etc/one")?,
        "..first..first"
    );
    let refused = container.exec("echo x >/etc/map/key");
    assert!(refused.is_err_and(|error| error.to_string().contains("Read-only file system")));
    write("..second")?;
    let mut last = String::new();
    until("the config map's new version", MINUTE, || {
        last = container.exec("cat /etc/map/key").unwrap_or_default();
        last == "..second"
    })
    .map_err(|error| failure(format!("{error}: {last}")))?;
    // A file that is mounted itself keeps its content.
    assert_eq!(container.exec("cat /etc/one")?, "..first");

    let full = container.exec("dd if=/dev/zero of=/cache/big bs=1024 count=2048");
    assert!(full.is_err_and(|error| error.to_string().contains("No space left")));
    let big = fs::metadata(memory.0.join("big"))?.len();
    assert!((1 << 19..=1 << 20).contains(&big), "{big} bytes");
    container.stop(0).map(drop)
}

/// A tmpfs of 1 MiB.
struct Memory(PathBuf);

impl Memory {
    fn on(path: PathBuf) -> TestResult<Self> {
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), c"size=1m")?;
        Ok(Self(path))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}
