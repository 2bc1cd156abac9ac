//! Real guests under real KVM: how they start, what they are given late, how they end.
//!
//! Needs a `/dev/kvm` that runs 64-bit guests, root, a C compiler, and the guest kernel as
//! `KATA_LIKE_KERNEL` with its `printk.json` beside it; so it is run inside the test host.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kata_like_boot::{
    CONTROL_FD, Channel, End, EndReason, Figures, HugePages, VERSION, VmBoot, VmCommand, VmFds,
    VmReport,
};

/// A guest's way from start to end takes a few seconds under emulation.
const PATIENCE: Duration = Duration::from_secs(60);

/// One VMM process and its control socket. Killed on drop.
struct Guest {
    vmm: Child,
    control: Channel,
    log: File,
    _agent: UnixStream,
    _folder: tempfile::TempDir,
}

struct Setup {
    scenario: &'static str,
    vcpus: u8,
    memory_mib: u64,
}

fn setup(scenario: &'static str, vcpus: u8) -> Setup {
    Setup {
        scenario,
        vcpus,
        memory_mib: 256,
    }
}

fn kernel() -> PathBuf {
    std::env::var_os("KATA_LIKE_KERNEL")
        .expect("KATA_LIKE_KERNEL names the guest kernel")
        .into()
}

/// The guest's PID 1, compiled once.
fn init() -> &'static [u8] {
    static INIT: OnceLock<Vec<u8>> = OnceLock::new();
    INIT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let binary = folder.path().join("init");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/init.c");
        let compiler = Command::new("cc")
            .args(["-static", "-O1", "-s", "-o"])
            .arg(&binary)
            .arg(source)
            .status();
        assert!(compiler.unwrap().success(), "compile {source}");
        fs::read(binary).unwrap()
    })
}

/// A "newc" cpio archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
fn cpio(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let trailer: (&str, u32, &[u8]) = ("TRAILER!!!", 0, b"");
    for (number, (name, mode, content)) in files.iter().chain([&trailer]).enumerate() {
        let fields = [
            number as u32 + 1,
            *mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08X}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

fn temporary(content: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file.into()
}

impl Guest {
    fn start(setup: &Setup) -> Self {
        let initrd = cpio(&[
            ("init", 0o100755, init()),
            ("scenario", 0o100644, setup.scenario.as_bytes()),
        ]);
        Self::start_with(
            setup,
            File::open(kernel()).unwrap().into(),
            temporary(&initrd),
        )
    }

    fn start_with(setup: &Setup, kernel_image: OwnedFd, initrd: OwnedFd) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (agent, vmm_agent) = UnixStream::pair().unwrap();
        let streams = UnixListener::bind(folder.path().join("streams")).unwrap();
        let layout = fs::read(kernel().with_file_name("printk.json")).unwrap();
        let log = tempfile::tempfile().unwrap();
        let boot = VmBoot {
            version: VERSION,
            uid: 64_000,
            memory_bytes: setup.memory_mib << 20,
            vcpus: setup.vcpus,
            huge_pages: HugePages::Transparent,
            agent_port: 1024,
            stream_port: 1025,
            shares: Vec::new(),
            printk: Some(serde_json::from_slice(&layout).unwrap()),
        };
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let fds = VmFds {
            kvm: kvm.unwrap().into(),
            kernel: kernel_image,
            initrd,
            guest_log: log.try_clone().unwrap().into(),
            agent: vmm_agent.into(),
            streams: streams.into(),
            shares: Vec::new(),
        };
        let (control, vmm_control) = Channel::pair().unwrap();
        let vmm = spawn(vmm_control.into_fd());
        boot.send(&fds, &control).unwrap();
        Self {
            vmm,
            control,
            log,
            _agent: agent,
            _folder: folder,
        }
    }

    fn report(&mut self) -> VmReport {
        match self.control.receive_within(PATIENCE) {
            Ok((report, _)) => report,
            Err(error) => {
                let _ = self.vmm.kill();
                panic!("{error}, {:?}", self.vmm.wait());
            }
        }
    }

    fn ask(&mut self, command: VmCommand) -> VmReport {
        self.control.send(&command, &[]).unwrap();
        self.report()
    }

    /// Everything the guest has said so far.
    fn log(&mut self) -> String {
        assert_eq!(self.ask(VmCommand::WriteLog), VmReport::LogWritten);
        let mut text = String::new();
        self.log.rewind().unwrap();
        self.log.read_to_string(&mut text).unwrap();
        text
    }

    /// Waits until the guest says `words`.
    fn wait_for(&mut self, words: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            if log.contains(words) {
                return log;
            }
            assert!(Instant::now() < end, "no {words:?} in:\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn figures(&mut self) -> Figures {
        match self.ask(VmCommand::Figures) {
            VmReport::Figures(figures) => figures,
            other => panic!("{other:?}"),
        }
    }

    /// Takes the last report; the process must have ended with its status a moment later.
    fn end(mut self) -> End {
        let end = loop {
            match self.report() {
                VmReport::Ended(end) => break end,
                VmReport::Running => {}
                other => panic!("{other:?}"),
            }
        };
        let status = self.vmm.wait().unwrap();
        let expected = i32::from(end.reason.exit_status());
        assert_eq!(status.code(), Some(expected), "{status}, {end:?}");
        end
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

fn spawn(control: OwnedFd) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kata-like-vmm"));
    command.stdin(Stdio::null());
    // SAFETY: dup2 is async-signal-safe; the closure owns the descriptor that it duplicates.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(control.as_raw_fd(), CONTROL_FD) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            // Without effect on a duplicate; needed where the socket is number 3 itself.
            libc::fcntl(CONTROL_FD, libc::F_SETFD, 0);
            Ok(())
        });
    }
    command.spawn().unwrap()
}

