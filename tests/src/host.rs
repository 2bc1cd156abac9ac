//! A host with a containerd of its own: one for each test binary, started by the first test.
//!
//! Tests of one binary run side by side. Those that count what is on the host, break it, or restart
//! containerd ask for it `alone`; the others share it. containerd dies with the test binary.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{
    Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc,
};
use std::thread;
use std::time::Duration;

use rustix::process::{Signal, set_parent_process_death_signal};

use crate::cri;
use crate::ctr::Call;
use crate::ctr_container::CtrContainer;
use crate::events::Events;
use crate::footprint::Footprint;
use crate::process::until;
use crate::{IMAGE, Patience, TestResult, failure, runtime};

/// containerd's namespace of the tests.
pub const NAMESPACE: &str = "tests";

/// How long the host may take to look as before once the last command has ended.
const SETTLE: Duration = Duration::from_secs(5);

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 2.1, on which most tests run.
    V2_1,
    /// The same with its CRI plugin.
    V2_1Cri,
    /// 1.7.
    V1_7,
    /// The same with its CRI plugin.
    V1_7Cri,
}

impl Version {
    fn directory(self) -> &'static str {
        match self {
            Self::V2_1 | Self::V2_1Cri => "containerd-2.1",
            Self::V1_7 | Self::V1_7Cri => "containerd-1.7",
        }
    }

    /// containerd's namespace of what is done through it.
    fn namespace(self) -> &'static str {
        match self {
            Self::V2_1 | Self::V1_7 => NAMESPACE,
            Self::V2_1Cri | Self::V1_7Cri => cri::NAMESPACE,
        }
    }

    /// The archives of the images that it needs.
    fn images(self) -> &'static [&'static str] {
        match self {
            Self::V2_1 | Self::V1_7 => &["busybox.tar"],
            Self::V2_1Cri | Self::V1_7Cri => &["busybox.tar", "pause.tar"],
        }
    }
}

#[allow(dead_code, reason = "held, never looked at")]
enum Guard {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// The host, for as long as one test uses it.
pub struct Host {
    daemon: Arc<Daemon>,
    _guard: Guard,
}

static DAEMON: OnceLock<Result<Arc<Daemon>, String>> = OnceLock::new();
static USE: RwLock<()> = RwLock::new(());
static COUNTER: AtomicU32 = AtomicU32::new(0);

impl Host {
    /// The host together with other tests.
    pub fn shared() -> TestResult<Self> {
        Self::on(Version::V2_1, false)
    }

    /// The host with no other test on it.
    pub fn alone() -> TestResult<Self> {
        Self::on(Version::V2_1, true)
    }

    /// The same for either version; one test binary stays with one.
    pub fn on(version: Version, alone: bool) -> TestResult<Self> {
        let guard = if alone {
            Guard::Alone(USE.write().unwrap_or_else(PoisonError::into_inner))
        } else {
            Guard::Shared(USE.read().unwrap_or_else(PoisonError::into_inner))
        };
        let daemon = DAEMON
            .get_or_init(|| {
                Daemon::start(version, &[])
                    .map(Arc::new)
                    .map_err(|error| error.to_string())
            })
            .clone()
            .map_err(failure)?;
        if daemon.version != version {
            return Err(failure("one test binary uses one version of containerd"));
        }
        Ok(Self {
            daemon,
            _guard: guard,
        })
    }

    /// A host alone, and on it a further containerd that `wrapper` starts: what it sees can differ.
    pub fn wrapped(wrapper: &[&str]) -> TestResult<Self> {
        let guard = Guard::Alone(USE.write().unwrap_or_else(PoisonError::into_inner));
        Ok(Self {
            daemon: Arc::new(Daemon::start(Version::V2_1, wrapper)?),
            _guard: guard,
        })
    }

    /// A host alone, and on it a further containerd that logs at this level, as do its shims.
    pub fn logging(level: &str) -> TestResult<Self> {
        let guard = Guard::Alone(USE.write().unwrap_or_else(PoisonError::into_inner));
        let daemon = Arc::new(Daemon::start_with(Version::V2_1, &[], level)?);
        Ok(Self {
            daemon,
            _guard: guard,
        })
    }

