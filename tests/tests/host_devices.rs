//! Devices of the host: block devices become disks of the guest, and what can't be given is refused.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kata_like_tests::{Call, Host, Sandbox, TestResult, kata_like_only};

/// A loop device on a file of a mebibyte, detached with the value.
struct Disk(PathBuf);

impl Disk {
    fn new(image: &Path) -> TestResult<Self> {
        fs::write(image, vec![b'x'; 1 << 20])?;
        let mut attach = Command::new("losetup");
        attach.args(["--find", "--show"]).arg(image);
        Ok(Self(Call::new(attach).ok()?.text().trim().into()))
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    /// As the one user of the device on this host, as a mount is.
    fn alone(&self) -> std::io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_EXCL).open(&self.0)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// Four disks at a time, shared by containers of a pod, kept from everybody else on the host for as long.
#[test]
fn disks_are_shared_in_the_pod_and_with_nobody_else() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let files = tempfile::tempdir()?;
    let disks: Vec<Disk> = (0..5)
        .map(|number| Disk::new(&files.path().join(number.to_string())))
        .collect::<TestResult<_>>()?;
    let path = |number: usize| disks[number].path();
    let sandbox = Sandbox::start(&host, &[])?;
    let refused = |number: usize, why: &str| -> TestResult {
        let options = ["--device", path(number)];
        let output = sandbox.run("refused", &options, &["true"]).output()?;
        let line = output.error_text();
        assert_ne!(output.status, 0, "disk {number} was given");
        let field = format!("linux.devices[0] ({})", path(number));
        assert!(line.contains(&field) && line.contains(why), "{line}");
        Ok(())
    };

    let mut options = Vec::new();
    for number in 0..4 {
        options.extend(["--device", path(number)]);
    }
    let four = sandbox.container("four", &options, &["sleep", "1000"])?;
    let one = sandbox.container("one", &["--device", path(0)], &["sleep", "1000"])?;
    let write = format!("printf shared | dd of={} conv=fsync", path(0));
    four.exec_call(&[], &["sh", "-c", &write]).ok()?;
    let read = one.exec(&["head", "-c", "7", path(0)])?;
    assert_eq!(read.text(), "sharedx", "{}", read.both());
    assert!(fs::read(files.path().join("0"))?.starts_with(b"sharedx"));
    refused(4, "all 4 slots for disks are in use")?;
    for disk in &disks[..4] {
        let busy = disk.alone().err().and_then(|error| error.raw_os_error());
        assert_eq!(busy, Some(libc::EBUSY), "{}", disk.path());
    }

    four.remove()?;
    let held = disks[1].alone()?;
    refused(1, "it is in use on the host")?;
    drop(held);
    for number in [1, 4] {
        let command = ["blockdev", "--getsize64", path(number)];
        let again = sandbox.run("again", &["--device", path(number)], &command);
        assert_eq!(again.ok()?.text(), "1048576");
    }
    assert!(disks[0].alone().is_err(), "a container still has it");
    one.remove()?;
    disks[0].alone()?;
    sandbox.remove()
}
