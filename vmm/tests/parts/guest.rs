//! One VMM process with its guest, started as the shim starts it, and the questions that tests ask
//! it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kata_like_boot::{
    Channel, End, Figures, HugePages, PrintkLayout, VERSION, VmBoot, VmCommand, VmFds, VmReport,
    VmShare, VmState,
};
use kata_like_limits::{Patience, scaled};

use super::{PATIENCE, kernel, spawn, temporary};

static NEXT_UID: AtomicU32 = AtomicU32::new(64_000);

/// One VMM process and its control socket. Killed on drop.
pub struct Guest {
    pub vmm: Child,
    /// The VMM's user: no other guest's, since the threads of one user are counted together.
    pub uid: u32,
    pub control: Channel,
    /// The host's end of the agent's connection.
    pub agent: UnixStream,
    log: String,
    folder: tempfile::TempDir,
}

/// What a guest starts with.
pub struct Setup {
    pub initrd: Vec<u8>,
    pub vcpus: u8,
    pub memory_mib: u64,
    pub huge_pages: HugePages,
    pub kvm: &'static str,
    pub shares: Vec<(&'static str, UnixStream)>,
    /// Of the guest's log, if it is not that of the guest kernel.
    pub layout: Option<PrintkLayout>,
}

impl Setup {
    /// A guest of 256 MiB, without shares.
    pub fn new(initrd: Vec<u8>, vcpus: u8) -> Self {
        Self {
            initrd,
            vcpus,
            memory_mib: 256,
            huge_pages: HugePages::Transparent,
            kvm: "/dev/kvm",
            shares: Vec::new(),
            layout: None,
        }
    }
}

impl Guest {
    pub fn wait_until_running(&mut self) {
        assert_eq!(self.report(), VmReport::Running);
    }

    pub fn start(setup: &Setup) -> Self {
        let kernel = File::open(kernel()).unwrap();
        Self::start_with(setup, kernel.into(), temporary(&setup.initrd))
    }

    pub fn start_with(setup: &Setup, kernel_image: OwnedFd, initrd: OwnedFd) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (agent, vmm_agent) = UnixStream::pair().unwrap();
        agent.set_read_timeout(Some(scaled(PATIENCE))).unwrap();
        let streams = UnixListener::bind(folder.path().join("streams")).unwrap();
        let layout = setup.layout.clone().unwrap_or_else(|| {
            let layout = fs::read(kernel().with_file_name("printk.json")).unwrap();
            serde_json::from_slice(&layout).unwrap()
        });
        let boot = VmBoot {
            version: VERSION,
            uid: NEXT_UID.fetch_add(1, Ordering::Relaxed),
            memory_bytes: setup.memory_mib << 20,
            vcpus: setup.vcpus,
            huge_pages: setup.huge_pages,
            agent_port: 1024,
            stream_port: 1025,
            shares: setup
                .shares
                .iter()
                .map(|(tag, _)| VmShare {
                    tag: (*tag).to_owned(),
                })
                .collect(),
            printk: Some(layout),
        };
        let kvm = File::options().read(true).write(true).open(setup.kvm);
        let fds = VmFds {
            kvm: kvm.unwrap().into(),
            kernel: kernel_image,
            initrd,
            agent: vmm_agent.into(),
            streams: streams.into(),
            shares: setup
                .shares
                .iter()
                .map(|(_, connection)| connection.try_clone().unwrap().into())
                .collect(),
        };
        let (control, vmm_control) = Channel::pair().unwrap();
        let vmm = spawn(
            Path::new(env!("CARGO_BIN_EXE_kata-like-vmm")),
            vmm_control.into_fd(),
        );
        boot.send(&fds, &control).unwrap();
        Self {
            vmm,
            uid: boot.uid,
            control,
            agent,
            log: String::new(),
            folder,
        }
    }

    pub fn report(&mut self) -> VmReport {
        match self.control.receive_within(scaled(PATIENCE)) {
            Ok((report, _)) => report,
            Err(error) => {
                let _ = self.vmm.kill();
                panic!("{error}, {:?}", self.vmm.wait());
            }
        }
    }

    pub fn ask(&mut self, command: VmCommand) -> VmReport {
        self.control.send(&command, &[]).unwrap();
        self.report()
    }

    pub fn add_disk(&mut self, disk: &File, read_only: bool) -> VmReport {
        let command = VmCommand::AddDisk {
            read_only,
            bytes: { disk }.seek(SeekFrom::End(0)).unwrap(),
            block_size: 512,
        };
        self.control.send(&command, &[disk.as_fd()]).unwrap();
        self.report()
    }

    pub fn add_interface(&mut self, tap: &OwnedFd, mac: [u8; 6], mtu: u16) -> VmReport {
        let command = VmCommand::AddInterface { mac, mtu };
        self.control.send(&command, &[tap.as_fd()]).unwrap();
        self.report()
    }

    /// Empties a disk's slot as soon as the guest has let go of the disk.
    pub fn remove_disk(&mut self, slot: u32) {
        let patience = Patience::new(PATIENCE);
        loop {
            match self.ask(VmCommand::RemoveDisk { slot }) {
                VmReport::SlotEmptied => return,
                refused => assert!(!patience.is_over(), "{refused:?}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How many descriptors and threads the VMM has.
    pub fn holdings(&self) -> (usize, usize) {
        let count = |what| {
            let entries = fs::read_dir(format!("/proc/{}/{what}", self.vmm.id()));
            entries.unwrap().count()
        };
        (count("fd"), count("task"))
    }

    /// Everything that the guest has said so far.
    pub fn log(&mut self) -> String {
        loop {
            match self.ask(VmCommand::ReadLog) {
                VmReport::Log { text, more } => {
                    self.log.push_str(&text);
                    if !more {
                        return self.log.clone();
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// What the guest has said since the last look, as far as one answer holds it; or how it has
    /// ended.
    pub fn news(&mut self) -> Result<String, End> {
        // It fails if the VM has ended, which its last report says.
        let _ = self.control.send(&VmCommand::ReadLog, &[]);
        loop {
            match self.report() {
                VmReport::Log { text, .. } => return Ok(text),
                VmReport::Ended(end) => return Err(end),
                VmReport::AgentConnected(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Waits until the guest says `words`.
    pub fn wait_for(&mut self, words: &str) -> String {
        let patience = Patience::new(PATIENCE);
        loop {
            let log = self.log();
            if log.contains(words) {
                return log;
            }
            assert!(!patience.is_over(), "no {words:?} in:\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn wait_for_dial(&mut self) {
        let report = self.report();
        assert!(matches!(report, VmReport::AgentConnected(_)), "{report:?}");
    }

    /// The socket by which the host opens streams to the guest.
    pub fn streams(&self) -> PathBuf {
        self.folder.path().join("streams")
    }

    /// A new stream to the guest.
    pub fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.streams()).unwrap();
        stream.set_read_timeout(Some(scaled(PATIENCE))).unwrap();
        stream.set_write_timeout(Some(scaled(PATIENCE))).unwrap();
        stream
    }

    pub fn figures(&mut self) -> Figures {
        match self.ask(VmCommand::Figures) {
            VmReport::Figures(figures) => figures,
            other => panic!("{other:?}"),
        }
    }

    /// What the vCPUs do and how far the queues have come.
    pub fn state(&mut self) -> VmState {
        match self.ask(VmCommand::State) {
            VmReport::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    /// Takes the last report. A moment later the process must have ended with its status.
    pub fn end(mut self) -> End {
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
