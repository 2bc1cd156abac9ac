//! Devices of the host: privileged containers start whatever the host has; block devices become
//! disks of the guest within their rules; a device that can't be given is refused by its name.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use kata_like_tests::annotations::{Role, annotate};
use kata_like_tests::disk::LoopDevice;
use kata_like_tests::rootfs::Rootfs;
use kata_like_tests::{CtrPod, Host, Parts, TestResult, kata_like_only};
use rustix::fs::{major, minor};
use serde_json::{Value, json};

/// What a privileged container is for: its own mounts, cgroups, sysctls, nodes and loop devices.
const PRIVILEGED: &str = "
    ls /dev
    grep -c '^CapEff:.000001ffffffffff$' /proc/self/status
    mkdir -p /mnt; mount -t tmpfs none /mnt; umount /mnt
    mkdir /sys/fs/cgroup/own; rmdir /sys/fs/cgroup/own
    echo 1 >/proc/sys/net/ipv4/ip_forward
    echo full >/dev/full || echo 'full is full'";

/// Where every device is allowed.
const LOOP: &str = "
    [ -e /dev/loop-control ] || mknod /dev/loop-control c 10 237
    dd if=/dev/zero of=/tmp/image bs=1024 count=1024
    mke2fs -F /tmp/image >/dev/null
    loop=$(losetup -f)
    mknod $loop b 7 ${loop#/dev/loop}
    losetup $loop /tmp/image
    mount -t ext2 $loop /mnt
    echo works >/mnt/file; cat /mnt/file
    umount /mnt; losetup -d $loop";

/// With all devices of the host in the spec and without, more than once: each container starts, has
/// the guest's devices and none of the host's, and may do as it likes there. The log has the
/// devices that were left out.
#[test]
fn privileged_containers_start_whatever_the_host_has() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let sandbox = CtrPod::start(&host, &[])?;
    let cgroup = "--mount=type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw:nosuid:noexec:nodev";
    let all: &[&str] = &["--privileged", cgroup];
    let none: &[&str] = &["--privileged", "--privileged-without-host-devices", cgroup];
    let with_loop = format!("{PRIVILEGED}{LOOP}");
    let said: &[&str] = &["1", "full is full", "works"];
    let mut parts = Parts::new();
    for (name, options, script, said) in [
        ("all devices", all, with_loop.as_str(), said),
        ("no devices", none, PRIVILEGED, &said[..2]),
        ("all devices again", all, with_loop.as_str(), said),
    ] {
        parts.run(name, || {
            let output = sandbox
                .run("privileged", options, &["sh", "-ec", script])
                .ok()?;
            let text = output.text();
            let lines: Vec<_> = text.lines().collect();
            let (devices, rest) = lines.split_at(lines.len().saturating_sub(said.len()));
            assert_eq!(rest, said, "{text}");
            for usual in ["full", "null", "ptmx", "random", "tty", "zero"] {
                assert!(devices.contains(&usual), "no {usual}: {text}");
            }
            for of_host in ["kvm", "loop0", "port", "ttyS0"] {
                assert!(!devices.contains(&of_host), "{of_host}: {text}");
            }
            Ok(())
        });
    }
    parts.run("the log", || {
        let log = host.log();
        let line = log
            .lines()
            .find(|line| line.contains("privileged: these devices of the host are left out"))
            .unwrap_or_default();
        for path in ["/dev/kvm", "/dev/ttyS0"] {
            assert!(line.contains(path), "no {path} in: {line:?}");
        }
        Ok(())
    });

    for (path, why) in [
        ("/dev/kvm", "the guest can't run virtual machines itself"),
        ("/dev/ttyS0", "only block devices of the host can be given"),
    ] {
        parts.run(path, || {
            let refused = sandbox
                .run("refused", &["--device", path], &["true"])
                .output()?;
            let line = refused.error_text();
            assert_ne!(refused.status, 0, "{path} was given");
            let field = format!("linux.devices[0] ({path}) is not supported");
            assert!(line.contains(&field) && line.contains(why), "{line}");
            Ok(())
        });
    }
    parts.run("the pod's end", || sandbox.remove());
    parts.end()
}

/// A loop device on a file of a mebibyte, detached with the value.
struct Disk(LoopDevice);

