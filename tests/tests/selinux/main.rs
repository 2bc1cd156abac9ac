//! A host that enforces SELinux: containerd's CRI plugin gives each pod a label and categories of
//! its own, and the pod's processes on the host run under them.
//!
//! Needs a test host whose kernel has SELinux and no policy (`test-host --selinux`). These tests
//! load their own policy once and enforce it before containerd starts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use kata_like_tests::cri::{Kubelet, Pod, SMALL, volume};
use kata_like_tests::rootfs::Rootfs;
use kata_like_tests::{Call, Host, Parts, TestResult, Version, failure};
use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::mount::{MountFlags, mount};

const POLICY: &str = include_str!("policy.cil");

/// The kernel's side of SELinux.
const SELINUX: &str = "/sys/fs/selinux";

/// The contexts file that a distribution's policy brings for programs that label containers.
const CONTEXTS: &str = r#"process = "system_u:system_r:container_t:s0"
file = "system_u:object_r:container_file_t:s0"
ro_file = "system_u:object_r:container_ro_file_t:s0"
kvm_process = "system_u:system_r:container_kvm_t:s0"
"#;

/// The label of our programs.
const PROGRAM: &str = "system_u:object_r:program_t:s0";

/// The label of the host's own processes.
const HOST: &str = "system_u:system_r:host_t:s0-s0:c0.c1023";

/// The labels of a pod's processes and of its files, each without the categories.
const PROCESS: &str = "system_u:system_r:container_kvm_t:";
const FILE: &str = "system_u:object_r:container_file_t:";

/// Where the configuration's drop-ins are.
const DROP_IN: &str = "/etc/kata-like/config.d/selinux.toml";

/// An enforcing host, for one test at a time.
fn host() -> TestResult<Host> {
    static ENFORCES: OnceLock<Result<(), String>> = OnceLock::new();
    ENFORCES
        .get_or_init(|| enforce().map_err(|error| error.to_string()))
        .clone()
        .map_err(failure)?;
    Host::on(Version::V2_1Cri, true)
}

fn enforce() -> TestResult {
    mount("selinuxfs", SELINUX, "selinuxfs", MountFlags::empty(), c"")?;
    let contexts = Path::new("/etc/selinux/tests/contexts");
    fs::create_dir_all(contexts)?;
    fs::write(contexts.join("lxc_contexts"), CONTEXTS)?;
    fs::write(
        "/etc/selinux/config",
        "SELINUX=enforcing\nSELINUXTYPE=tests\n",
    )?;

    let files = tempfile::tempdir()?;
    let (source, policy) = (files.path().join("policy.cil"), files.path().join("policy"));
    let names: Vec<String> = (0..1024).map(|number| format!("c{number}")).collect();
    let mut text = POLICY.to_owned();
    for name in &names {
        text += &format!("(category {name})");
    }
    text += &format!(
        "(categoryorder ({}))(categoryset all_categories (range c0 c1023))\n",
        names.join(" ")
    );
    fs::write(&source, text)?;
    let mut compile = Command::new("secilc");
    compile
        .args(["-f", "/dev/null", "-o"])
        .arg(&policy)
        .arg(&source);
    Call::new(compile).ok()?;
    fs::write(Path::new(SELINUX).join("load"), fs::read(policy)?)?;

    let installed = std::env::var("KATA_LIKE_PREFIX")?;
    for directory in ["bin", "libexec/kata-like"] {
        for entry in fs::read_dir(Path::new(&installed).join(directory))? {
            set_label(&entry?.path(), PROGRAM)?;
        }
    }
    for entry in fs::read_dir(Path::new(&installed).join("share/kata-like"))? {
        set_label(&entry?.path(), "system_u:object_r:system_file_t:s0")?;
    }
    Ok(fs::write(Path::new(SELINUX).join("enforce"), "1")?)
}

fn set_label(path: &Path, label: &str) -> TestResult {
    Ok(setxattr(
        path,
        "security.selinux",
        label.as_bytes(),
        XattrFlags::empty(),
    )?)
}

/// A file's label.
fn label_of(path: &Path) -> TestResult<String> {
    let mut bytes = vec![0; 4096];
    let length = getxattr(path, "security.selinux", &mut bytes[..])?;
    bytes.truncate(length);
    Ok(text(&bytes))
}

/// The label that a process runs under.
fn label_of_process(pid: i64) -> TestResult<String> {
    Ok(text(&fs::read(format!("/proc/{pid}/attr/current"))?))
}

fn text(label: &[u8]) -> String {
    String::from_utf8_lossy(label)
        .trim_end_matches(['\0', '\n'])
        .to_owned()
}

