//! A program started as a child of a process that has threads: born in its cgroup, with the
//! descriptors it is handed and no other.
//!
//! A child is never moved into its cgroup afterwards: clone3(2) puts it there before its first
//! instruction. All that it needs is made before it is born. Then it makes system calls only, since
//! the locks that other threads held at its birth, the allocator's too, stay locked in it.

use std::convert::Infallible;
use std::ffi::{CString, c_char};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, chdir, setpgid, umask, waitid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::clone::{Arguments, Cloned, clone3};
use crate::namespace::unshare;
use crate::numbers::Call;
use crate::{fd, signal};

/// The network namespace that a child lives in.
#[derive(Clone, Copy, Debug)]
pub enum Network<'a> {
    /// Its parent's.
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
    /// A directory of cgroup2 that it is born in; none: its parent's cgroup.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Its network namespace.
    pub network: Network<'a>,
    /// New namespaces that it is born in. With `NEWPID` it is process 1 of its own: its end is that
    /// of all its descendants, and no signal reaches it from them, or from itself, unless it
    /// handles that signal (pid_namespaces(7)). Our side sees a pid of ours.
    pub namespaces: UnshareFlags,
    /// The mount namespace that it lives in; none: its parent's.
    pub mounts: Option<BorrowedFd<'a>>,
    /// The SELinux label that its program begins under; none: as the host's policy has it.
    pub label: Option<&'a str>,
    /// Its oom_score_adj (proc_pid_oom_score_adj(5)), −1000 to 1000; none: its parent's. Where the
    /// parent may not lower its own, a lower one is not taken.
    pub oom_score: Option<i32>,
    /// Standard input, output, error and then descriptors 3, 4, …; none: `/dev/null`.
    pub descriptors: &'a [Option<BorrowedFd<'a>>],
}

/// Why a child could not be born.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub enum BirthError {
    /// A name holds a zero byte.
    #[error("start {program:?}: a NUL in its path, arguments or environment")]
    Nul { program: String },
    /// A step of the parent failed.
    #[error("{step} to start {program}")]
    Parent {
        step: &'static str,
        program: String,
        #[source]
        source: io::Error,
    },
    /// A step of the child failed, the last one being the exec itself.
    #[error("{step} {program}")]
    Child {
        step: &'static str,
        program: String,
        #[source]
        source: io::Error,
    },
}

/// A process that was born and is not reaped yet.
#[derive(Debug)]
pub struct Newborn {
    /// As its parent sees it.
    pub pid: u32,
    /// Refers to the process, whoever has its pid later.
    pub pidfd: OwnedFd,
}

/// A step of the child's, as its number goes through the pipe.
#[derive(Clone, Copy, Debug)]
enum Step {
    Descriptors,
    CgroupNamespace,
    OomScore,
    Network,
    Mounts,
    Signals,
    Directory,
    Rest,
    Label,
    Run,
}

/// What each step is called, in their order.
const STEPS: [&str; 10] = [
    "arrange the descriptors of",
    "make the cgroup namespace of",
    "set oom_score_adj of",
    "join the network namespace of",
    "enter the mount namespace of",
    "unblock the signals of",
    "enter the directory of",
    "close the descriptors of",
    "set the SELinux label of",
    "run",
];

