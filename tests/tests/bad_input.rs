//! Bad input: `ctr run` fails soon, with one line that names step, object and cause, and leaves
//! nothing.
//!
//! Each test has the host alone, makes one mistake, and compares the host before and after.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kata_like_tests::{Aftermath, Call, Host, Parts, TestResult, in_time, kata_like_only};
use rustix::fs::{FileType, Mode, makedev, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

/// Two seconds from the fault, plus the time that `ctr` itself takes under emulation.
const SOON: Duration = Duration::from_secs(12);

/// Runs a container that must fail with all these words in its one line, and must leave nothing.
fn expect_failure(host: &Host, options: &[&str], command: &[&str], words: &[&str]) -> TestResult {
    let before = host.footprint();
    let output = host.run(&host.name("bad"), options, command).output()?;
    Aftermath::one_error(&output, words)?;
    let line = output.error_text();
    assert!(
        in_time(output.took, SOON),
        "after {:?}: {line}",
        output.took
    );
    println!("{line}");
    host.leaves_nothing(&before)
}

/// A configuration file with these lines.
fn configuration(host: &Host, lines: &str) -> TestResult<PathBuf> {
    let path = PathBuf::from(format!("/run/{}.toml", host.name("config")));
    fs::write(&path, lines)?;
    Ok(path)
}

fn expect_failure_with(lines: &str, words: &[&str]) -> TestResult {
    let host = Host::alone()?;
    let path = configuration(&host, lines)?;
    let text = path.display().to_string();
    expect_failure(&host, &["--runtime-config-path", &text], &["true"], words)
}

/// Something in place of `/dev/kvm`, until the value is dropped.
struct OtherKvm {
    directory: PathBuf,
}

impl OtherKvm {
    /// A device node of these numbers, on a file system with these flags.
    fn new(host: &Host, flags: MountFlags, major: u32, minor: u32) -> TestResult<Self> {
        let directory = PathBuf::from(format!("/run/{}", host.name("kvm")));
        fs::create_dir(&directory)?;
        mount("tmpfs", &directory, "tmpfs", flags, c"mode=755")?;
        let node = directory.join("node");
        let mode = Mode::from_raw_mode(0o666);
        mknodat(
            rustix::fs::CWD,
            &node,
            FileType::CharacterDevice,
            mode,
            makedev(major, minor),
        )?;
        mount_bind(&node, "/dev/kvm")?;
        Ok(Self { directory })
    }
}

impl Drop for OtherKvm {
    fn drop(&mut self) {
        let _ = unmount("/dev/kvm", UnmountFlags::DETACH);
        let _ = unmount(&self.directory, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.directory);
    }
}

#[test]
fn no_kvm() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    fs::rename("/dev/kvm", "/dev/kvm.away")?;
    let result = expect_failure(
        &host,
        &[],
        &["true"],
        &["/dev/kvm", "No such file or directory"],
    );
    fs::rename("/dev/kvm.away", "/dev/kvm")?;
    result
}

#[test]
fn no_permission_on_kvm() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let _other = OtherKvm::new(&host, MountFlags::NODEV, 10, 232)?;
    expect_failure(&host, &[], &["true"], &["/dev/kvm", "Permission denied"])
}

/// A node of that name that is not KVM: here the null device.
#[test]
fn a_kvm_that_is_none() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let _other = OtherKvm::new(&host, MountFlags::empty(), 1, 3)?;
    expect_failure(&host, &[], &["true"], &["/dev/kvm"])
}

#[test]
fn a_host_with_cgroup_v1() -> TestResult {
    kata_like_only!();
    let script = "umount -l /sys/fs/cgroup && mount -t tmpfs none /sys/fs/cgroup && \
        mkdir /sys/fs/cgroup/systemd && \
        mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd && exec \"$@\"";
    let host = Host::wrapped(&["unshare", "--mount", "sh", "-c", script, "sh"])?;
    expect_failure(&host, &[], &["true"], &["cgroup v2"])
}

#[test]
fn a_kernel_that_is_not_there() -> TestResult {
    kata_like_only!();
    expect_failure_with(
        "kernel = \"/run/no/kernel\"\n",
        &["/run/no/kernel", "No such file or directory"],
    )
}

#[test]
fn a_kernel_that_is_cut_off_or_none() -> TestResult {
    kata_like_only!();
    let whole = fs::read(installed("vmlinux"))?;
    let mut parts = Parts::new();
    for (name, content) in [
        ("cut-off", &whole[..whole.len() / 2]),
        ("header-only", &whole[..64]),
        ("text", b"this is no kernel\n".as_slice()),
        ("empty", b""),
    ] {
        parts.run(name, || {
            let path = format!("/run/kernel-{name}");
            fs::write(&path, content)?;
            expect_failure_with(&format!("kernel = \"{path}\"\n"), &["kernel"])?;
            Ok(fs::remove_file(&path)?)
        });
    }
    parts.end()
}