/// The level, with the categories, of a pod whose processes on the host all have it.
fn level_of(pod: &Pod) -> TestResult<String> {
    assert_eq!(label_of_process(pod.process("shim")?)?, HOST);
    let [vmm, fsd, proxy] =
        ["vmm", "fsd", "proxy"].map(|name| label_of_process(pod.process(name)?));
    let vmm = vmm?;
    assert_eq!([&vmm, &vmm], [&fsd?, &proxy?]);
    let level = vmm.strip_prefix(PROCESS);
    let level = level.ok_or_else(|| failure(format!("the VMM runs as {vmm}")))?;
    assert!(level.starts_with("s0:c") && level.contains(','), "{level}");
    Ok(level.to_owned())
}

/// VMM and fs server have the label for virtual machines and the pod's categories. So the guest
/// reaches the files with those, and no others of the host.
#[test]
fn a_pod_is_confined_to_its_own_files() -> TestResult {
    let host = host()?;
    let before = host.footprint();
    let kubelet = Kubelet::new(&host)?;
    let pod = kubelet.pod("first", SMALL)?;
    let level = level_of(&pod)?;
    let (own, hosts) = (pod.volume("own")?, pod.volume("hosts")?);
    for directory in [&own, &hosts] {
        fs::write(directory.join("file"), "of the host\n")?;
    }
    let mounts = volume(&own, "/own", "selinux_relabel: true");
    let container = pod.start("one", &["sleep", "1000"], &(mounts + SMALL))?;
    let script = "cat /own/file && echo x >/own/made && echo y >/made && cat /own/made /made";
    assert_eq!(container.exec(script)?, "of the host\nx\ny");
    let mounts = volume(&hosts, "/hosts", "");
    let refused = pod.create("unlabelled", &["true"], &(mounts + SMALL))?;
    let line = kubelet.refused(refused.start())?;
    for words in [&*format!("{PROCESS}{level} "), "`selinux = false`"] {
        assert!(line.contains(words), "no {words:?} in {line}");
    }
    assert_eq!(label_of(&own.join("file"))?, format!("{FILE}{level}"));

    let other = kubelet.pod("second", SMALL)?;
    assert_ne!(level_of(&other)?, level);
    let mounts = volume(&own, "/others", "");
    let container = other.start("two", &["sleep", "1000"], &(mounts + SMALL))?;
    let refused = container.exec("cat /others/file");
    assert!(refused.is_err_and(|error| error.to_string().contains("Permission denied")));
    other.remove()?;
    pod.remove()?;
    host.leaves_nothing(&before)
}

/// `kata-like check` says so before the first pod.
#[test]
fn the_check_names_it() -> TestResult {
    let _host = host()?;
    let program = Path::new(&std::env::var("KATA_LIKE_PREFIX")?).join("bin/kata-like");
    let mut check = Command::new(program);
    check.arg("check");
    let output = Call::new(check).ok()?;
    let text = output.text();
    assert!(text.starts_with("ok: "), "{text}");
    assert!(text.contains("note: SELinux is enforced here"), "{text}");
    Ok(())
}

/// CRI gives a privileged pod no label.
#[test]
fn a_privileged_pod_has_the_shims_label() -> TestResult {
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let pod = kubelet.pod(
        "privileged",
        "linux { security_context { privileged: true } resources { memory_limit_in_bytes: 134217728 } }",
    )?;
    for name in ["shim", "vmm", "fsd", "proxy"] {
        assert_eq!(label_of_process(pod.process(name)?)?, HOST, "{name}");
    }
    pod.remove()
}

/// A label that the policy doesn't know, one that the shim's children may not have, and one under
/// which they can't use their descriptors. Each start fails with the label and what helps, and
/// leaves nothing. What helps does help.
#[test]
fn a_refused_label_is_named_with_its_cure() -> TestResult {
    let host = host()?;
    let root = Rootfs::mount(&host)?;
    let mut spec = root.spec(&["sleep", "1000"])?;
    let before = host.footprint();
    let mut parts = Parts::new();
    for (kind, why) in [
        ("unknown_t", "set the SELinux label of"),
        ("forbidden_t", "Permission denied"),
        ("lonely_t", ""),
    ] {
        let label = format!("system_u:system_r:{kind}:s0:c1,c2");
        spec["process"]["selinuxLabel"] = label.as_str().into();
        parts.run(kind, || {
            let output = root
                .run(&["--rm"], &host.name("refused"), &spec)?
                .output()?;
            let line = output.error_text();
            assert_ne!(output.status, 0, "{kind}");
            for words in [&*label, why, "`selinux = false`"] {
                assert!(line.contains(words), "{kind}: no {words:?} in {line}");
            }
            host.leaves_nothing(&before)
        });
    }
    parts.run("the cure", || {
        fs::write(DROP_IN, "selinux = false\n")?;
        let pod = root.start(&host.name("unlabelled"), &spec);
        fs::remove_file(DROP_IN)?;
        let pod = pod?;
        assert_eq!(pod.exec(&["echo", "runs"])?.text(), "runs");
        pod.remove()
    });
    parts.end()
}