    /// A name that no other test uses.
    pub fn name(&self, stem: &str) -> String {
        format!(
            "{stem}-{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// `ctr` with these arguments.
    pub fn ctr<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Call {
        let mut command = self.daemon.ctr();
        command.args(arguments);
        Call::new(command)
    }

    /// The same as a command, for those who want it on a terminal.
    pub fn ctr_command(&self) -> Command {
        self.daemon.ctr()
    }

    /// `ctr run --rm` of the test image in the foreground, with further options of `ctr run`.
    pub fn run(&self, id: &str, options: &[&str], command: &[&str]) -> Call {
        self.ctr(run_arguments(&["--rm"], id, options, command))
    }

    /// A pod in the background: `ctr run -d`.
    pub fn start(
        &self,
        stem: &str,
        options: &[&str],
        command: &[&str],
    ) -> TestResult<CtrContainer<'_>> {
        self.start_as(&self.name(stem), options, command)
    }

    /// The same with an id that was chosen before.
    pub fn start_as(
        &self,
        id: &str,
        options: &[&str],
        command: &[&str],
    ) -> TestResult<CtrContainer<'_>> {
        // First: a failed start is cleaned up, too.
        let pod = CtrContainer::new(self, id.to_owned());
        self.ctr(run_arguments(&["-d"], id, options, command))
            .ok()?;
        Ok(pod)
    }

    /// What the host looks like.
    pub fn footprint(&self) -> Footprint {
        Footprint::take(&self.daemon.directory)
    }

    /// Fails unless the host looks as before, now or very soon.
    pub fn leaves_nothing(&self, before: &Footprint) -> TestResult {
        let mut difference = String::new();
        let settled = until("the host looks as before", SETTLE, || {
            difference = before.difference(&self.footprint());
            difference.is_empty()
        });
        settled.map_err(|error| failure(format!("{error}:{difference}")))
    }

    /// The same where containerd was started again since, and is another process now.
    pub fn leaves_nothing_but_containerd(&self, before: &Footprint) -> TestResult {
        let directory = self.daemon.directory.display().to_string();
        let mut difference = String::new();
        let settled = until("the host looks as before", SETTLE, || {
            difference = before.difference(&self.footprint());
            difference.lines().all(|line| {
                line.is_empty() || (line.contains(" processes: ") && line.contains(&directory))
            })
        });
        settled.map_err(|error| failure(format!("{error}:{difference}")))
    }

    /// Starts to listen to containerd's events.
    pub fn events(&self) -> TestResult<Events> {
        let events = Events::listen(self.daemon.ctr())?;
        // ctr says nothing when it has subscribed; an event of our own shows it.
        let marker = self.name("marker");
        let patience = Patience::new(Duration::from_secs(30));
        loop {
            self.ctr(["namespaces", "create", &marker]).output()?;
            let heard = events.wait(
                "event of a namespace",
                Duration::from_millis(500),
                |event| event.fields["name"].as_str() == Some(&marker),
            );
            self.ctr(["namespaces", "remove", &marker]).output()?;
            if heard.is_ok() || patience.is_over() {
                return heard.map(|_| events);
            }
        }
    }

    /// The directory of a task's bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.daemon
            .directory
            .join("state/io.containerd.runtime.v2.task")
            .join(self.daemon.version.namespace())
            .join(id)
    }

    /// containerd's directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.daemon.directory
    }

    /// containerd's socket.
    pub fn address(&self) -> PathBuf {
        self.daemon.socket()
    }

    /// What containerd and the shims have logged.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.daemon.directory.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Kills containerd.
    pub fn kill_containerd(&self) -> TestResult {
        self.daemon.stop();
        Ok(())
    }

    /// Starts containerd again on the same state.
    pub fn start_containerd(&self) -> TestResult {
        self.daemon.launch()
    }
}

fn run_arguments(how: &[&str], id: &str, options: &[&str], command: &[&str]) -> Vec<String> {
    let runtime = runtime();
    let mut all = vec!["run", "--runtime", &runtime];
    all.extend(how);
    all.extend(options);
    all.extend([IMAGE, id]);
    all.extend(command);
    all.into_iter().map(str::to_owned).collect()
}