/// Gives birth. Returns when the program runs or could not be run; blocks for that long.
pub fn birth(how: &Birth) -> Result<Newborn, BirthError> {
    let program = how.program.display().to_string();
    let failed = |step| {
        let program = program.clone();
        move |source| BirthError::Parent {
            step,
            program,
            source,
        }
    };
    let names = Names::new(how).map_err(|_| BirthError::Nul {
        program: program.clone(),
    })?;
    let (report, reporter) = pipe_with(PipeFlags::CLOEXEC)
        .map_err(io::Error::from)
        .map_err(failed("make a pipe"))?;
    let plan = Plan::new(names, how, &reporter).map_err(failed("copy descriptors"))?;
    drop(reporter);

    let mut arguments = Arguments::of_a_child();
    let mut step = "clone";
    if let Some(cgroup) = how.cgroup {
        arguments = arguments.in_cgroup(cgroup);
        step = "clone into its cgroup";
    }
    if matches!(how.network, Network::New) {
        arguments = arguments.new_namespaces(libc::CLONE_NEWNET as u64);
    }
    // The child's own step: the root of a cgroup namespace is the cgroup of whoever makes it.
    let at_birth = how.namespaces.difference(UnshareFlags::NEWCGROUP);
    arguments = arguments.new_namespaces(at_birth.bits().into());
    // SAFETY: the child does what `Plan::live` does, and nothing else, for that never returns:
    // system calls alone, with what was made before. It allocates nothing and takes no lock.
    let newborn = match unsafe { clone3(arguments) }.map_err(failed(step))? {
        Cloned::Child => plan.live(),
        Cloned::Parent { pid, pidfd } => Newborn { pid, pidfd },
    };
    // The child has the only writing end from now on.
    drop(plan);
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

/// The child's report: end-of-file once the program runs, else its step and errno.
fn read_report(report: &OwnedFd) -> Option<(usize, i32)> {
    let mut bytes = [0u8; 8];
    loop {
        match rustix::io::read(report, &mut bytes) {
            Err(Errno::INTR) => continue,
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

/// The strings that the child hands to the kernel, as the kernel takes them.
struct Names {
    program: CString,
    directory: CString,
    label: Option<CString>,
    /// Pointers to `_strings`, and a null pointer behind the last.
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    _strings: Vec<CString>,
}

impl Names {
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
            label: how.label.map(CString::new).transpose()?,
            arguments,
            environment,
            _strings: strings,
        })
    }

    /// Runs the program in place of this process; returns only if that fails.
    fn run(&self) -> io::Error {
        // SAFETY: execve reads C strings and arrays of pointers to such that end with a null
        // pointer: `Names::new` makes them so, and all of them live as long as `self`.
        unsafe {
            libc::execve(
                self.program.as_ptr(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
            )
        };
        io::Error::last_os_error()
    }
}

/// All that the child needs, made before it is born.
struct Plan {
    names: Names,
    /// Its descriptors 0, 1, 2, …; like the others below with numbers above all of these.
    descriptors: Vec<OwnedFd>,
    cgroup_namespace: bool,
    network: Option<OwnedFd>,
    mounts: Option<OwnedFd>,
    oom_score: Option<String>,
    reporter: OwnedFd,
}

impl Plan {
    fn new(names: Names, how: &Birth, reporter: &OwnedFd) -> io::Result<Self> {
        let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let mut descriptors = how.descriptors.to_vec();
        descriptors.resize(descriptors.len().max(3), None);
        let lift = |fd: BorrowedFd| fd::lift(fd, descriptors.len());
        let network = match how.network {
            Network::Join(namespace) => Some(lift(namespace)?),
            Network::Inherited | Network::New => None,
        };
        let lifted = descriptors
            .iter()
            .map(|fd| lift(fd.unwrap_or(null.as_fd())));
        Ok(Self {
            names,
            cgroup_namespace: how.namespaces.contains(UnshareFlags::NEWCGROUP),
            network,
            descriptors: lifted.collect::<io::Result<_>>()?,
            mounts: how.mounts.map(lift).transpose()?,
            oom_score: how.oom_score.map(|score| score.to_string()),
            reporter: lift(reporter.as_fd())?,
        })
    }

    /// The child's life before its program: see the SAFETY of its birth.
    fn live(&self) -> ! {
        let Err((step, cause)) = self.become_the_program();
        let mut report = [0u8; 8];
        let (first, second) = report.split_at_mut(4);
        first.copy_from_slice(&(step as i32).to_ne_bytes());
        second.copy_from_slice(&cause.raw_os_error().unwrap_or_default().to_ne_bytes());
        let _ = rustix::io::write(&self.reporter, &report);
        // Not `std::process::exit`, which runs what the parent has registered for its own end.
        loop {
            let _ = Call::Exit(127).make();
        }
    }

    fn become_the_program(&self) -> Result<Infallible, (Step, io::Error)> {
        let at = |step| move |errno: Errno| (step, io::Error::from(errno));
        let failed = |step| move |cause: io::Error| (step, cause);
        fd::arrange(&self.descriptors, 0).map_err(failed(Step::Descriptors))?;
        if self.cgroup_namespace {
            unshare(UnshareFlags::NEWCGROUP).map_err(failed(Step::CgroupNamespace))?;
        }
        self.set_oom_score().map_err(at(Step::OomScore))?;
        for (namespace, kind, step) in [
            (&self.network, LinkNameSpaceType::Network, Step::Network),
            (&self.mounts, LinkNameSpaceType::Mount, Step::Mounts),
        ] {
            if let Some(namespace) = namespace {
                move_into_link_name_space(namespace.as_fd(), Some(kind)).map_err(at(step))?;
            }
        }
        let _ = setpgid(None, None);
        umask(Mode::WGRP | Mode::WOTH);
        signal::unblock_all().map_err(failed(Step::Signals))?;
        chdir(self.names.directory.as_c_str()).map_err(at(Step::Directory))?;
        // At exec, not at once: the pipe must live until the exec has succeeded.
        fd::close_at_exec(self.descriptors.len() as u32).map_err(failed(Step::Rest))?;
        self.set_label().map_err(at(Step::Label))?;
        Err((Step::Run, self.names.run()))
    }

    /// Sets the score that the kernel kills by when memory runs out. It stays across exec.
    fn set_oom_score(&self) -> rustix::io::Result<()> {
        let Some(score) = &self.oom_score else {
            return Ok(());
        };
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
        match rustix::io::write(file, score.as_bytes()) {
            // Lower than its parent's, which lacks CAP_SYS_RESOURCE: the child keeps that one, and
            // is killed the sooner for it.
            Err(Errno::ACCESS) => Ok(()),
            written => written.map(drop),
        }
    }

    /// Has SELinux run this process's next program under its label (attr/exec of proc_pid_attr(5)).
    fn set_label(&self) -> rustix::io::Result<()> {
        let Some(label) = &self.names.label else {
            return Ok(());
        };
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(c"/proc/self/attr/exec", flags, Mode::empty())?;
        // The kernel takes all of it or none.
        rustix::io::write(file, label.as_bytes()).map(drop)
    }
}

#[cfg(test)]
mod tests;
