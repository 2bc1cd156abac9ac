//! One VMM and its fs server, started as the shim starts them.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kata_like_boot::{
    CachePolicy, Channel, End, FsdBoot, FsdFds, FsdReport, FsdShare, HugePages, VERSION, VmBoot,
    VmFds, VmReport, VmShare,
};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, open_tree,
    unmount,
};

use crate::parts::{PATIENCE, compiled, cpio, kernel, spawn, temporary};

pub const SECOND: Duration = Duration::from_secs(1);

pub struct Pod {
    vmm: Child,
    control: Channel,
    /// The host's end of the agent's connection.
    pub agent: UnixStream,
    fs_server: Option<(Child, Channel)>,
    folder: tempfile::TempDir,
}

impl Pod {
    /// Starts a guest with these shares, `volumes` being one that the host may change.
    pub fn start(shares: &[&str]) -> Self {
        // SAFETY: the flag moves the calling thread alone to a copy of the mount table.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        let cut = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", cut).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let fs_server = (!shares.is_empty()).then(|| start_fs_server(folder.path(), shares));
        let connections = (0..shares.len())
            .map(|number| UnixStream::connect(socket(folder.path(), number)).unwrap());
        let (agent, vmm_agent) = UnixStream::pair().unwrap();
        agent.set_read_timeout(Some(PATIENCE)).unwrap();
        let kernel = kernel();
        let layout = fs::read(kernel.with_file_name("printk.json")).unwrap();
        let boot = VmBoot {
            version: VERSION,
            uid: 64_000,
            memory_bytes: 256 << 20,
            vcpus: 2,
            huge_pages: HugePages::Transparent,
            agent_port: 1024,
            stream_port: 1025,
            shares: shares
                .iter()
                .map(|tag| VmShare { tag: (*tag).into() })
                .collect(),
            printk: Some(serde_json::from_slice(&layout).unwrap()),
        };
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let fds = VmFds {
            kvm: kvm.unwrap().into(),
            kernel: File::open(kernel).unwrap().into(),
            initrd: initrd(),
            guest_log: tempfile::tempfile().unwrap().into(),
            agent: vmm_agent.into(),
            streams: UnixListener::bind(folder.path().join("streams"))
                .unwrap()
                .into(),
            shares: connections.map(OwnedFd::from).collect(),
        };
        let (control, vmm_control) = Channel::pair().unwrap();
        let vmm = spawn(
            Path::new(env!("CARGO_BIN_EXE_kata-like-vmm")),
            vmm_control.into_fd(),
        );
        boot.send(&fds, &control).unwrap();
        Self {
            vmm,
            control,
            agent,
            fs_server,
            folder,
        }
    }

    /// The VMM's next report but the first.
    pub fn report(&mut self) -> VmReport {
        loop {
            match self.control.receive_within(PATIENCE) {
                Ok((VmReport::Running, _)) => {}
                Ok((report, _)) => return report,
                Err(error) => {
                    let _ = self.vmm.kill();
                    panic!("{error}, {:?}", self.vmm.wait());
                }
            }
        }
    }

    pub fn wait_for_dial(&mut self) {
        let report = self.report();
        assert!(matches!(report, VmReport::AgentConnected(_)), "{report:?}");
    }

    pub fn ended(&mut self) -> End {
        match self.report() {
            VmReport::Ended(end) => end,
            other => panic!("{other:?}"),
        }
    }

    /// A new stream to the guest.
    pub fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("streams")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Mounts a file system into the share.
    pub fn mount(&self, path: &str) -> PathBuf {
        let at = share(self.folder.path()).join(path);
        let _ = fs::create_dir(&at);
        mount_tmpfs(&at);
        at
    }

    /// Unmounts it as soon as nothing uses it any more.
    pub fn unmount_soon(&self, path: &str) {
        let at = share(self.folder.path()).join(path);
        let end = Instant::now() + 5 * SECOND;
        while let Err(errno) = unmount(&at, UnmountFlags::empty()) {
            assert!(Instant::now() < end, "{path}: {errno}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn kill_vmm(&mut self) {
        self.vmm.kill().unwrap();
    }

    pub fn kill_fs_server(&mut self) {
        self.fs_server.as_mut().unwrap().0.kill().unwrap();
    }

    /// Waits for the fs server's end: a second at most.
    pub fn fs_server_status(&mut self) -> ExitStatus {
        let end = Instant::now() + SECOND;
        loop {
            if let Some(status) = self.fs_server.as_mut().unwrap().0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the fs server still runs");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
        if let Some((server, _)) = &mut self.fs_server {
            let _ = server.kill();
            let _ = server.wait();
        }
        let _ = unmount(share(self.folder.path()), UnmountFlags::DETACH);
    }
}

fn start_fs_server(folder: &Path, shares: &[&str]) -> (Child, Channel) {
    let share = share(folder);
    fs::create_dir(&share).unwrap();
    mount_tmpfs(&share);
    mount_change(&share, MountPropagationFlags::SHARED).unwrap();
    for directory in shares {
        fs::create_dir(share.join(directory)).unwrap();
    }
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let fds = FsdFds {
        tree: open_tree(CWD, &share, clone).unwrap(),
        sockets: (0..shares.len())
            .map(|number| UnixListener::bind(socket(folder, number)).unwrap().into())
            .collect(),
    };
    let boot = FsdBoot {
        version: VERSION,
        shares: shares
            .iter()
            .map(|directory| FsdShare {
                directory: (*directory).into(),
                cache: match *directory {
                    "volumes" => CachePolicy::Shared,
                    _ => CachePolicy::Private,
                },
            })
            .collect(),
    };
    let (control, server_control) = Channel::pair().unwrap();
    let program = std::env::var_os("KATA_LIKE_FSD").expect("KATA_LIKE_FSD names the fs server");
    let server = spawn(Path::new(&program), server_control.into_fd());
    boot.send(&fds, &control).unwrap();
    let (report, _) = control.receive_within::<FsdReport>(PATIENCE).unwrap();
    assert_eq!(report, FsdReport::Serving);
    (server, control)
}

fn share(folder: &Path) -> PathBuf {
    folder.join("share")
}

fn socket(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("{number}.sock"))
}

fn mount_tmpfs(at: &Path) {
    mount("none", at, "tmpfs", MountFlags::empty(), None).unwrap();
}

/// An archive with PID 1 alone, compiled once.
fn initrd() -> OwnedFd {
    static INIT: OnceLock<Vec<u8>> = OnceLock::new();
    let init = INIT.get_or_init(|| compiled("tests/devices/init.c"));
    temporary(&cpio(&[("init", 0o100755, init)]))
}