/// The plot: init runs on every vCPU there is, and asks for a reset; the VMM says so and ends.
#[test]
fn a_guest_boots_and_resets() {
    for vcpus in [1, 2] {
        let guest = Guest::start(&setup("reset", vcpus));
        let end = guest.end();
        assert_eq!(end.reason, EndReason::Reset, "{end:?}");
        let said = format!("init: {vcpus} cpus, reset");
        assert!(
            end.log_tail.iter().any(|line| line.contains(&said)),
            "{end:?}"
        );
    }
}

/// A device is filled in and bound long after boot, while two vCPUs run: virtio-mmio can't hot-plug.
#[test]
fn a_device_is_added_after_boot_under_two_vcpus() {
    let mut guest = Guest::start(&setup("entropy", 2));
    assert_eq!(guest.report(), VmReport::Running);
    guest.wait_for("init: 2 cpus");
    let filled = guest.ask(VmCommand::AddEntropy);
    if matches!(filled, VmReport::Refused { .. }) {
        // Without RDRAND the device is there from the start, and its slot is taken.
        assert!(format!("{filled:?}").contains("already"), "{filled:?}");
    } else {
        assert_eq!(filled, VmReport::SlotFilled { slot: 3 });
        let again = guest.ask(VmCommand::AddEntropy);
        assert!(matches!(again, VmReport::Refused { .. }), "{again:?}");
    }
    guest.wait_for("entropy: 32 bytes, random");
}

#[test]
fn a_panic_is_told_with_its_reason() {
    let end = Guest::start(&setup("panic", 1)).end();
    assert_eq!(end.reason, EndReason::Panic, "{end:?}");
    assert!(end.detail.contains("Attempted to kill init"), "{end:?}");
}

/// Whatever the guest does, a stop and a lost shim end the process at once.
#[test]
fn a_guest_that_spins_or_sleeps_is_stopped() {
    for scenario in ["spin", "hang"] {
        let mut guest = Guest::start(&setup(scenario, 2));
        assert_eq!(guest.report(), VmReport::Running);
        guest.wait_for(scenario);
        guest.control.send(&VmCommand::Stop, &[]).unwrap();
        let asked = Instant::now();
        assert_eq!(guest.end().reason, EndReason::Stopped);
        assert!(
            asked.elapsed() < Duration::from_secs(2),
            "{:?}",
            asked.elapsed()
        );
    }
    let mut guest = Guest::start(&setup("spin", 1));
    guest.wait_until_running();
    let (unused, _) = Channel::pair().unwrap();
    drop(std::mem::replace(&mut guest.control, unused));
    let left = Instant::now();
    assert_eq!(guest.vmm.wait().unwrap().code(), Some(0));
    assert!(
        left.elapsed() < Duration::from_secs(2),
        "{:?}",
        left.elapsed()
    );
}

impl Guest {
    fn wait_until_running(&mut self) {
        assert_eq!(self.report(), VmReport::Running);
    }
}

/// The figures of a boot to init: what later work is measured against.
#[test]
fn the_figures_count_exits_and_memory() {
    let mut guest = Guest::start(&setup("hang", 1));
    guest.wait_until_running();
    guest.wait_for("init: 1 cpus");
    let figures = guest.figures();
    println!("boot to init: {figures:?}");
    assert!(
        figures.exits > figures.user_exits && figures.user_exits > 50,
        "{figures:?}"
    );
    assert!(figures.resident_bytes > 8 << 20, "{figures:?}");
    assert!(figures.resident_bytes <= 256 << 20, "{figures:?}");
}

/// Each bad input is one line that names what is wrong, and the process is gone.
#[test]
fn bad_input_fails_in_one_line() {
    let file = || -> OwnedFd { File::open(kernel()).unwrap().into() };
    let good = cpio(&[("init", 0o100755, init())]);
    let image = fs::read(kernel()).unwrap();
    let small = Setup {
        memory_mib: 64,
        ..setup("reset", 1)
    };
    let large_initrd = vec![0; 48 << 20];
    let none = setup("reset", 0);
    let normal = setup("reset", 1);
    let cases = [
        (
            &normal,
            temporary(&image[..image.len() / 2]),
            temporary(&good),
            "complete",
        ),
        (&normal, temporary(b"#!/bin/sh\n"), temporary(&good), "ELF"),
        (&normal, file(), temporary(b""), "empty"),
        (&small, file(), temporary(&large_initrd), "memory"),
        (&none, file(), temporary(&good), "vCPUs"),
    ];
    for (setup, kernel_image, initrd, word) in cases {
        let end = Guest::start_with(setup, kernel_image, initrd).end();
        assert_eq!(end.reason, EndReason::Failed, "{end:?}");
        assert!(
            end.detail.contains(word) && !end.detail.contains('\n'),
            "{end:?}"
        );
    }
}
