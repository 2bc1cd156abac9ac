//! A child process of the shim: born in its cgroup, with the descriptors it is handed and no other,
//! watched and reaped by its pidfd.
//!
//! Called by `launch` (vmm, fsd), `stand_in` and `bootstrap` (the daemon). A child is never moved
//! into its cgroup afterwards: clone3(2) with CLONE_INTO_CGROUP puts it there before its first
//! instruction. Nobody in the shim waits for "any child": each is waited for through its pidfd,
//! by [`Child`] alone.

use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

/// The network namespace that a child lives in.
#[derive(Clone, Copy, Debug)]
pub enum Network<'a> {
    /// The shim's.
    Inherited,
    /// A new one, its own.
    New,
    /// An existing one.
    Join(BorrowedFd<'a>),
}

/// How a child is born.
#[derive(Debug)]
pub struct Birth<'a> {
    /// The program's path.
    pub program: &'a Path,
    /// Its arguments; the first is its name.
    pub arguments: &'a [&'a str],
    /// Its environment, `NAME=value`.
    pub environment: &'a [String],
    /// The directory it starts in.
    pub directory: &'a Path,
    /// A directory of cgroup2 that it is born in; none: the shim's own cgroup.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Its network namespace.
    pub network: Network<'a>,
    /// The mount namespace that it lives in; none: the shim's.
    pub mounts: Option<BorrowedFd<'a>>,
    /// The SELinux label that its program begins under; none: what the host's policy says of a child of the shim.
    pub label: Option<&'a str>,
    /// Standard input, output, error and then descriptors 3, 4, …; none: `/dev/null`.
    pub descriptors: &'a [Option<BorrowedFd<'a>>],
}