impl Disk {
    fn new(image: &Path) -> TestResult<Self> {
        fs::write(image, vec![b'x'; 1 << 20])?;
        Ok(Self(LoopDevice::attach(image)?))
    }

    fn path(&self) -> &str {
        self.0.path()
    }

    /// Opens the device exclusively, as a mount does.
    fn alone(&self) -> std::io::Result<File> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(self.path())
    }

    fn number(&self) -> TestResult<(u32, u32)> {
        let device = fs::metadata(self.path())?.rdev();
        Ok((major(device), minor(device)))
    }
}

/// Four disks at a time. Containers of a pod share them, and nobody else on the host can have them
/// meanwhile.
#[test]
fn disks_are_shared_in_the_pod_and_with_nobody_else() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let files = tempfile::tempdir()?;
    let disks: Vec<Disk> = (0..5)
        .map(|number| Disk::new(&files.path().join(number.to_string())))
        .collect::<TestResult<_>>()?;
    let path = |number: usize| disks[number].path();
    let sandbox = CtrPod::start(&host, &[])?;
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
    refused(4, "all 4 slots for that are in use")?;
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

/// If the device rules don't allow writes, the machine's disk is read-only: root in the guest, with
/// every device allowed there, changes nothing. SELinux labels are the host's and have no effect.
#[test]
fn a_read_only_disk_is_the_hosts_word() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let files = tempfile::tempdir()?;
    let image = files.path().join("image");
    let disk = Disk::new(&image)?;
    let root = Rootfs::mount(&host)?;
    let sandbox = CtrPod::start(&host, &[])?;
    let spec = reading(&root, &sandbox, &disk)?;
    let pod = root.start(&host.name("reads"), &spec)?;
    let path = disk.path();
    let script = format!(
        "head -c 1 {path}; echo; blockdev --getro {path}; \
         blockdev --setrw {path}; mknod /dev/own b $((0x$(stat -c %t {path}))) $((0x$(stat -c %T {path}))); \
         for to in {path} /dev/own; do dd if=/dev/zero of=$to count=8 conv=fsync 2>/dev/null && echo written; done"
    );
    let tried = pod.exec(&["sh", "-c", &script])?;
    assert_eq!(tried.text(), "x\n1", "{}", tried.both());
    let writer = sandbox
        .run("writes", &["--device", path], &["true"])
        .output()?;
    let line = writer.error_text();
    assert!(
        line.contains("another container of the pod has it read-only"),
        "{line}"
    );
    pod.remove()?;
    sandbox.remove()?;
    assert!(fs::read(image)?.iter().all(|byte| *byte == b'x'));
    Ok(())
}

/// The spec of a container of a pod that may read a disk of the host, and may use all disks in the
/// guest.
fn reading(root: &Rootfs, sandbox: &CtrPod, disk: &Disk) -> TestResult<Value> {
    let mut spec = root.spec(&["sleep", "1000"])?;
    let (major, minor) = disk.number()?;
    annotate(&mut spec, Role::Container, sandbox.first().id());
    spec["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
    let capabilities = json!(["CAP_MKNOD", "CAP_SYS_ADMIN"]);
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = capabilities.clone();
    }
    let linux = &mut spec["linux"];
    linux["mountLabel"] = json!("system_u:object_r:container_file_t:s0");
    for namespace in linux["namespaces"].as_array_mut().into_iter().flatten() {
        let file = match namespace["type"].as_str() {
            Some("network") => "net",
            Some(kind @ ("ipc" | "uts")) => kind,
            _ => continue,
        };
        namespace["path"] = json!(format!("/proc/{}/ns/{file}", sandbox.pid()));
    }
    linux["devices"] = json!([{"path": disk.path(), "type": "b", "major": major, "minor": minor, "fileMode": 0o666}]);
    let mut rules = vec![
        json!({"allow": false, "access": "rwm"}),
        json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "r"}),
    ];
    // The kernel puts drivers that ask for any number here (devices.txt).
    rules.extend(
        (234..=254).map(
            |of_guest| json!({"allow": true, "type": "b", "major": of_guest, "access": "rwm"}),
        ),
    );
    linux["resources"]["devices"] = json!(rules);
    Ok(spec)
}
