//! A file's attributes while it is open: inside, in another container of the pod, and on the host;
//! and what an open finds of the host's changes.
//!
//! Everything except what concerns the VM also runs against runc.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kata_like_tests::CtrPod;
use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::{CtrContainer, Directory, Host, Parts, TestResult, failure, is_oracle};

/// Both file systems are in the host's memory, which takes a block when it is written.
const RIGHT: &str = "written: 4194304 bytes, 8192 blocks, newer; synced: 4194304 bytes, 8192 blocks, as old; \
    written again: 8388608 bytes, 16384 blocks, newer";

/// Keeps a written file open, as a database does, and prints what it knows of the file.
const KEEP: &str =
    "exec 3>$1; head -c 4194304 /dev/zero >&3; stat -c '%s %b %Y %Z' $1; du -k $1 | cut -f 1";

fn output(pod: &CtrContainer, script: &str, arguments: &[&str]) -> TestResult<String> {
    let mut command = vec!["sh", "-c", script, "sh"];
    command.extend(arguments);
    Ok(pod.exec_call(&[], &command).ok()?.text())
}

/// In the form of `stat -c '%s %b %Y %Z'`.
fn stat(path: &Path) -> TestResult<String> {
    let about = fs::metadata(path)?;
    let (size, blocks) = (about.len(), about.blocks());
    Ok(format!(
        "{size} {blocks} {} {}",
        about.mtime(),
        about.ctime()
    ))
}

/// The container's root on the host, open so that it stays.
fn root_of(sandbox: &CtrPod, pod: &CtrContainer) -> TestResult<File> {
    if is_oracle() {
        return Ok(File::open(format!("/proc/{}/root", pod.status()?.1))?);
    }
    let fsd = sandbox.first().process("fsd")?;
    for entry in fs::read_dir(format!("/proc/{}/root/rootfs", fsd.pid))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy() == pod.id() {
            return Ok(File::open(entry.path())?);
        }
    }
    Err(failure("the fs server does not have the root"))
}

#[test]
fn attributes_of_open_files_are_those_of_the_disk() -> TestResult {
    let host = Host::shared()?;
    let (volume, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let (data, tool) = (volume.at("/data", "rbind:rw"), tool.mount());
    let options = ["--mount", data.as_str(), "--mount", tool.as_str()];
    let sandbox = CtrPod::start(&host, &[])?;
    let pod = sandbox.container("one", &options, &["sleep", "1000"])?;
    let other = sandbox.container("two", &options, &["sleep", "1000"])?;
    let root = root_of(&sandbox, &pod)?;
    let root = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root));
    let root = Path::new(&root);

    let mut parts = Parts::new();
    for path in ["/file", "/data/file"] {
        parts.run(path, || {
            let said = output(&pod, &format!("exec {TOOL} stat-open {path} 4194304"), &[])?;
            assert_eq!(said, RIGHT, "{path}");
            Ok(())
        });
    }
    for (path, there, beside) in [
        ("/open", root.join("open"), None),
        ("/data/open", volume.join("open"), Some(&other)),
    ] {
        parts.run(path, || {
            an_open_file_is_the_same(&pod, beside, path, &there)
        });
    }
    parts.run("the host's changes of the root", || {
        what_the_host_changes_is_read_by_who_opens(&pod, root, "")
    });
    parts.run("the host's changes of a volume", || {
        what_the_host_changes_is_read_by_who_opens(&pod, &volume.join(""), "/data")
    });
    parts.run("the pod's end", || {
        for pod in [other, pod] {
            pod.remove()?;
        }
        sandbox.remove()
    });
    parts.end()
}

/// The attributes of an open file are the same inside, in another container and on the host.
fn an_open_file_is_the_same(
    pod: &CtrContainer,
    beside: Option<&CtrContainer>,
    path: &str,
    there: &Path,
) -> TestResult {
    // The shell and its open file live as long as the container.
    let script = format!(
        "({KEEP}; touch $2; sleep 1000) >/tmp/said & until test -e $2; do sleep 0.1; done; cat /tmp/said"
    );
    let said = output(pod, &script, &[path, &format!("{path}.done")])?;
    let inside: Vec<&str> = said.lines().collect();
    let wanted = stat(there)?;
    assert_eq!(inside, [wanted.as_str(), "4096"], "{path}");
    assert!(wanted.starts_with("4194304 8192 "), "{wanted}");
    let look = "stat -c '%s %b %Y %Z' $1";
    assert_eq!(output(pod, look, &[path])?, wanted, "{path}");
    if let Some(other) = beside {
        assert_eq!(output(other, look, &[path])?, wanted, "the other container");
    }
    Ok(())
}

/// The next open sees new content, a new length, and a new file under an old name, without a wait.
fn what_the_host_changes_is_read_by_who_opens(
    pod: &CtrContainer,
    there: &Path,
    here: &str,
) -> TestResult {
    let file = format!("{here}/of-both");
    let read = |wanted: &str| -> TestResult {
        let said = output(pod, "cat $1; wc -c <$1", &[&file])?;
        assert_eq!(said, format!("{wanted}\n{}", wanted.len() + 1), "{file}");
        Ok(())
    };
    output(pod, "echo of the guest >$1", &[&file])?;
    read("of the guest")?;
    fs::write(there.join("of-both"), "of the host\n")?;
    read("of the host")?;
    fs::write(
        there.join("of-both"),
        "of the host, and longer than it was before\n",
    )?;
    read("of the host, and longer than it was before")?;
    output(pod, "echo the guest >>$1", &[&file])?;
    let whole = fs::read_to_string(there.join("of-both"))?;
    assert!(whole.ends_with("it was before\nthe guest\n"), "{whole}");
    fs::write(there.join("new"), "short\n")?;
    fs::rename(there.join("new"), there.join("of-both"))?;
    read("short")
}