/// Why a child could not be born.
#[derive(Debug, thiserror::Error)]
pub enum BirthError {
    /// A name holds a zero byte.
    #[error("start {program:?}: a NUL in its path, arguments or environment")]
    Nul {
        /// The program.
        program: String,
    },
    /// A step of the parent failed.
    #[error("{step} to start {program}")]
    Parent {
        /// What was being done.
        step: &'static str,
        /// The program.
        program: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A step of the child failed, the last one being the exec itself.
    #[error("{step} {program}")]
    Child {
        /// What was being done.
        step: &'static str,
        /// The program.
        program: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A process that was born and is not reaped yet.
#[derive(Debug)]
pub struct Newborn {
    /// Its pid.
    pub pid: u32,
    /// Refers to the process, whoever has its pid later.
    pub pidfd: OwnedFd,
}

/// struct clone_args of clone3(2), up to `cgroup`.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The child's steps, as it reports them through the pipe.
const STEPS: [&str; 7] = [
    "arrange the descriptors of",
    "join the network namespace of",
    "enter the mount namespace of",
    "enter the directory of",
    "close the descriptors of",
    "set the SELinux label of",
    "run",
];

/// Gives birth. Returns when the program runs or could not be run; blocks for that long.
pub fn birth(how: &Birth) -> Result<Newborn, BirthError> {
    let program = how.program.display().to_string();
    let plan = Plan::new(how).map_err(|_| BirthError::Nul {
        program: program.clone(),
    })?;
    let failed = |step, source: io::Error| BirthError::Parent {
        step,
        program: program.clone(),
        source,
    };
    let null = rustix::fs::open(
        c"/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .map_err(|errno| failed("open /dev/null", errno.into()))?;
    let (report, reporter) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|errno| failed("make a pipe", errno.into()))?;
    let mut sources: Vec<RawFd> = how
        .descriptors
        .iter()
        .map(|fd| fd.map_or(null.as_raw_fd(), |fd| fd.as_raw_fd()))
        .collect();
    while sources.len() < 3 {
        sources.push(null.as_raw_fd());
    }
    let mut pidfd: RawFd = -1;
    let mut arguments = CloneArgs {
        flags: libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND,
        pidfd: std::ptr::from_mut(&mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = how.cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    if matches!(how.network, Network::New) {
        arguments.flags |= libc::CLONE_NEWNET as u64;
    }
    // SAFETY: like fork(2): without CLONE_VM the child has its own copy of memory, and no stack or
    // TLS is named, so it returns here on the copy of this one.
    // - `arguments` is a live struct clone_args whose size is passed, `pidfd` a live c_int; the
    //   kernel writes the latter in the parent only.
    // - Other threads do not exist in the child, so locks they held (the allocator's too) stay
    //   locked there: `Plan::run` allocates nothing, takes no lock and never returns.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_mut(&mut arguments),
            size_of::<CloneArgs>(),
        )
    };
    match pid {
        -1 => Err(failed(
            if how.cgroup.is_some() {
                "clone into its cgroup"
            } else {
                "clone"
            },
            io::Error::last_os_error(),
        )),
        0 => plan.run(&mut sources, how, reporter.as_raw_fd()),
        pid => {
            // SAFETY: clone3 has succeeded with CLONE_PIDFD: `pidfd` is a new descriptor that
            // nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            drop(reporter);
            let newborn = Newborn {
                pid: u32::try_from(pid).unwrap_or_default(),
                pidfd,
            };
            match read_report(&report) {
                None => Ok(newborn),
                Some((step, errno)) => {
                    let _ = waitid(WaitId::PidFd(newborn.pidfd.as_fd()), WaitIdOptions::EXITED);
                    Err(BirthError::Child {
                        step: STEPS.get(step).copied().unwrap_or("start"),
                        program,
                        source: io::Error::from_raw_os_error(errno),
                    })
                }
            }
        }
    }
}

/// The child's report: end-of-file once the program runs, else its step and errno.
fn read_report(report: &OwnedFd) -> Option<(usize, i32)> {
    let mut bytes = [0u8; 8];
    loop {
        match rustix::io::read(report, &mut bytes) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(8) => {
                let [a, b, c, d, e, f, g, h] = bytes;
                let step = i32::from_ne_bytes([a, b, c, d]);
                let errno = i32::from_ne_bytes([e, f, g, h]);
                return Some((usize::try_from(step).unwrap_or(usize::MAX), errno));
            }
            _ => return None,
        }
    }
}

/// All that the child needs, made before it is born.
struct Plan {
    program: CString,
    directory: CString,
    _strings: Vec<CString>,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    label: Option<CString>,
}

impl Plan {
    fn new(how: &Birth) -> Result<Self, std::ffi::NulError> {
        let mut strings = Vec::new();
        let mut pointers = |texts: &mut dyn Iterator<Item = &str>| {
            let mut list = Vec::new();
            for text in texts {
                let text = CString::new(text)?;
                // A CString's bytes are on the heap: they stay where they are when it moves.
                list.push(text.as_ptr());
                strings.push(text);
            }
            list.push(std::ptr::null());
            Ok(list)
        };
        let arguments = pointers(&mut how.arguments.iter().copied())?;
        let environment = pointers(&mut how.environment.iter().map(String::as_str))?;
        Ok(Self {
            program: CString::new(how.program.as_os_str().as_bytes())?,
            directory: CString::new(how.directory.as_os_str().as_bytes())?,
            _strings: strings,
            arguments,
            environment,
            label: how.label.map(CString::new).transpose()?,
        })
    }

    /// The child's life before its program. System calls only: see the SAFETY of clone3 above.
    fn run(&self, sources: &mut [RawFd], how: &Birth, reporter: RawFd) -> ! {
        let count = sources.len() as c_int;
        // Above every target, so that no dup2 below overwrites what a later one needs.
        let Ok((reporter, network, mounts)) = lift_all(sources, reporter, how, count) else {
            fail(reporter, 0)
        };
        for (target, source) in sources.iter().enumerate() {
            // SAFETY: dup2 on numbers only; both are below the limit, or it fails with EBADF.
            if unsafe { libc::dup2(*source, target as c_int) } < 0 {
                fail(reporter, 0);
            }
        }
        // SAFETY: setns and setpgid take numbers; sigprocmask reads a live, initialised set;
        // chdir and execve read C strings and arrays that `self` keeps alive, the arrays ending
        // in a null pointer; umask and close_range take numbers.
        unsafe {
            if network >= 0 && libc::setns(network, libc::CLONE_NEWNET) != 0 {
                fail(reporter, 1);
            }
            if mounts >= 0 && libc::setns(mounts, libc::CLONE_NEWNS) != 0 {
                fail(reporter, 2);
            }
            libc::setpgid(0, 0);
            libc::umask(0o022);
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
            if libc::chdir(self.directory.as_ptr()) != 0 {
                fail(reporter, 3);
            }
            // By close-on-exec, not at once: the pipe must live until the exec has succeeded.
            let rest = libc::syscall(
                libc::SYS_close_range,
                count,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            if rest != 0 {
                fail(reporter, 4);
            }
            if let Some(label) = &self.label
                && !set_label(label)
            {
                fail(reporter, 5);
            }
            libc::execve(
                self.program.as_ptr(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
            );
        }
        fail(reporter, 6)
    }
}

/// Has SELinux run this process's next program under a label (attr/exec of proc_pid_attr(5)). If not, errno says why.
fn set_label(label: &CStr) -> bool {
    let length = label.count_bytes();
    // SAFETY: open reads a C string; write reads `length` bytes of the live label.
    unsafe {
        let file = libc::open(
            c"/proc/self/attr/exec".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        file >= 0 && libc::write(file, label.as_ptr().cast(), length) == length as isize
    }
}

/// Copies every descriptor that the child still needs to a number of `floor` or more. Answers those
/// of the report, the network namespace and the mount namespace; -1 where there is none.
fn lift_all(
    sources: &mut [RawFd],
    reporter: RawFd,
    how: &Birth,
    floor: c_int,
) -> Result<(RawFd, RawFd, RawFd), ()> {
    let lift = |fd: RawFd| {
        // SAFETY: fcntl with F_DUPFD_CLOEXEC takes numbers only.
        match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, floor) } {
            -1 => Err(()),
            lifted => Ok(lifted),
        }
    };
    let reporter = lift(reporter)?;
    for source in sources {
        *source = lift(*source)?;
    }
    let network = match how.network {
        Network::Join(fd) => lift(fd.as_raw_fd())?,
        Network::Inherited | Network::New => -1,
    };
    let mounts = match how.mounts {
        Some(fd) => lift(fd.as_raw_fd())?,
        None => -1,
    };
    Ok((reporter, network, mounts))
}

/// Tells the parent which step failed, and ends the child.
fn fail(reporter: RawFd, step: i32) -> ! {
    // SAFETY: `__errno_location` points to this thread's errno; write reads 8 bytes of a live
    // array; _exit runs nothing of the parent's copy.
    unsafe {
        let errno = *libc::__errno_location();
        let mut report = [0u8; 8];
        let (first, second) = report.split_at_mut(4);
        first.copy_from_slice(&step.to_ne_bytes());
        second.copy_from_slice(&errno.to_ne_bytes());
        libc::write(reporter, report.as_ptr().cast(), report.len());
        libc::_exit(127)
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(to, "ended with status {status}"),
            Self::Signal(signal) => write!(to, "was killed by signal {signal}"),
        }
    }
}

/// A child that a task of the runtime watches and reaps.
#[derive(Clone, Debug)]
pub struct Child {
    /// Its pid; its own as long as it has not been reaped.
    pub pid: u32,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Child {
    /// Watches a process. Needs a runtime of tokio.
    pub fn watch(newborn: Newborn) -> io::Result<Self> {
        let pidfd = Arc::new(newborn.pidfd);
        let (tell, exit) = watch::channel(None);
        // SAFETY: the Arc keeps the one descriptor open for the AsyncFd's whole life, and its
        // `as_raw_fd` is that of an OwnedFd, which never changes.
        let watched = unsafe { AsyncFd::register(Arc::clone(&pidfd)) }?;
        tokio::spawn(async move {
            let exit = reap(&watched).await;
            tell.send_replace(Some(exit));
        });
        Ok(Self {
            pid: newborn.pid,
            pidfd,
            exit,
        })
    }

    /// Waits for its end.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::Status(-1)),
            // The runtime is going down, and the watching task with it.
            Err(_) => Exit::Status(-1),
        }
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Kills it; nothing happens to one that has ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Kills it and waits until it is gone, at most `limit`; `false` if it is not gone by then.
    pub async fn end(&self, limit: Duration) -> bool {
        self.kill();
        tokio::time::timeout(limit, self.exited()).await.is_ok()
    }
}

async fn reap(pidfd: &AsyncFd<Arc<OwnedFd>>) -> Exit {
    loop {
        // An error here is the reactor's end; the state is then asked for all the same.
        let readable = pidfd.readable().await;
        let fd = pidfd.get_ref().as_fd();
        match waitid(
            WaitId::PidFd(fd),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(Some(status)) => {
                return match (status.exit_status(), status.terminating_signal()) {
                    (Some(status), _) => Exit::Status(status),
                    (None, signal) => Exit::Signal(signal.unwrap_or_default()),
                };
            }
            Err(rustix::io::Errno::CHILD) => return Exit::Status(-1),
            Ok(None) | Err(_) => match readable {
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => return Exit::Status(-1),
            },
        }
    }
}

#[cfg(test)]
mod tests;