/// A containerd, and how it was started.
struct Daemon {
    version: Version,
    directory: PathBuf,
    wrapper: Vec<String>,
    child: Mutex<Option<Child>>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Daemon {
    fn start(version: Version, wrapper: &[&str]) -> TestResult<Self> {
        Self::start_with(version, wrapper, "info")
    }

    fn start_with(version: Version, wrapper: &[&str], level: &str) -> TestResult<Self> {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let directory = PathBuf::from(format!("/run/tests.{}.{number}", std::process::id()));
        fs::create_dir_all(&directory)?;
        // Made by the first container and kept by all: there before anybody counts.
        let namespace = version.namespace();
        let tasks = Path::new("io.containerd.runtime.v2.task").join(namespace);
        for parent in [
            PathBuf::from("/sys/fs/cgroup").join(namespace),
            directory.join("state").join(&tasks),
            directory.join("root").join(&tasks),
        ] {
            fs::create_dir_all(&parent)?;
        }
        let daemon = Self {
            version,
            directory,
            wrapper: wrapper.iter().map(|word| (*word).to_owned()).collect(),
            child: Mutex::new(None),
        };
        fs::write(daemon.directory.join("config.toml"), daemon.config(level)?)?;
        daemon.launch()?;
        for image in version.images() {
            let mut import = daemon.ctr();
            import.args(["image", "import"]).arg(tools()?.join(image));
            Call::new(import).ok()?;
        }
        Ok(daemon)
    }

    fn config(&self, level: &str) -> TestResult<String> {
        let here = self.directory.display();
        let (number, disabled, plugins) = match self.version {
            Version::V2_1 | Version::V1_7 => (
                2,
                "\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \
                 \"io.containerd.cri.v1.runtime\", ",
                String::new(),
            ),
            Version::V2_1Cri => (3, "", self.cri()?),
            Version::V1_7Cri => (2, "", self.cri()?),
        };
        let imports = cri::imports(self.version, &self.directory)?;
        Ok(format!(
            "version = {number}\nimports = {imports:?}\nroot = \"{here}/root\"\nstate = \"{here}/state\"\n\
             disabled_plugins = [{disabled}\"io.containerd.nri.v1.nri\", \
             \"io.containerd.internal.v1.opt\", \"io.containerd.tracing.processor.v1.otlp\"]\n\
             [grpc]\naddress = \"{here}/containerd.sock\"\n\
             [ttrpc]\naddress = \"{here}/containerd.sock.ttrpc\"\n\
             [debug]\nlevel = \"{level}\"\n{plugins}"
        ))
    }

    fn cri(&self) -> TestResult<String> {
        cri::set_up(self.version, &self.directory, &tools()?)
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    fn ctr(&self) -> Command {
        let program = tools()
            .unwrap_or_default()
            .join(self.version.directory())
            .join("ctr");
        let mut command = Command::new(program);
        command
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", self.version.namespace()]);
        command
    }

    fn launch(&self) -> TestResult {
        let tools = tools()?;
        let programs = tools.join(self.version.directory());
        let installed =
            std::env::var("KATA_LIKE_PREFIX").unwrap_or_else(|_| "/run/installed".into());
        let mut words = self.wrapper.clone();
        words.push(programs.join("containerd").display().to_string());
        let mut command = Command::new(&words[0]);
        let log = File::options()
            .append(true)
            .create(true)
            .open(self.directory.join("log"))?;
        command
            .args(&words[1..])
            .arg("--config")
            .arg(self.directory.join("config.toml"))
            .env(
                "PATH",
                format!(
                    "{installed}/bin:{}:{}:{}",
                    programs.display(),
                    tools.join("runc").display(),
                    std::env::var("PATH").unwrap_or_default()
                ),
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = spawn_bound(command)?;
        *self.child.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        let mut last = String::new();
        until("containerd answers", Duration::from_secs(60), || {
            if !self.socket().exists() {
                return false;
            }
            let mut version = self.ctr();
            version.arg("version");
            match Call::new(version).ok() {
                Ok(_) => true,
                Err(error) => {
                    last = error.to_string();
                    false
                }
            }
        })
        .map_err(|error| failure(format!("{error} {last}")))
    }

    fn stop(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut child) = child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Where the test host keeps containerd, runc and the image.
pub(crate) fn tools() -> TestResult<PathBuf> {
    std::env::var_os("TEST_HOST_TOOLS")
        .map(PathBuf::from)
        .ok_or_else(|| failure("these tests run in a test host: see tools/test-host"))
}

/// Takes back what the C library's posix_spawn has left in this process and containers would
/// inherit: two signals that it keeps to itself are ignored, and its own functions refuse to change
/// that.
fn heed_all_signals() {
    let default = [0u64; 4]; // The kernel's `struct sigaction`.
    for signal in [32, 33] {
        // SAFETY: the kernel reads the live structure, whose zeros are the default action, and
        // eight bytes are the size of its signal set.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null::<u8>(),
                8,
            )
        };
    }
}

/// Spawns a process that the kernel kills when this one ends, however it ends.
///
/// The signal is bound to the thread that spawns, so that thread is never let go.
pub fn spawn_bound(mut command: Command) -> io::Result<Child> {
    // SAFETY: three system calls between fork and exec; nothing is allocated or locked.
    unsafe {
        command.pre_exec(|| {
            heed_all_signals();
            Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
        });
    }
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let _ = sender.send(command.spawn());
        loop {
            thread::park();
        }
    });
    receiver.recv().map_err(io::Error::other)?
}