#[test]
fn an_initrd_that_is_not_there() -> TestResult {
    kata_like_only!();
    expect_failure_with(
        "initrd = \"/run/no/initrd\"\n",
        &["/run/no/initrd", "No such file or directory"],
    )
}

#[test]
fn an_initrd_that_is_cut_off_or_none() -> TestResult {
    kata_like_only!();
    let whole = fs::read(installed("initrd.img"))?;
    let mut parts = Parts::new();
    for (name, content) in [
        ("cut-off", &whole[..whole.len() / 2]),
        ("text", b"this is no initrd\n".as_slice()),
    ] {
        parts.run(name, || {
            let path = format!("/run/initrd-{name}");
            fs::write(&path, content)?;
            expect_failure_with(&format!("initrd = \"{path}\"\n"), &["initrd"])?;
            Ok(fs::remove_file(&path)?)
        });
    }
    parts.end()
}

#[test]
fn too_little_memory() -> TestResult {
    kata_like_only!();
    expect_failure_with("memory_mib = 8\n", &["memory_mib", "8"])
}

/// More than the host has: none of its pages of 2 MiB are reserved.
#[test]
fn too_little_memory_on_the_host() -> TestResult {
    kata_like_only!();
    expect_failure_with("hugepages = \"hugetlb\"\n", &["memory"])
}

#[test]
fn an_unknown_key() -> TestResult {
    kata_like_only!();
    expect_failure_with("# comment\nmemory_mb = 512\n", &["memory_mb", ".toml", "2"])
}

#[test]
fn a_spec_without_a_process() -> TestResult {
    let host = Host::alone()?;
    let path = format!("/run/{}.json", host.name("spec"));
    fs::write(
        &path,
        r#"{"ociVersion":"1.1.0","root":{"path":"rootfs"},"linux":{"namespaces":[{"type":"mount"}]}}"#,
    )?;
    let before = host.footprint();
    let id = host.name("bad");
    let runtime = kata_like_tests::runtime();
    let output = host
        .ctr(["run", "--rm", "--runtime", &runtime, "--config", &path, &id])
        .output()?;
    assert_ne!(output.status, 0);
    let line = output.error_text();
    assert!(line.contains("process"), "{line}");
    assert_eq!(line.lines().count(), 1, "not one line: {line}");
    host.leaves_nothing(&before)
}

/// containerd reads `start`'s two outputs as one: on failure they are one line, without a newline.
#[test]
fn a_broken_config_json() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let before = host.footprint();
    let mut parts = Parts::new();
    for (name, content) in [
        ("cut off", r#"{"ociVersion": "1.1.0", "process": {"#),
        ("no JSON", "hello"),
        ("empty", ""),
    ] {
        parts.run(name, || {
            let id = host.name("bundle");
            let bundle = PathBuf::from("/run").join(&id);
            fs::create_dir(&bundle)?;
            fs::write(bundle.join("config.json"), content)?;
            let output = Call::new(start(&host, &id, &bundle)).output()?;
            assert_ne!(output.status, 0, "{name}: {}", output.both());
            let text = [output.stdout.clone(), output.stderr.clone()].concat();
            let line = String::from_utf8(text)?;
            assert!(line.contains("config.json"), "{name}: {line:?}");
            assert!(!line.contains('\n'), "{name}: {line:?}");
            Ok(fs::remove_dir_all(&bundle)?)
        });
    }
    parts.run("the end", || host.leaves_nothing(&before));
    parts.end()
}

/// `start`, as containerd calls it.
fn start(host: &Host, id: &str, bundle: &Path) -> Command {
    let prefix = std::env::var("KATA_LIKE_PREFIX").unwrap_or_else(|_| "/run/installed".into());
    let mut command = Command::new(format!("{prefix}/bin/containerd-shim-kata-like-v2"));
    command
        .args(["-namespace", kata_like_tests::host::NAMESPACE, "-address"])
        .arg(host.address())
        .args(["-publish-binary", "containerd", "-id", id, "start"])
        .current_dir(bundle);
    command
}

fn installed(name: &str) -> PathBuf {
    let prefix = std::env::var("KATA_LIKE_PREFIX").unwrap_or_else(|_| "/run/installed".into());
    PathBuf::from(prefix).join("share/kata-like").join(name)
}
